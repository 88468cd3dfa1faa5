"""Updates that are low-rank in another way, as the two factors they have: LoHa, LoKr, LoCon with a core (lora_mid).

    LoHa    (A₁B₁) ⊙ (A₂B₂), rank r₁r₂: products of the columns of A₁ and A₂, of the rows of B₁ and B₂
    LoKr    (A₁B₁) ⊗ (A₂B₂) = (A₁ ⊗ A₂)(B₁ ⊗ B₂), rank r₁r₂; a matrix stored whole is itself times the identity
    LoCon   up · core · down: the core and down are one down

Each A·B may have a Tucker core between them. Scales as in LyCORIS: α/r, where r is the rank of one pair, and 1 for a
LoKr of two whole matrices.
"""

import math
import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ..lowrank import LowRank
from .adapter import AdapterError
from .format import Part
from .names import canonical

HADA, LOKR = ("LoHa", "hada_"), ("LoKr", "lokr_")
ROLES = [f"{x}{y}" for x in ("hada_w1", "hada_w2", "lokr_w1", "lokr_w2") for y in ("_a", "_b")]
ROLES += ["hada_t1", "hada_t2", "lokr_w1", "lokr_w2", "lokr_t2"]
SUFFIXES = {f".{role}": Part(role) for role in ROLES}
CORE = "mid"  # the role of .lora_mid.weight
MAX_RANK, MAX_NUMBERS, MAX_TOTAL = 1024, 2**27, 2**31  # of an update, of its factors, of all factors of a file
# Convolutions of the UNets of Stable Diffusion: a file that stores in·3·3 columns flat does not say so.
KERNELS = {r"_conv[12]$|samplers_0_conv$|^conv_(in|out)$": (3, 3), r"_conv_shortcut$": (1, 1)}

Pair = tuple[Tensor, Tensor]  # (m, r), (r, n)


def kind_of(roles: Collection[str], where: str) -> str | None:
    """LoHa, LoKr, LoCon, or None for two plain factors.

    Raises
    ------
    AdapterError
        If some factors are missing, or are of two kinds.
    """
    found = set(roles) - {"alpha"}
    if found == {"up", "down", CORE}:
        return "LoCon"
    for kind, prefix in (HADA, LOKR):
        if any(role.startswith(prefix) for role in found):
            if found in _complete(prefix):
                return kind
            raise AdapterError(f"{where}: expected the factors of one {kind}, got {', '.join(sorted(found))}")
    if CORE in found:
        raise AdapterError(f"{where}: expected lora_up and lora_down beside lora_mid, got {', '.join(sorted(found))}")
    return None


def _complete(prefix: str) -> list[set[str]]:
    w = [[{f"{prefix}w{i}_a", f"{prefix}w{i}_b"}] for i in (1, 2)]
    if prefix == "hada_":
        return [w[0][0] | w[1][0], w[0][0] | w[1][0] | {"hada_t1", "hada_t2"}]
    w[0].append({"lokr_w1"})
    w[1] += [{"lokr_w2"}, w[1][0] | {"lokr_t2"}]
    return [one | two for one in w[0] for two in w[1]]


