"""Training one LoRA on one task, with peft and transformers' Trainer."""

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, set_seed

from .encoder import MINILM, SCALE, embed, head, load_base, pad, tokenise
from .tasks import Task

# Every linear layer of a BERT encoder, by full name: peft matches the whole string.
BERT_LINEAR = (
    r"encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|attention\.output\.dense"
    r"|intermediate\.dense|output\.dense)"
)


@dataclass(frozen=True)
class Protocol:
    """What every adapter of the book shares; `rank` and `seed` vary."""

    rank: int = 16
    alpha: int = 32
    seed: int = 0
    learning_rate: float = 1e-3
    batch_size: int = 32
    steps: int = 100
    evaluate_every: int = 25
    patience: int = 2  # evaluations without a better validation accuracy before training stops
    target_modules: str = BERT_LINEAR
    base: str = MINILM

    def start(self, task: str) -> int:
        """The random seed of one run: initial A, order of the texts.

        It differs between tasks. Adapters that start from one random A keep much of it, and share input
        directions for that reason alone; people who merge adapters do not have that gift.
        """
        return zlib.crc32(f"{task} {self.seed}".encode())


class HeadTrainer(Trainer):
    """Trainer whose logits are scaled cosines to a frozen head."""

    def __init__(self, *args, head: torch.Tensor, **kwargs):
        super().__init__(*args, **kwargs)
        self.head = head

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        z = embed(model, inputs["input_ids"], inputs["attention_mask"])
        logits = SCALE * z @ self.head.to(z.device, z.dtype).T
        loss = F.cross_entropy(logits, labels)
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss


def train_adapter(
    task: Task,
    folder: Path | str,
    protocol: Protocol = Protocol(),
    *,
    report_to: str = "none",
    quiet: bool = False,
) -> PeftModel:
    """Train a LoRA on `task`, keep the checkpoint best on validation, return the model in evaluation mode.

    Checkpoints and `history.json` (the Trainer's log) go to `folder`; a run that was interrupted there
    resumes from its last checkpoint. Mixed precision is used where the device has bfloat16.
    """
    folder = Path(folder)
    start = protocol.start(task.name)
    set_seed(start)
    base, tokenizer = load_base(protocol.base)
    frozen_head = head(task, base, tokenizer).clone()  # clone: inference tensors cannot enter autograd
    config = LoraConfig(
        r=protocol.rank,
        lora_alpha=protocol.alpha,
        target_modules=protocol.target_modules,
        task_type="FEATURE_EXTRACTION",
    )
    model = get_peft_model(base, config)
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=protocol.steps,
        per_device_train_batch_size=protocol.batch_size,
        per_device_eval_batch_size=protocol.batch_size,
        learning_rate=protocol.learning_rate,
        warmup_steps=protocol.steps // 10,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        eval_strategy="steps",
        eval_steps=protocol.evaluate_every,
        save_strategy="steps",
        save_steps=protocol.evaluate_every,
        save_total_limit=2,
        logging_steps=max(1, protocol.evaluate_every // 5),
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        label_names=["labels"],
        remove_unused_columns=False,
        seed=start,
        bf16=cuda and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=cuda,
        report_to=report_to,
        run_name=f"{task.name}-seed{protocol.seed}-r{protocol.rank}",
        disable_tqdm=quiet,
    )
    trainer = HeadTrainer(
        model=model,
        args=arguments,
        head=frozen_head,
        data_collator=partial(_collate, pad_id=tokenizer.pad_token_id),
        train_dataset=_encode(task, "train", tokenizer),
        eval_dataset=_encode(task, "validation", tokenizer),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        callbacks=[EarlyStoppingCallback(protocol.patience)],
    )
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    (folder / "history.json").write_text(json.dumps(trainer.state.log_history, indent=1))
    return model.eval()


PUBLIC_NAME = "sentence-transformers/all-MiniLM-L6-v2"


def save_adapter_half(model: PeftModel, folder: Path | str, base: str = PUBLIC_NAME) -> Path:
    """Write the adapter as an ordinary PEFT folder in float16, for a base that goes by its public name."""
    folder = Path(folder)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.half()
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty card; ours is data/README.md
    return folder


def manifest_entry(task: Task, folder: Path, protocol: Protocol, **accuracy: float) -> dict:
    """What data/adapters/manifest.json says about one adapter."""
    weights = (Path(folder) / "adapter_model.safetensors").read_bytes()
    return {
        "task": task.name,
        "seed": protocol.seed,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "data_sha256": task.sha256,
        "protocol": asdict(protocol),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        **accuracy,
    }


def _encode(task: Task, split: str, tokenizer) -> list[dict]:
    rows = task[split]
    return [{"ids": i, "label": c} for i, c in zip(tokenise(rows["text"][:], tokenizer), rows["label"][:])]


def _collate(rows: list[dict], pad_id: int) -> dict[str, torch.Tensor]:
    batch = pad([row["ids"] for row in rows], pad_id)
    return batch | {"labels": torch.tensor([row["label"] for row in rows])}
