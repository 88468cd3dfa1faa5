"""CLIP as a base model: its vision tower is adapted, its text tower makes the frozen zero-shot head.

logits = s · cosine(embedding of the image, embedding of each class), s the checkpoint's own logit scale. A
class is the normalised mean of the embeddings of its name in several templates. Both towers end in a
projection into the shared space; LoRA goes on the linear layers of the vision tower's transformer only.
"""

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPVisionModelWithProjection

from ..assets import AssetError
from ..tasks import Task

# The four projections of attention, as the published ViT-B/32 adapters of KnOTS have it.
CLIP_LINEAR = r"vision_model\.encoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj"


class Images:
    """Pixel tensors of a split, shape=[3, h, w] each, decoded and resized when they are asked for."""

    def __init__(self, rows: Dataset, processor):
        self.rows, self.processor = rows, processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Tensor:
        image = self.rows[i]["image"].convert("RGB")  # digits come in grey
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


class Clip:
    """A CLIP checkpoint as a base model; `bases` says what the methods are for."""

    family, targets, workers = "clip", CLIP_LINEAR, 8
    task_type = None  # peft knows no task for image embeddings

    def __init__(self, name: str):
        self.name = name
        try:
            whole = CLIPModel.from_pretrained(name, dtype=torch.float32).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            # Pillow's resizing, also where torchvision is installed: one set of pixels everywhere.
            self.processor = AutoImageProcessor.from_pretrained(name, backend="pil")
        except (OSError, ValueError) as error:
            raise AssetError(f"cannot load the CLIP model {name!r}: {str(error).strip().splitlines()[0]}") from None
        self.scale = float(whole.logit_scale.detach().exp())
        self.text = whole
        # A model whose forward is the image embedding: what DistributedDataParallel and FSDP wrap.
        self.model = CLIPVisionModelWithProjection(whole.config.vision_config).eval()
        self.model.vision_model = whole.vision_model
        self.model.visual_projection = whole.visual_projection

    def encode(self, task: Task, split: str, limit: int | None = None) -> Images:
        rows = task[split]
        return Images(rows.select(range(min(limit, len(rows)))) if limit else rows, self.processor)

    def lengths(self, features: Images) -> list[int]:
        config = self.model.config
        tokens = (config.image_size // config.patch_size) ** 2 + 1  # patches and the class token
        return [tokens] * len(features)

    def content(self, features: Images) -> str:
        return f"{features.rows._fingerprint} {self.processor.to_json_string()}"

    def collate(self, features: list[Tensor]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack(features)}

    def embed(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        pixels = batch["pixel_values"].to(next(model.parameters()).dtype)
        return F.normalize(model(pixel_values=pixels).image_embeds.float(), dim=-1)

    @torch.inference_mode()
    def head(self, task: Task) -> Tensor:
        """Class embeddings, shape=[classes, d], from the text tower."""
        device = self.model.device
        rows = []
        for sentences in task.sentences:
            tokens = self.tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
            z = self.text.to(device).get_text_features(**tokens.to(device)).pooler_output
            rows.append(F.normalize(F.normalize(z.float(), dim=-1).mean(0), dim=-1))
        return torch.stack(rows)
