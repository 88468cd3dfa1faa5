"""`python -m lora_opcm.lab.bases.tiny FOLDER`: random checkpoints and small data, to rehearse with.

`FOLDER/tiny-bert`, `tiny-clip` and `tiny-llama` load with transformers as their big sisters do; `FOLDER/data`
holds the rehearsed tasks as parquet files with the columns, types and splits of the hub. A few hundred kB in
all, made without a network; nothing measured on them says anything about models or methods.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from datasets import ClassLabel, Dataset, Features, Image, Value, disable_progress_bars
from PIL import Image as Picture
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from ..tasks.hub import GLUE
from ..tasks.vision import VISION

WIDTH, LAYERS, HEADS, VOCABULARY, PIXELS = 32, 2, 2, 400, 16
SIZE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 64,
}
TRAIN, TEST = 120, 40  # examples a task
CLASSES = 4  # of a vision task with names of its own


def tiny(folder: Annotated[Path, typer.Argument(help="where the checkpoints and the data go")]):
    """Make the three checkpoints and the data of the profile `rehearsal`."""
    torch.manual_seed(0)
    disable_progress_bar()
    disable_progress_bars()
    data = {**texts(), **prompts()}
    words = [str(v) for splits in data.values() for rows in splits.values() for row in rows for v in _leaves(row)]
    bert(folder / "tiny-bert", words)
    clip(folder / "tiny-clip", words)
    llama(folder / "tiny-llama", words)
    for name, splits in {**data, **pictures()}.items():
        (folder / "data" / name).mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            rows.to_parquet(folder / "data" / name / f"{split}.parquet")


def _leaves(value):
    """The strings inside a row."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value


# -- checkpoints ------------------------------------------------------------------------------------------


def tokenizer(
    words: list[str], pad: str, begin: str, end: str, closed: bool = True, **roles: str
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `words`.

    It puts `begin` before every text and, if `closed`, `end` after.
    """
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(dict.fromkeys([pad, begin, end])),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    ends = [(token, core.token_to_id(token)) for token in {begin, end}]
    shape = f"{begin} $A {end}" if closed else f"{begin} $A"
    core.post_processor = processors.TemplateProcessing(single=shape, special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, **roles)


def bert(folder: Path, words: list[str]) -> None:
    """A random BERT; without dropout, so that what it learns depends on the order of examples alone."""
    made = tokenizer(words, "[PAD]", "[CLS]", "[SEP]", cls_token="[CLS]", sep_token="[SEP]")
    config = BertConfig(
        vocab_size=len(made),
        max_position_embeddings=80,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SIZE,
    )
    BertModel(config).save_pretrained(folder)
    made.save_pretrained(folder)


def clip(folder: Path, words: list[str]) -> None:
    """A random CLIP for pictures of 16 × 16 pixels, in patches of 8."""
    begin, end = "<|startoftext|>", "<|endoftext|>"
    made = tokenizer(words, end, begin, end, bos_token=begin, eos_token=end)
    made.model_max_length = 77
    text = {"vocab_size": len(made), "bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id}
    config = CLIPConfig(
        text_config=SIZE | text | {"max_position_embeddings": 77},
        vision_config=SIZE | {"image_size": PIXELS, "patch_size": PIXELS // 2},
        projection_dim=WIDTH,
    )
    CLIPModel(config).save_pretrained(folder)
    side = {"height": PIXELS, "width": PIXELS}
    images = CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=side)
    images.save_pretrained(folder)
    made.save_pretrained(folder)


def llama(folder: Path, words: list[str]) -> None:
    """A random Llama with room for the prompts of the harness."""
    made = tokenizer(words, "</s>", "<s>", "</s>", bos_token="<s>", eos_token="</s>", closed=False)
    config = LlamaConfig(
        vocab_size=len(made),
        max_position_embeddings=1024,
        num_key_value_heads=1,
        bos_token_id=made.bos_token_id,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id,
        **SIZE,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    made.save_pretrained(folder)


# -- data -------------------------------------------------------------------------------------------------


def texts() -> dict[str, dict[str, Dataset]]:
    """The GLUE tasks: one word tells the label."""
    found = {}
    for name, (columns, _) in GLUE.items():
        features = Features({c: Value("string") for c in np.atleast_1d(columns)} | {"label": ClassLabel(num_classes=2)})
        found[name] = {}
        for split, size in (("train", TRAIN), ("validation", TEST)):
            lines = [f"{name} {split} {i} {'river' if i % 2 else 'cloud'}" for i in range(size)]
            rows = {c: lines for c in np.atleast_1d(columns)} | {"label": [i % 2 for i in range(size)]}
            found[name][split] = Dataset.from_dict(rows, features=features)
    return found


def pictures() -> dict[str, dict[str, Dataset]]:
    """The eight vision tasks: a class is a mean colour, under noise."""
    rng = np.random.default_rng(0)
    found = {}
    for name, recipe in VISION.items():
        names = list(recipe.names) or [f"{name} {i}" for i in range(CLASSES)]
        colours = rng.integers(256, size=(len(names), 3))
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        found[name] = {}
        for split, size in (("train", TRAIN), ("test", TEST)):
            labels = [i % len(names) for i in range(size)]
            noise = rng.normal(0, 20, size=(size, 24, 20, 3))
            pixels = np.clip(colours[labels][:, None, None] + noise, 0, 255).astype("uint8")
            rows = {"image": [Picture.fromarray(p) for p in pixels], "label": labels}
            found[name][split] = Dataset.from_dict(rows, features=features)
    return found


def prompts() -> dict[str, dict[str, Dataset]]:
    """The generation tasks that can be evaluated offline, each with one answer to learn."""
    makers = {
        "squad": lambda i: {
            "context": f"Town {i} lies by a river.", "question": f"Where does town {i} lie?",
            "answers": {"text": ["by a river"], "answer_start": [len(f"Town {i} lies ")]},
        },
        "xsum": lambda i: {"document": f"It rained in town {i}.", "summary": "It rained.", "id": str(i)},
        "cnn_dailymail": lambda i: {
            "article": f"The sun shone in town {i}.", "highlights": "The sun shone.", "id": str(i),
        },
        "wmt16": lambda i: {"translation": {"ro": f"casa {i}", "en": "a house"}},
        "gsm8k": lambda i: {"question": f"What is {i} - {i} + 12?", "answer": "#### 12"},
    }  # fmt: skip
    splits = {
        "squad": ("train", "validation"),
        "wmt16": ("train", "validation", "test"),
        "gsm8k": ("train", "test"),
    }
    return {
        name: {
            split: Dataset.from_list([make(i) for i in range(TRAIN if split == "train" else TEST)])
            for split in splits.get(name, ("train", "validation", "test"))
        }
        for name, make in makers.items()
    }


if __name__ == "__main__":
    typer.run(tiny)
