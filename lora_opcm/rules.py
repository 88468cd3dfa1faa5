"""Merge rules: what each method does to the updates of one module.

Rules on a `Core` see float64 cores Cₜ (p, q) in shared coordinates and return the merged core (p, q); they
commute with orthonormal changes of those coordinates, so that running them there is exact. Rules on dense
matrices look at single entries, do not commute, and must form ΔW. `weights` are already multiplied in.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .core import Core
from .grassmann import chordal_mean as chordal_frame
from .grassmann import karcher_mean as karcher_frame
from .lowrank import LowRank, nonzero_svd
from .opcm import stream
from .options import check
from .sums import Sums

# -- entry by entry ------------------------------------------------------------------------------------------


def trim(x: Tensor, density: float) -> Tensor:
    """Keep the share `density` of entries of largest magnitude, ties included."""
    if density >= 1 or not x.numel():
        return x
    keep = max(1, round(density * x.numel()))
    threshold = x.abs().flatten().kthvalue(x.numel() - keep + 1).values
    return torch.where(x.abs() >= threshold, x, 0)


def drop(x: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each entry with probability `density` and rescale by 1/density."""
    keep = torch.rand(x.shape, generator=generator, dtype=torch.float64) < density
    return x * keep.to(x) / density


def elect(parts: Sequence[Tensor]) -> Tensor:
    """Per entry, the mean of the nonzero values that have the sign of the sum."""
    stack = torch.stack(list(parts))
    agree = (stack * stack.sum(0).sign()) > 0
    return (stack * agree).sum(0) / agree.sum(0).clamp_min(1)


# -- sums ----------------------------------------------------------------------------------------------------


def cat(core: Core) -> Tensor:
    """Σ Cₜ, exact."""
    return sum(core.cores)


def mean(core: Core) -> Tensor:
    """(1/T) Σ Cₜ."""
    return sum(core.cores) / len(core.factors)


def task_arithmetic(core: Core, scale: float = 1.0) -> Tensor:
    """scale · Σ Cₜ."""
    return scale * sum(core.cores)


def svd(core: Core, scale: float = 1.0) -> Tensor:
    """scale · Σ Cₜ, cut to the largest rank among the adapters."""
    u, s, vh = nonzero_svd(scale * sum(core.cores), core.dtype)
    k = max(f.rank for f in core.factors)
    return (u[:, :k] * s[:k]) @ vh[:k]


# -- spectra and frames --------------------------------------------------------------------------------------


def polar(x: Tensor) -> Tensor:
    """U Vᵀ of the thin SVD: the nearest matrix with orthonormal columns (or rows); shape of `x`.

    Only nonzero singular directions take part. Where columns depend on each other, as with an adapter given
    twice, the rest of a full SVD is an arbitrary basis, and the result would depend on the gauge.
    """
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    k = int((s > 1e-6 * s[:1]).sum())
    return u[:, :k] @ vh[:k]


def tsv(core: Core, directions: int | None = None, scale: float = 1.0) -> Tensor:
    """Stack the leading singular frames of all tasks, whiten both stacks, put the spectra back."""
    frames = [(u[:, :directions], s[:directions], vh[:directions]) for u, s, vh in core.frames()]
    u, s, v = (torch.cat(parts, dim=-1) for parts in zip(*[(u, s, vh.mT) for u, s, vh in frames]))
    return scale * (polar(u) * s) @ polar(v).mT


def iso_c(core: Core, scale: float = 1.0) -> Tensor:
    """The sum with its nonzero spectrum made flat: U σ̄ Vᵀ, σ̄ the mean singular value."""
    u, s, vh = nonzero_svd(sum(core.cores), core.dtype)
    return scale * (s.mean() if len(s) else 0.0) * u @ vh


