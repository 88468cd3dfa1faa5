"""Training one LoRA on one task, with peft and transformers' Trainer.

The Trainer is Accelerate underneath: `accelerate launch` runs the same lines on one GPU, many, or with the
base sharded (profiles/accelerate). The batch size of a protocol is that of all processes together.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, set_seed

from ..files.disk import write_text
from .bases import classifier, load
from .bases.causal import Causal
from .bases.encoder import Encoder
from .bases.next_token import NextToken
from .bases.vision import Clip
from .evaluation import bfloat16_here
from .protocol import PROTOCOL, Protocol
from .tasks import Prompts, Task

Classifier = Encoder | Clip | NextToken


class HeadTrainer(Trainer):
    """Trainer whose logits are scaled products with a frozen head."""

    def __init__(self, *args, base: Classifier, head: torch.Tensor, groups: tuple[int, ...] | None, **kwargs):
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
    labelled = isinstance(task, Task)
    base = (classifier if labelled else load)(protocol.base, protocol.quantise)
    if not labelled and base.family != "causal":
        raise ValueError(f"{task.name} is no task for the base {protocol.base!r}, of the family {base.family}")
    options = {}
    if labelled:
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
        bf16=(cuda or protocol.bfloat16) and bfloat16_here(),
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
    train, held_out = (
        _Encoded(base.encode(task, split), task[split]["label"][:] if isinstance(task, Task) else None)
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
