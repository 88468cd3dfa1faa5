"""Adapters: module name → `LowRank`, and what a file says besides."""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from .. import gauge
from ..lowrank import LowRank, add

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
FACTOR_DTYPES = ("F64", "F32", "F16", "BF16")


class AdapterError(ValueError):
    """An adapter that cannot be read, written or combined. The message names file, module and shapes."""


@dataclass(frozen=True)
class Kind:
    """What layer a module is, hence how its factors lie in a file.

    linear: up (m, r), down (r, n). conv: up (out, r, 1, …), down (r, in, *kernel), n = in·∏kernel.
    embedding: up (dim, r), down (r, vocabulary). expert: one of `experts` in one of the `parameters` of a module, see
    `experts`; up (out, r), down (r, in).
    """

    name: str = "linear"
    kernel: tuple[int, ...] = ()
    experts: int = field(default=0, repr=False)  # not in the text that `Adapter.id` is made of
    parameters: tuple[str, ...] = field(default=(), repr=False)


LINEAR = Kind()


@dataclass(frozen=True, eq=False, repr=False)
class Adapter(Mapping[str, LowRank]):
    """Low-rank updates of the modules of one base model, and what a file says besides.

    A mapping from module names to updates, and a vector: `a + b` and `a - b` are exact on all modules of either (a
    module that one lacks counts as zero), `c * a` scales, `-a` unlearns. See `combine` for what must agree.

    Attributes
    ----------
    modules : dict of str to LowRank
        Module name as in the base model, "encoder.layer.0.attention.self.query", to its ΔW (out, in) with the
        scaling folded in, in the orientation of nn.Linear.weight whatever the layer is: an embedding is
        (dim, vocabulary), a convolution (out, in·∏kernel). In the kohya format the names are the underscored
        ones of the file, ``lora_unet_mid_block_…``, since the dots cannot be put back without guessing.
    base_model : str, optional
        What the file calls its base model; for kohya the family (`ss_base_model_version`). Never opened.
    format : {"peft", "kohya", "diffusers"}
    kinds : dict of str to Kind
        Which modules are convolutions or embeddings; the others are linear.
    config : dict
        adapter_config.json, as it came.
    saved : dict of str to Tensor
        Full tensors that replace those of the base: `modules_to_save`, and embeddings peft wrote in full. One
        adapter carries them from file to file, unchanged in dtype; `combine` demands that all agree.
    metadata : dict of str to str
        Of the safetensors header.
    dtype : torch.dtype
        Of the file, and of what is saved unless told otherwise. An update may be wider, see `Stored`.
    source : str
        Where it was loaded from, for messages.
    dropped : dict of str to float
        Per module, the share of the squared norm that a merge's truncation cut off; empty for what was not merged. It
        is 0 of a method that cuts the sum itself, before it gives it another spectrum (`iso_c` and its kin).
    factor : float
        What the updates were multiplied by at the end of a merge, see its `scale`.
    """

    modules: dict[str, LowRank]
    base_model: str | None = None
    format: str = "peft"
    kinds: dict[str, Kind] = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    dtype: torch.dtype = None  # type: ignore[assignment]  # the widest of the factors, see __post_init__
    source: str = "adapter"
    dropped: dict[str, float] = field(default_factory=dict)
    factor: float = 1.0

    __eq__, __hash__ = object.__eq__, object.__hash__  # of tensors: identity

    def __post_init__(self):
        if self.dtype is None:
            object.__setattr__(self, "dtype", widest(u.dtype for u in self.modules.values()))

    def __repr__(self) -> str:
        ranks = sorted({u.rank for u in self.modules.values()})
        return f"Adapter({len(self.modules)} modules, rank {ranks}, {self.dtype}, {self.format}, {self.source})"

    def __getitem__(self, name: str) -> LowRank:
        return self.modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __add__(self, other: "Adapter") -> "Adapter":
        from .joint import combine, matched, shapes_of

        pair = matched([self, other], disjoint=True)
        both = {name: [a[name] for a in pair if name in a] for name in shapes_of(pair)}
        return combine(pair, {name: add(us) if len(us) > 1 else us[0] for name, us in both.items()})

    def __mul__(self, factor: float) -> "Adapter":
        if not isinstance(factor, Real):
            return NotImplemented
        return self.with_modules({name: u.wide() * float(factor) for name, u in self.modules.items()})

    __rmul__ = __mul__

    def __neg__(self) -> "Adapter":
        return self.with_modules({name: LowRank(-u.left, u.right) for name, u in self.modules.items()})

    def __sub__(self, other: "Adapter") -> "Adapter":
        return self + -other

    def norm(self) -> float:
        """Frobenius norm ‖ΔW‖_F over all modules, in float64."""
        return math.hypot(*(u.norm() for u in self.modules.values()))

    def delta(self, name: str) -> Tensor:
        """The dense ΔW of one module in the shape of its base weight, for tests and teaching.

        Transposed where the weight lies (in, out): embeddings, and linear layers if the config says
        `fan_in_fan_out`. Shaped ``(out, in, *kernel)`` for convolutions; (out, in) of one expert, as some models
        store it and others do not.
        """
        update, kind = self.modules[name], self.kinds.get(name, LINEAR)
        if kind.name == "conv":
            return update.delta().reshape(update.shape[0], -1, *kind.kernel)
        return update.delta().mT if self.transposed(name) else update.delta()

    def transposed(self, name: str) -> bool:
        """Whether the base weight of a module lies (in, out)."""
        kind = self.kinds.get(name, LINEAR).name
        return kind == "embedding" or kind == "linear" and bool(self.config.get("fan_in_fan_out"))

    def with_modules(self, modules: Mapping[str, LowRank]) -> "Adapter":
        """The same metadata with other updates."""
        config = self.config
        if set(modules) != set(self.modules):  # targets no longer say which modules; saving lists them
            config = config | {key: None for key in ("target_modules", "target_parameters") if key in config}
        return replace(self, modules=dict(modules), config=config, dropped={}, factor=1.0)

    def regauge(self, seed: int = 0) -> "Adapter":
        """The updates in a random gauge, see `gauge.regauge`: the same to rounding."""
        return gauge.regauge(self, seed)

    @cached_property
    def id(self) -> str:
        """sha256 of names, kinds, shapes, dtypes and bytes of all factors, scales folded in, and of full tensors.

        The same for every copy of a file and for every container that holds the same numbers under the same names.
        """
        found = hashlib.sha256()
        for name in sorted(self.modules):
            found.update(f"{name} {self.kinds.get(name, LINEAR)};".encode())
            for x in (self.modules[name].left, self.modules[name].right):
                _feed(found, x)
        for name in sorted(self.saved):
            found.update(f"{name};".encode())
            _feed(found, self.saved[name])
        return found.hexdigest()

    def save(self, path: str | os.PathLike, format: str | None = None, **options) -> Path:
        """Write the adapter; see `save_adapter`."""
        from .write import save_adapter

        return save_adapter(self, path, format, **options)


def _feed(found, x: Tensor) -> None:
    found.update(f"{tuple(x.shape)} {x.dtype};".encode())
    found.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # a column may have any stride


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return reduce(torch.promote_types, dict.fromkeys(dtypes)) if (dtypes := list(dtypes)) else torch.float32