def iso_cts(core: Core, common: float = 0.8, scale: float = 1.0) -> Tensor:
    """Iso-C on the leading share `common` of the sum's directions and the leading residual ones of each task."""
    cores = core.cores
    u, s, vh = nonzero_svd(sum(cores), core.dtype)
    each = round((1 - common) * len(s) / len(cores))
    each = min(each, len(s) // len(cores))
    k = len(s) - each * len(cores)
    left, spectrum, right = [u[:, :k]], [s[:k]], [vh[:k].mT]
    for c in cores if each else []:
        ut, st, vt = nonzero_svd(c - u[:, :k] @ (u[:, :k].mT @ c), core.dtype)
        left.append(ut[:, :each])
        spectrum.append(st[:each])
        right.append(vt[:each].mT)
    mean = torch.cat(spectrum).mean() if len(s) else 0.0
    return scale * mean * polar(torch.cat(left, 1)) @ polar(torch.cat(right, 1)).mT


def opcm(core: Core, alpha: float = 0.5, variant: str = "paper", scale: str | float = "norm") -> Tensor:
    """One adapter at a time: Σ P_t(Cₜ), each projected off what is there; see `lora_opcm.opcm`."""
    if scale == "norm":
        raise ValueError("scale='norm' needs the whole adapter: call it through `merge`")
    return float(scale) * stream(core, alpha, variant)


def whitening(core: Core, scale: float = 1.0) -> Tensor:
    """One adapter at a time: whiten [U_state U_new] and [V_state V_new], stack the spectra."""
    left, spectrum, right = core.frames()[0]
    right = right.mT
    for u, s, vh in core.frames()[1:]:
        left, right = polar(torch.cat([left, u], 1)), polar(torch.cat([right, vh.mT], 1))
        spectrum = torch.cat([spectrum, s])
    return scale * (left * spectrum) @ right.mT


def whitened_sum(core: Core, power: float = 0.5, cap: int | None = None, scale: float = 1.0) -> Tensor:
    """L^{-1/2} S R^{-1/2} from three running sums; TSV at power 0. See `lora_opcm.sums`."""
    sums = Sums.empty(*core.cores[0].shape)
    for frames in core.frames():
        sums = sums.add(frames, power, cap)
    return scale * sums.left @ sums.core() @ sums.right.mT


# -- subspaces -----------------------------------------------------------------------------------------------


def onto(core: Core, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale · UUᵀ (Σ Cₜ) VVᵀ for frames U (p, k), V (q, k)."""
    return scale * left @ (left.mT @ sum(core.cores) @ right) @ right.mT


def leading(core: Core, k: int | None, common: bool) -> tuple[list[tuple[Tensor, Tensor, Tensor]], int]:
    """The thin SVDs of the cores that are not zero, and k, their largest rank unless given.

    With `common` it is cut to the directions that all of them have.
    """
    frames = [f for f in core.frames() if len(f[1])]
    ranks = [len(s) for _, s, _ in frames]
    k = k or max(ranks, default=0)
    return frames, min([k, *ranks]) if common else k


def chordal_mean(core: Core, k: int | None = None, scale: float = 1.0) -> Tensor:
    """The sum, seen through the chordal means of the output and of the input subspaces."""
    frames, k = leading(core, k, common=False)
    if not frames:
        return torch.zeros_like(core.cores[0])
    share = [1 / min(k, len(s)) for _, s, _ in frames]  # of mixed ranks, so that Σ φ is what is maximised
    left = chordal_frame([u for u, _, _ in frames], weights=share, k=k)
    return onto(core, left, chordal_frame([vh.mT for _, _, vh in frames], weights=share, k=k), scale)


def karcher_mean(core: Core, k: int | None = None, scale: float = 1.0) -> Tensor:
    """As `chordal_mean`, with the means of squared geodesic distance; k directions of every task.

    Iterates to a gradient of 1e-6 at most 100 times: subspaces of unrelated adapters are nearly orthogonal,
    far outside the ball where the mean is unique, and the iteration then creeps.
    """
    frames, k = leading(core, k, common=True)
    if not frames:
        return torch.zeros_like(core.cores[0])
    left = karcher_frame([u[:, :k] for u, _, _ in frames], tol=1e-6, max_iter=100)
    right = karcher_frame([vh[:k].mT for _, _, vh in frames], tol=1e-6, max_iter=100)
    return onto(core, left, right, scale)


def ctm(
    core: Core, k: int | None = None, rule: str = "sum", density: float = 0.5, scale: float = 1.0
) -> Tensor:
    """Compress, then merge: shared k-dimensional subspaces of most energy, then a rule on k×k coordinates."""
    check(rule=rule)
    k = k or max(f.rank for f in core.factors)
    left, parts, right = canonical(core)
    left, parts, right = left[:, :k], [c[:k, :k] for c in parts], right[:, :k]
    merged = sum(parts) if rule == "sum" else elect([trim(c, density) for c in parts])
    return scale * left @ merged @ right.mT


def quotient_mean(core: Core, k: int | None = None, scale: float = 1.0, steps: int = 50) -> Tensor:
    """Fréchet mean of balanced factors [U√Σ; V√Σ] modulo O(k): align all to the mean, average, repeat."""
    frames, k = leading(core, k, common=True)
    if not frames:
        return torch.zeros_like(core.cores[0])
    p = core.cores[0].shape[0]
    points = [torch.cat([u[:, :k], vh[:k].mT]) * s[:k].sqrt() for u, s, vh in frames]
    # A start that does not depend on the order of the adapters: the balanced factors of their plain mean.
    u, s, vh = torch.linalg.svd(sum(core.cores) / len(core.factors), full_matrices=False)
    mean = torch.cat([u[:, :k], vh[:k].mT]) * s[:k].sqrt()
    for _ in range(steps):
        new = sum(x @ polar(x.mT @ mean) for x in points) / len(core.factors)
        moved = float((new - mean).norm() / new.norm())
        mean = new
        if moved < 1e-12:
            break
    return scale * mean[:p] @ mean[p:].mT


# -- entries of the core, in a basis that no gauge and no order can move --------------------------------------


def canonical(core: Core) -> tuple[Tensor, list[Tensor], Tensor]:
    """The cores between the singular bases of [C₁ … C_T] and [C₁; …; C_T]; unique up to signs."""
    cores = core.cores
    left = nonzero_svd(torch.cat(cores, 1), core.dtype)[0]
    right = nonzero_svd(torch.cat([c.mT for c in cores], 1), core.dtype)[0]
    return left, [left.mT @ c @ right for c in cores], right


def core_ties(core: Core, density: float = 0.5, scale: float = 1.0) -> Tensor:
    """TIES on the entries of the cores."""
    left, parts, right = canonical(core)
    return scale * left @ elect([trim(c, density) for c in parts]) @ right.mT


def core_dare_ties(core: Core, density: float = 0.5, scale: float = 1.0, seed: int = 0) -> Tensor:
    """DARE, then sign election, on the entries of the cores."""
    generator = torch.Generator().manual_seed(seed)
    left, parts, right = canonical(core)
    return scale * left @ elect([drop(c, density, generator) for c in parts]) @ right.mT


def knots_ties(core: Core, density: float = 0.5, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """[ΔW₁ … ΔW_T] = U Σ [V₁ᵀ … V_Tᵀ]; TIES on the entries of the Vₜ, in the coordinates of the layer's inputs.

    Returns UΣ (p, k) in the core and the merged V (n, k) outside it: it cannot be lifted by rotation.
    """
    cores = core.cores
    u, s, vh = nonzero_svd(torch.cat(cores, 1), core.dtype)
    parts = [core.right @ block.mT for block in vh.split(cores[0].shape[1], dim=1)]
    return scale * u * s, elect([trim(v, density) for v in parts])


# -- dense ---------------------------------------------------------------------------------------------------


def ties(deltas: list[Tensor], density: float = 0.2, scale: float = 1.0) -> Tensor:
    """Trim small entries (per module, as peft does; the paper trims the whole task vector), elect, average."""
    return scale * elect([trim(d, density) for d in deltas])


def dare(deltas: list[Tensor], density: float = 0.5, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Drop entries at random, rescale the rest, add."""
    generator = torch.Generator().manual_seed(seed)
    return scale * sum(drop(d, density, generator) for d in deltas)


def dare_ties(deltas: list[Tensor], density: float = 0.5, scale: float = 1.0, seed: int = 0) -> Tensor:
    """DARE, then sign election."""
    generator = torch.Generator().manual_seed(seed)
    return scale * elect([drop(d, density, generator) for d in deltas])


def magnitude_prune(deltas: list[Tensor], density: float = 0.5, scale: float = 1.0) -> Tensor:
    """Trim small entries, add."""
    return scale * sum(trim(d, density) for d in deltas)


def dense(update: Tensor) -> LowRank:
    """A dense matrix (m, n) as factors of rank min(m, n)."""
    m, n = update.shape
    if m <= n:
        return LowRank(torch.eye(m, dtype=update.dtype, device=update.device), update)
    return LowRank(update, torch.eye(n, dtype=update.dtype, device=update.device))
