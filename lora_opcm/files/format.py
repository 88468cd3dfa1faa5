"""What a file format is: which tensor is which factor of a module, how it lies there, and what its scale is."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..lowrank import LowRank, rounded
from .adapter import LINEAR, Adapter, AdapterError

INPUTS = "lora_opcm"  # the key in a header under which a merge says what it was made of
# key -> (tensor, dtype to write it in); metadata of the header
Contents = tuple[dict[str, tuple[Tensor, torch.dtype]], dict[str, str]]


@dataclass(frozen=True)
class Part:
    """What a key's suffix says: "up" or "down", and whether the layer is an embedding."""

    role: str
    embedding: bool = False


@dataclass(frozen=True)
class Format:
    """A format that adapters are read from and written to.

    Attributes
    ----------
    suffixes : mapping of str to Part
        The ends of its keys; what stands before one is the name of the module.
    names : callable(adapter) -> dict
        Module → its name in a file of this format. AdapterError where it has none.
    contents : callable(adapter, names, dtype) -> Contents
        What to write. `factors_of` and `size_of` say how an update lies in a file.
    scales : callable(metadata, modules, where) -> (callable(module, rank) -> float) or None
        The scales that a header says; None where each module's `.alpha` does, or s = 1.
    """

    name: str
    suffixes: Mapping[str, Part]
    names: Callable[[Adapter], dict[str, str]]
    contents: Callable[[Adapter, Mapping[str, str], torch.dtype | None], Contents]
    scales: Callable[[Mapping[str, str], Iterable[str], str], Callable[[str, int], float] | None]


def no_names(format: str, adapter: Adapter) -> AdapterError:
    """The error of a format that cannot name the modules of an adapter."""
    return AdapterError(
        f"{adapter.source} has {adapter.format} names, which do not say those of {format!r}; expected the same"
        " format, PEFT or diffusers names for kohya, PEFT names for diffusers, or kohya names that an adapter of the"
        " same model translates (`renamed`, `lora-opcm convert --like`)"
    )


@dataclass(frozen=True, eq=False)
class Stored(LowRank):
    """A `LowRank` as it came from a file, which still knows its bytes, so that saving it loses nothing.

    `left` is s·up and `right` is down, as matrices. Half precision factors stay what they are where s·up is
    exact in them (s a power of two, as a rule), and are float32 here otherwise. Every operation on it gives a
    plain `LowRank`.

    Attributes
    ----------
    up, down : Tensor
        As in the file: shape (a convolution's is 4-dimensional) and dtype.
    scale : float
        s.
    alpha : Tensor, optional
        kohya's scalar, as in the file.
    """

    up: Tensor
    down: Tensor
    scale: float
    alpha: Tensor | None = None

    @classmethod
    def fold(cls, up: Tensor, down: Tensor, scale: float, alpha: Tensor | None = None) -> "Stored":
        left, right = up.reshape(up.shape[0], -1), down.reshape(down.shape[0], -1)
        dtype = torch.promote_types(left.dtype, right.dtype)
        if scale != 1:
            folded = left.to(dtype) * scale
            if dtype in (torch.float16, torch.bfloat16):
                wide = left.float() * scale
                if not torch.equal(folded.float(), wide):
                    folded, dtype = wide, torch.float32
            left = folded
        return cls(left.to(dtype), right.to(dtype), up, down, scale, alpha)


def folded(adapter: Adapter) -> Adapter:
    """With the scales in the factors that were stored beside them: a reader of tensors alone scales them right."""
    return replace(adapter, modules={name: LowRank(u.left, u.right) for name, u in adapter.items()})


def size_of(update: LowRank) -> tuple[int, float]:
    """(rank, scale) in a file. An update that is zero has no direction left, but no loader takes rank 0."""
    return max(update.rank, 1), getattr(update, "scale", 1.0)


def factors_of(
    adapter: Adapter, name: str, dtype: torch.dtype | None
) -> tuple[tuple[Tensor, torch.dtype], tuple[Tensor, torch.dtype]]:
    """(up, its dtype) and (down, its dtype), in the shapes of a file."""
    update, kernel = adapter.modules[name], adapter.kinds.get(name, LINEAR).kernel
    if isinstance(update, Stored):
        up, down = update.up, update.down
        if dtype is not None:
            wide = torch.promote_types(up.dtype, down.dtype)
            flat = _unfaded(LowRank(up.to(wide).reshape(len(up), -1), down.to(wide).reshape(len(down), -1)), dtype)
            up, down = flat.left.reshape(up.shape), flat.right.reshape(down.shape)
        return (up, dtype or up.dtype), (down, dtype or down.dtype)
    dtype = dtype or adapter.dtype
    update = _unfaded(update, dtype)
    up, down = update.left, update.right
    if not update.rank:
        up, down = up.new_zeros(up.shape[0], 1), down.new_zeros(1, down.shape[1])
    if kernel:
        up, down = up.reshape(*up.shape, *[1] * len(kernel)), down.reshape(down.shape[0], -1, *kernel)
    return (up, dtype), (down, dtype)


def _unfaded(update: LowRank, dtype: torch.dtype) -> LowRank:
    """The update, `rounded` to a dtype where a column would lose more than its last bit: too small or large for it."""
    if torch.promote_types(update.dtype, dtype) == dtype:  # which holds all numbers of the other: nothing to look at
        return update
    for x in (update.left, update.right.mT):
        lost, size = (torch.linalg.vector_norm(y, dim=0, dtype=torch.float64) for y in (x.to(dtype).to(x.dtype) - x, x))
        if not bool((lost <= torch.finfo(dtype).eps * size).all()):
            return rounded(update, dtype)
    return update
