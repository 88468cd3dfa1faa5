"""Training one LoRA on one task, with peft and transformers' Trainer.

The Trainer is Accelerate underneath: `accelerate launch` runs the same lines on one GPU, many, or with the
base sharded (profiles/accelerate). The batch size of a protocol is that of all processes together.
"""

import hashlib
import json
import os
import shutil
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, set_seed

from ..files.disk import replacing, write_text
from .bases import load
from .bases.causal import LLAMA_LINEAR, Causal
from .bases.encoder import BERT_LINEAR, MINILM, MPNET_LINEAR, Encoder
from .bases.vision import CLIP_LINEAR, Clip
from .tasks import Prompts, Task

# What differs between the families of `bases`, or for one base by name; the rest of `Protocol` is shared.
DEFAULTS = {
    "encoder": {},
    "mpnet": {"target_modules": MPNET_LINEAR},
    "clip": {
        "target_modules": CLIP_LINEAR, "learning_rate": 3e-4, "batch_size": 128, "steps": 1000,
        "evaluate_every": 100,
    },
    "causal": {
        "target_modules": LLAMA_LINEAR, "learning_rate": 2e-4, "batch_size": 16, "steps": 500,
        "evaluate_every": 100,
    },
}  # fmt: skip


class Protocol(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What every adapter of the book shares; `rank` and `seed` vary."""

    rank: int = 16
    alpha: int = 32
    seed: int = 0
    learning_rate: float = 1e-3
    batch_size: int = 32
    steps: int = 100
    evaluate_every: int = 25
    patience: int = 2  # evaluations without a better validation accuracy (or loss) before training stops
    target_modules: str = BERT_LINEAR
    base: str = MINILM
    quantise: str = ""  # "8bit" or "4bit": the base of a causal model while it is tuned
    # Examples a process takes at once; fewer than its share are accumulated. 0: its share.
    device_batch: int = 0
    # Texts that choose the checkpoint: those of validation, or a tenth of the training texts (at most 200), so that
    # validation texts, which choose the scale of a merge, have chosen nothing before.
    checkpoint: Literal["validation", "train"] = "validation"
    one_start: bool = False  # whether all tasks start from one random A
    shuffled: bool = False  # labels that say nothing of their texts: a control

    def start(self, task: str) -> int:
        """The random seed of one run: initial A, order of the texts.

        It differs between tasks unless `one_start`. Adapters that start from one random A keep much of it, and share
        input directions for that reason alone; people who merge adapters do not have that gift.
        """
        return zlib.crc32(f"{'' if self.one_start else task} {self.seed}".encode())


PROTOCOL = Protocol()


class Record(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """What training.json says of one adapter, and manifest.json of all in a folder: by what it was made, on what."""

    task: str
    seed: int
    sha256: str  # of the bytes of its weight file
    data_sha256: str
    protocol: Protocol
    versions: dict[str, str]
    zero_shot: float | None = None
    own: float | None = None
    device: str | None = None


class HeadTrainer(Trainer):
    """Trainer whose logits are scaled cosines to a frozen head."""

    def __init__(self, *args, base: Encoder | Clip, head: torch.Tensor, groups: tuple[int, ...] | None, **kwargs):
        super().__init__(*args, **kwargs)
        self.base, self.head = base, head
        self.groups = groups and torch.tensor(groups)
        self.model_accepts_loss_kwargs = False  # our loss is a mean over its batch; accumulation divides it

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        z = self.base.embed(model, inputs)
        logits = self.base.scale * z @ self.head.to(z.device, z.dtype).T
        if self.groups is not None:  # a text competes for the labels of its own task
            groups = self.groups.to(z.device)
            logits = logits.masked_fill(groups != groups[labels][:, None], -1e4)
        loss = F.cross_entropy(logits, labels)
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss


def train_adapter(
    task: Task | Prompts,
    folder: Path | str,
    protocol: Protocol = PROTOCOL,
    *,
    report_to: str = "none",
    quiet: bool = False,
) -> PeftModel:
    """Train a LoRA on `task`, keep the checkpoint best on validation, return the model in evaluation mode.

    Classification keeps the best accuracy, generation the lowest loss of completions. Checkpoints,
    `history.json` (the Trainer's log) and `best` (the adapter, a PEFT folder) go to `folder`; a run that was
    interrupted there resumes from its last whole checkpoint. Mixed precision is used where the device has
    bfloat16.

    Raises
    ------
    ValueError
        If the processes cannot share the batch size, or the task is of another family than the base.
    """
    folder = Path(folder)
    set_seed(protocol.start(task.name))
    base = load(protocol.base, protocol.quantise)
    if isinstance(base, Causal) != isinstance(task, Prompts):
        raise ValueError(f"{task.name} is no task for the base {protocol.base!r}, of the family {base.family}")
    options = {}
    if base.family != "causal":
        # A clone, because inference tensors cannot enter autograd.
        options = {"base": base, "head": base.head(task).clone(), "groups": task.groups}
    if protocol.quantise:
        base.model = prepare_model_for_kbit_training(base.model)
    config = LoraConfig(
        r=protocol.rank,
        lora_alpha=protocol.alpha,
        target_modules=protocol.target_modules,
        task_type=base.task_type,
    )
    model = get_peft_model(base.model, config)
    train, held_out = _encode(base, task, protocol)
    trainer = (HeadTrainer if options else Trainer)(
        model=model,
        args=_arguments(task, folder, protocol, base.workers, report_to, quiet, classify=bool(options)),
        data_collator=_Collator(base),
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=_accuracy if options else None,
        callbacks=[EarlyStoppingCallback(protocol.patience)],
        **options,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    trainer.save_model(str(folder / "best"))
    if trainer.is_world_process_zero():
        write_text(folder / "history.json", json.dumps(trainer.state.log_history, indent=1))
    return model.eval()


def processes() -> PartialState:
    """The processes this one trains together with: one, or as many as `accelerate launch` started."""
    # Without being told, Accelerate takes processes that have no accelerator for so many lone ones.
    return PartialState(cpu=not torch.accelerator.is_available())


def last_checkpoint(folder: Path | str) -> str | None:
    """The newest checkpoint in `folder` that was written to its end; one cut short is removed."""
    whole = {}
    for path in Path(folder).glob("checkpoint-*"):
        try:
            whole[json.loads((path / "trainer_state.json").read_text())["global_step"]] = str(path)
        except (OSError, ValueError, KeyError):  # the state is written last
            shutil.rmtree(path, ignore_errors=True)
    return whole[max(whole)] if whole else None


def _arguments(task, folder, protocol, workers, report_to, quiet, classify) -> TrainingArguments:
    count = processes().num_processes
    share = protocol.batch_size // count
    at_once = min(protocol.device_batch or share, share)
    if share * count != protocol.batch_size or share % at_once:
        raise ValueError(
            f"a batch of {protocol.batch_size} cannot be shared by {count} processes, {at_once} examples at once"
        )
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=protocol.steps,
        per_device_train_batch_size=at_once,
        per_device_eval_batch_size=at_once,
        gradient_accumulation_steps=share // at_once,
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
        metric_for_best_model="accuracy" if classify else "loss",
        prediction_loss_only=not classify,
        label_names=["labels"],
        remove_unused_columns=False,
        seed=protocol.start(task.name),
        use_cpu=not torch.accelerator.is_available(),
        bf16=cuda and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=cuda,
        dataloader_num_workers=min(workers, os.cpu_count() or 1) if cuda else 0,
        ddp_find_unused_parameters=False,
        report_to=report_to,
        run_name=f"{task.name}-seed{protocol.seed}-r{protocol.rank}",
        disable_tqdm=quiet,
    )


class _Encoded(Dataset):
    """Features, with their labels where the task has any."""

    def __init__(self, features, labels: list[int] | None):
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, i: int):
        return self.features[i], None if self.labels is None else self.labels[i]


def _encode(base: Encoder | Clip | Causal, task: Task | Prompts, protocol: Protocol) -> tuple[Dataset, Dataset]:
    """Examples to learn from, and those that choose the checkpoint."""
    labelled = base.family != "causal"
    train, held_out = (
        _Encoded(base.encode(task, split), task[split]["label"][:] if labelled else None)
        for split in ("train", "validation")
    )
    if protocol.shuffled:
        train.labels = np.random.default_rng(protocol.start(task.name)).permutation(train.labels).tolist()
    if protocol.checkpoint == "validation":
        return train, held_out
    count = len(train) - min(200, len(train) // 10)  # the rows were shuffled
    return Subset(train, range(count)), Subset(train, range(count, len(train)))


class _Collator:
    def __init__(self, base: Encoder | Clip | Causal):
        self.base = base

    def __call__(self, rows: list[tuple]) -> dict[str, torch.Tensor]:
        features, labels = zip(*rows)
        batch = self.base.collate(list(features))
        return batch if labels[0] is None else batch | {"labels": torch.tensor(labels)}


def _accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


PUBLIC_NAME = "sentence-transformers/all-MiniLM-L6-v2"


def save_adapter_half(model: PeftModel | Path | str, folder: Path | str, base: str = PUBLIC_NAME) -> Path:
    """Write the adapter as an ordinary PEFT folder in float16, for a base that goes by its public name.

    `model` is a trained model, or the folder `best` that training left.
    """
    folder = Path(folder)
    if isinstance(model, PeftModel):
        model.save_pretrained(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(model, "adapter_config.json"), folder)
    source = folder if isinstance(model, PeftModel) else Path(model)
    tensors = {name: t.half() for name, t in load_file(source / "adapter_model.safetensors").items()}
    config = json.loads((folder / "adapter_config.json").read_text())
    text = json.dumps(config | {"base_model_name_or_path": base}, indent=2)
    # The weights last: they say that the adapter is there.
    with replacing(folder / "adapter_model.safetensors") as scratch:
        save_file(tensors, scratch, metadata={"format": "pt"})
        write_text(folder / "adapter_config.json", text)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty card; ours is data/README.md
    return folder


def record_of(task: Task | Prompts, folder: Path, protocol: Protocol, **accuracy: float) -> Record:
    """The record of an adapter that was just written."""
    weights = (Path(folder) / "adapter_model.safetensors").read_bytes()
    return Record(
        task=task.name,
        seed=protocol.seed,
        sha256=hashlib.sha256(weights).hexdigest(),
        data_sha256=task.sha256,
        protocol=protocol,
        versions={name: version(name) for name in ("torch", "transformers", "peft")},
        **accuracy,
    )