def expanded(kind: str, name: str, t: Mapping[str, Tensor], where: str) -> tuple[LowRank, tuple[int, ...], int | None]:
    """The factors of an update in float64, without its scale; its kernel; its r (None where no pair says one).

    Raises
    ------
    AdapterError
        For shapes that do not fit, and what would be of more rank, or larger, than is sensible.
    """
    t = {role: tensor.double() for role, tensor in t.items()}
    shapes = ", ".join(f"{role} {tuple(x.shape)}" for role, x in sorted(t.items()))
    wrong = AdapterError(f"{where}: {name}: the factors of this {kind} do not fit: {shapes}")
    if not all(x.numel() for x in t.values()):
        raise wrong
    if kind == "LoCon":
        if t["up"].ndim < 2 or t["down"].ndim < 2 or set(t["up"].shape[2:]) | set(t["down"].shape[2:]) - {1} > {1}:
            raise wrong
        up, down = t["up"].flatten(1), t["down"].flatten(1)
        left, right = _pair(up.mT, down, t[CORE], wrong)
        return LowRank(left, right), tuple(t[CORE].shape[2:]), down.shape[0]
    prefix = dict((HADA, LOKR))[kind]
    cores = [t.get(f"{prefix}t{i}") for i in (1, 2)]
    one, two = (
        _pair(t[f"{prefix}w{i}_a"], t[f"{prefix}w{i}_b"], core, wrong)
        if f"{prefix}w{i}_a" in t
        else _whole(t[f"{prefix}w{i}"], wrong)
        for i, core in zip((1, 2), cores, strict=True)
    )
    ranks = {t[f"{prefix}w{i}_b"].shape[0] for i in (1, 2) if f"{prefix}w{i}_b" in t}
    if len(ranks) > 1:
        raise wrong  # which of them α is divided by is not defined
    kernels = {tuple(x.shape[2:]) for x in (*cores, t.get("lokr_w2")) if x is not None and x.ndim > 2}
    if kind == "LoHa" and (one[0].shape[0], one[1].shape[1]) != (two[0].shape[0], two[1].shape[1]):
        raise wrong
    update = _product(kind, one, two, f"{where}: {name}")
    return update, kernels.pop() if kernels else _kernel(name, update.shape[1]), ranks.pop() if ranks else None


def _pair(a: Tensor, b: Tensor, core: Tensor | None, wrong: AdapterError) -> Pair:
    """(m, r) and (r, n) of a pair; with a core (r, r', *kernel) they lie as (r, m) and (r', n)."""
    if a.ndim != 2 or b.ndim != 2:
        raise wrong
    if core is None:
        if a.shape[1] != b.shape[0]:
            raise wrong
        return a, b
    if core.ndim < 3 or core.shape[:2] != (a.shape[0], b.shape[0]):
        raise wrong
    if core.shape[0] * b.shape[1] * math.prod(core.shape[2:]) > MAX_NUMBERS:
        raise wrong
    return a.mT, torch.einsum("ij...,jn->in...", core, b).flatten(1)


def _whole(w: Tensor, wrong: AdapterError) -> Pair:
    if w.ndim < 2 or min(w.shape[0], w[0].numel()) > MAX_RANK:
        raise wrong
    update = LowRank.from_dense(w.flatten(1))
    return update.left, update.right


def _product(kind: str, one: Pair, two: Pair, where: str) -> LowRank:
    (a, b), (c, d) = one, two
    hadamard = kind == "LoHa"
    m, n = (a.shape[0], b.shape[1]) if hadamard else (a.shape[0] * c.shape[0], b.shape[1] * d.shape[1])
    rank = min(a.shape[1] * c.shape[1], m, n)
    if rank > MAX_RANK or rank * (m + n) > MAX_NUMBERS:
        raise AdapterError(
            f"{where}: this {kind} is an update ({m}, {n}) of rank {rank}, which is not low;"
            f" up to {MAX_RANK} it is expanded"
        )
    if a.shape[1] * c.shape[1] > rank:
        return LowRank.from_dense((a @ b) * (c @ d) if hadamard else _kron(a @ b, c @ d))
    if hadamard:
        return LowRank((a[:, :, None] * c[:, None]).flatten(1), (b[:, None] * d[None]).flatten(0, 1))
    return LowRank(_kron(a, c), _kron(b, d))


def _kron(a: Tensor, b: Tensor) -> Tensor:
    return torch.kron(a.contiguous(), b.contiguous())  # it views its inputs


def _kernel(name: str, columns: int) -> tuple[int, ...]:
    key = canonical(name)
    found = next((kernel for pattern, kernel in KERNELS.items() if re.search(pattern, key)), ())
    return found if found and not columns % math.prod(found) else ()
