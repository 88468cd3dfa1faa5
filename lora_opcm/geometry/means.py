"""Means of subspaces: chordal in closed form, Karcher by iteration, and the ascent that lands on the first."""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from .angles import geodesic_distance
from .frames import Frames, Weights, collect64, frame64, random_frame
from .geodesics import exp, log, tangent

TIE = 1e-6  # relative; two directions are equally common where their eigenvalues are that near


def chordal_mean(frames: Frames, weights: Weights = None, k: int | None = None) -> Tensor:
    """Frame, shape=[n, k], of the k leading eigenvectors of Σ wᵢUᵢUᵢᵀ: it maximises Σ wᵢ‖UᵀUᵢ‖²_F.

    For equal dimensions it maximises Σ wᵢφ(U, Uᵢ) and minimises Σ wᵢ chordal_distance². From the thin SVD of
    [√w₁U₁ … √w_TU_T]; nothing n × n is formed. frames: [n, kᵢ] each, kᵢ may differ if k is given. weights:
    default equal. φ divides by min(k, kᵢ), so for mixed dimensions the weights that maximise Σ wᵢφ are
    wᵢ/min(k, kᵢ). Not unique where eigenvalues k and k+1 agree, which warns. Raises ValueError for negative
    weights, or a k larger than the number of directions the frames span.
    """
    mean, tie = most_common(frames, weights, k)
    if tie:
        warnings.warn(f"chordal_mean: {tie}", stacklevel=2)
    return mean


def most_common(frames: Frames, weights: Weights = None, k: int | None = None) -> tuple[Tensor, str]:
    """The `chordal_mean`, and what is to be said where it is not unique."""
    frames, w, k, dtype = collect64(frames, weights, k)
    stack = torch.cat([U * x**0.5 for U, x in zip(frames, w, strict=True)], dim=-1)  # (n, Σkᵢ)
    X, S, _ = torch.linalg.svd(stack, full_matrices=False)
    rank = int((S > max(1e-12, 10 * torch.finfo(dtype).eps) * S[0]).sum())
    if not 1 <= k <= rank:
        raise ValueError(f"k={k}, but the frames with positive weight span {rank} directions")
    tied = k < rank and bool(S[k - 1].square() - S[k].square() <= TIE * S[0].square())
    said = f"direction {k} is as common as the next one: which is taken is decided by rounding" if tied else ""
    return X[:, :k].to(dtype), said


def karcher_mean(
    frames: Frames, weights: Weights = None, tol: float = 1e-12, max_iter: int = 1000, starts: int = 1
) -> Tensor:
    """Frame, shape=[n, k], where Σ wᵢ geodesic_distance(U, Uᵢ)² is stationary, by U ← exp(U, Σ wᵢ log(U, Uᵢ)).

    Starts at the chordal mean, with starts > 1 also at the frames that have the least sum, and returns the lowest end.
    Done when ‖Σ wᵢ log(U, Uᵢ)‖_F <= tol (radians, weights scaled to sum 1); warns if max_iter steps do not reach that.
    Frames of one dimension. Unique if they lie in a ball of radius π/4 (Afsari 2011); beyond it there may be several
    stationary points, this need not be the lowest, and more than two frames further than π/4 from it warn.
    """
    found = stationary(frames, weights, tol, max_iter, starts)
    if found.gradient > tol:
        warnings.warn(f"karcher_mean: gradient {found.gradient:.1e} > {tol:.1e} after {max_iter} steps", stacklevel=2)
    if found.far:
        text = "karcher_mean: frames lie further than π/4 from it, other starts may end elsewhere (starts=…)"
        warnings.warn(text, stacklevel=2)
    return found.frame


class Stationary(NamedTuple):
    """Where the iteration for a Karcher mean ended: the frame, the gradient there, and whether another may be lower."""

    frame: Tensor
    gradient: float
    far: bool


def stationary(frames: Frames, weights: Weights, tol: float, max_iter: int, starts: int) -> Stationary:
    """`karcher_mean`, which says the same in warnings."""
    frames, w, _, dtype = collect64(frames, weights, None)
    if not 1 <= starts <= len(frames) + 1:
        raise ValueError(f"expected 1 <= starts <= {len(frames) + 1}, the chordal mean and the frames, got {starts}")
    stack = torch.stack(list(frames))  # (T, n, k)
    share = torch.tensor(w, dtype=stack.dtype, device=stack.device) / sum(w)

    def cost(U: Tensor) -> float:
        return float((share * geodesic_distance(U, stack).square()).sum())

    others = sorted(frames, key=cost) if starts > 1 else ()  # by what they are, so that their order does not matter
    ends = [_karcher(U, stack, share, tol, max_iter) for U in [most_common(frames, w)[0], *others][:starts]]
    U, gradient = min(ends, key=lambda end: cost(end[0]))
    far = len(frames) > 2 and bool(geodesic_distance(U, stack[share > 0]).max() > math.pi / 4)
    return Stationary(U.to(dtype), gradient, far)


def _karcher(U: Tensor, stack: Tensor, share: Tensor, tol: float, max_iter: int) -> tuple[Tensor, float]:
    """Where the iteration from U ends, shape=[n, k], and the gradient there."""
    for _ in range(max_iter):
        H = (share[:, None, None] * log(U, stack)).sum(0)
        if H.norm() <= tol:
            break
        U = exp(U, H)
    return U, float(H.norm())


def ascend_phi(
    frames: Frames, weights: Weights = None, k=None, steps=500, step_size=1.0, start=None, generator=None
) -> tuple[Tensor, Tensor]:
    """Riemannian gradient ascent on Σ wᵢφ(U, Uᵢ): (frame, shape=[n, k]; objective, shape=[steps + 1]).

    Default weights 1/T. The gradient is the horizontal part of the Euclidean one (EAS eq. 2.70); each step
    follows `exp`. step_size is in units of 1/L, L = 2λ₁ a bound on the second derivative along geodesics: up
    to 1 the objective never falls. From almost every start (default: random, by generator) it converges to
    the chordal mean with weights wᵢ/min(k, kᵢ), by a factor of about 1 − (λ_k − λ_{k+1})/λ₁ a step.
    """
    frames, w, k, dtype = collect64(frames, weights, k)
    scaled = [U * (x / min(k, U.shape[-1])) ** 0.5 for U, x in zip(frames, w, strict=True)]
    Z = torch.cat(scaled, dim=-1)  # (n, Σkᵢ), objective ‖ZᵀU‖²_F
    rate = step_size / (2 * torch.linalg.matrix_norm(Z, 2) ** 2)
    if start is None:
        start = random_frame(Z.shape[0], k, generator=generator, dtype=Z.dtype).to(Z.device)
    U = frame64(start)
    if U.shape != (Z.shape[0], k):
        raise ValueError(f"expected a start of shape {(Z.shape[0], k)}, got {tuple(U.shape)}")
    history = [(Z.mT @ U).square().sum()]
    for _ in range(steps):
        U = exp(U, rate * tangent(U, 2 * Z @ (Z.mT @ U)))
        history.append((Z.mT @ U).square().sum())
    return U.to(dtype), torch.stack(history).to(dtype)
