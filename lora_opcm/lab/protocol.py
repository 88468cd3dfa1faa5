"""What is said of a training: by what protocol, and the adapter and the record that came of it."""

import hashlib
import json
import shutil
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import msgspec
from peft import PeftModel
from safetensors.torch import load_file, save_file

from ..files.disk import replacing, write_text
from .bases.causal import LLAMA_LINEAR
from .bases.encoder import BERT_LINEAR, MINILM, MPNET_LINEAR
from .bases.vision import CLIP_LINEAR
from .embedded import public_name
from .tasks import Prompts, Task

# What differs between the families of `bases`, or for one base by name; the rest of `Protocol` is shared.
DEFAULTS = {
    "encoder": {},
    "mpnet": {"target_modules": MPNET_LINEAR, "bfloat16": True},
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
    bfloat16: bool = False  # on a processor that multiplies it, too; a GPU that does always does
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


def save_adapter_half(model: PeftModel | Path | str, folder: Path | str, base: str = MINILM) -> Path:
    """Write the adapter as an ordinary PEFT folder in float16; it names its base as the hub does.

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
    text = json.dumps(config | {"base_model_name_or_path": public_name(base)}, indent=2)
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
