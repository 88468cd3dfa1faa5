"""The updates of a file: factors and scales of every module, checked."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..lowrank import LowRank
from ..numerics import finite
from .adapter import DTYPES, FACTOR_DTYPES, AdapterError, Kind, widest
from .expanded import MAX_TOTAL, expanded, kind_of
from .experts import Expert
from .format import Stored
from .parts import Tensors
from .refusals import and_more

NO_FACTOR = {"alpha", "embedding"}  # what `read.group` says of a module besides the keys of its factors
FP8 = {"F8_E4M3", "F8_E5M2"}  # every number of both is one of float16
NUMBERS = (*FACTOR_DTYPES, "I64", "I32")  # of an α
LARGEST = 1e38  # of a float64 factor: norms of products must not overflow
Scales = Callable[[str, Any], float] | None


def updates_of(
    tensors: Tensors,
    factors: Mapping[str, dict[str, str]],
    scales: Scales,
    only: Callable[[str], bool],
    where: str,
    experts: Mapping[str, Expert],
) -> tuple[dict[str, LowRank], dict[str, Kind], torch.dtype]:
    """The updates and the kinds of the modules that `only` holds true of, and the dtype of all in the file.

    `factors` are those of `read.group`, `scales` those of a `Format`, `experts` those of `experts.split`. Warns of what
    is read otherwise than it stands there.
    """
    products = {n: kind for n, parts in factors.items() if (kind := kind_of(set(parts) - NO_FACTOR, f"{where}: {n}"))}
    keys = list(dict.fromkeys(k for parts in factors.values() for role, k in parts.items() if role not in NO_FACTOR))
    if eight := [key for key in keys if tensors.dtype(key) in FP8]:
        warnings.warn(f"{where}: {eight[0]}{and_more(eight)}: 8-bit floats, read as float16", stacklevel=2)
    names = {"F16" if (said := tensors.dtype(key)) in FP8 else said for key in keys}
    names |= {"F32"} if products else set()  # holds every product of two half-precision numbers
    dtype = widest(t for t in DTYPES if DTYPES[t] in names & set(FACTOR_DTYPES))
    modules: dict[str, LowRank] = {}
    kinds: dict[str, Kind] = {}
    numbers = 0

    @lru_cache(maxsize=1)  # the experts of a wrapper come one after the other
    def whole(wrapper: str, expert: str) -> Stored:
        return _stored(tensors, wrapper, factors[expert], lambda *_: experts[expert].scale, where)

    for name in filter(only, factors):
        parts = factors[name]
        if name in products:
            modules[name], kernel = _product(tensors, products[name], name, parts, scales, dtype, where)
            numbers += sum(modules[name].shape) * modules[name].rank
            if numbers > MAX_TOTAL:
                raise AdapterError(f"{where}: {name}: more than {MAX_TOTAL} numbers in all once they are expanded")
        elif name in experts:
            modules[name], kernel = experts[name].of(whole(experts[name].wrapper, f"{experts[name].wrapper}.0")), ()
        else:
            modules[name] = update = _stored(tensors, name, parts, scales, where)
            kernel = tuple(update.down.shape[2:])
        if name in experts:
            kinds[name] = experts[name].kind
        elif "embedding" in parts:
            kinds[name] = Kind("embedding")
        elif kernel:
            kinds[name] = Kind("conv", kernel)
    _tell(modules, products, where)
    return modules, kinds, dtype


def _tell(modules: Mapping[str, LowRank], products: Mapping[str, str], where: str) -> None:
    alphas = {n: alpha for n, u in modules.items() if (alpha := getattr(u, "alpha", None)) is not None}
    if whole := [n for n, alpha in alphas.items() if not alpha.is_floating_point()]:
        warnings.warn(f"{where}: {whole[0]}.alpha{and_more(whole)}: stored as integers, read as numbers", stacklevel=3)
    for kind in sorted(set(products.values())):
        if some := [n for n in modules if products.get(n) == kind]:
            rank = max(modules[n].rank for n in some)
            warnings.warn(
                f"{where}: {some[0]}{and_more(some)}: {kind}, expanded: the same update as two factors of rank"
                f" {rank}{' or less' * (len(some) > 1)}",
                stacklevel=3,
            )


def _product(
    tensors: Tensors, kind: str, name: str, parts: dict[str, str], scales: Scales, dtype: torch.dtype, where: str
) -> tuple[LowRank, tuple[int, ...]]:
    """An update that is a product of several factors, and its kernel; rounded once, to `dtype`."""
    found = {role: tensor_of(tensors, key, where) for role, key in parts.items() if role not in NO_FACTOR}
    update, kernel, rank = expanded(kind, name, found, where)
    scale = 1.0  # of two whole matrices α says nothing
    if rank is not None:
        scale = _scale(tensors, name, parts, rank, scales, where)[0]
    elif scales:
        scale = scales(name, None)
    left, right = (update.left * scale).to(dtype), update.right.to(dtype)
    if not (finite(left) and finite(right)):
        raise AdapterError(f"{where}: {name}: the product of its factors overflows {dtype}")
    rounded = LowRank(left, right)
    _refuse_large(rounded, f"{where}: {name}")
    return rounded, kernel


def _stored(tensors: Tensors, name: str, parts: dict[str, str], scales: Scales, where: str) -> Stored:
    if "up" not in parts or "down" not in parts:
        raise AdapterError(f"{where}: {name}: expected two factors, got only {min(parts.values())}")
    up, down = (tensor_of(tensors, parts[role], where) for role in ("up", "down"))
    shapes = f"{where}: {name}: {parts['up']} is {tuple(up.shape)} and {parts['down']} {tuple(down.shape)}"
    if up.ndim != down.ndim or up.ndim < 2 or set(up.shape[2:]) - {1} or not up.numel() * down.numel():
        raise AdapterError(f"{shapes}, expected (m, r) and (r, n), or (out, r, 1, 1) and (r, in, h, w)")
    rank = down.shape[0]
    if up.shape[1] != rank:
        hint = " (a grouped convolution?)" if up.ndim > 2 else ""
        raise AdapterError(f"{shapes}, expected one rank, got {up.shape[1]} and {rank}{hint}")
    scale, alpha = _scale(tensors, name, parts, rank, scales, where)
    update = Stored.fold(up, down, scale, alpha)
    if scale != 1 and not finite(update.left):
        raise AdapterError(f"{where}: {name}: scale {scale:g} times {parts['up']} overflows {update.dtype}")
    _refuse_large(update, f"{where}: {name}")
    return update


def _refuse_large(update: LowRank, where: str) -> None:
    largest = max(float(x.abs().max()) for x in (update.left, update.right)) if update.dtype == torch.float64 else 0
    if largest > LARGEST:
        raise AdapterError(f"{where}: a factor holds {largest:.1e}, expected below {LARGEST:.0e}")


def _scale(
    tensors: Tensors, name: str, parts: dict[str, str], rank: int, scales: Scales, where: str
) -> tuple[float, Tensor | None]:
    """s, and α where it is in the file."""
    if "alpha" not in parts:
        return (scales(name, rank) if scales else 1.0), None
    alpha = tensor_of(tensors, parts["alpha"], where, NUMBERS)
    if alpha.numel() != 1 or not float(alpha):
        # Zero: kohya's trainer reads it as α = r, its merge script as no update at all.
        raise AdapterError(f"{where}: {name}: alpha is {alpha.tolist()}, expected one nonzero number")
    return float(alpha) / rank, alpha


def tensor_of(tensors: Tensors, key: str, where: str, expected: Iterable[str] = FACTOR_DTYPES) -> Tensor:
    """The tensor of a key, 8-bit floats as float16 where factors are expected.

    Raises
    ------
    AdapterError
        For another dtype than expected, NaN and Inf.
    """
    dtype, expected = tensors.dtype(key), list(expected)
    eight = dtype in FP8 and "F16" in expected
    if dtype not in expected and not eight:
        raise AdapterError(f"{where}: {key} is {dtype} (quantised?), expected one of {', '.join(expected)}")
    tensor = tensors[key].half() if eight else tensors[key]
    if not finite(tensor):
        raise AdapterError(f"{where}: {key} holds NaN or Inf, expected finite numbers")
    return tensor
