"""Principal angles between two subspaces, and the distances and kernels that are functions of them.

A point of the Grassmannian Gr(k, n) is the span of a frame. U and UQ, Q ∈ O(k), are the same point, so no angle,
distance or kernel depends on Q.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .frames import Frames, collect64, pair64


def principal_angles(U: Tensor, V: Tensor) -> Tensor:
    """Principal angles between span U and span V: radians in [0, π/2], ascending, shape=[..., min(k, l)].

    U, shape=[..., n, k]; V, shape=[..., n, l]. Cosines are the singular values of UᵀV, sines those of the
    part of the smaller frame outside the larger span (Björck, Golub 1973). Cosines lose half the digits near
    0, sines near π/2; atan2 of both is accurate on all of [0, π/2].
    """
    A, B, dtype = pair64(U, V)
    if A.shape[-1] < B.shape[-1]:
        # The larger frame leaves the smaller span in directions that belong to no principal angle.
        A, B = B, A
    C = A.mT @ B
    sines = torch.linalg.svdvals(B - A @ C).flip(-1)  # (..., l) ascending, beside descending cosines
    return torch.atan2(sines, torch.linalg.svdvals(C)).to(dtype)


def geodesic_distance(U: Tensor, V: Tensor) -> Tensor:
    """‖θ‖₂ in radians: the length of the shortest path on Gr(k, n) (EAS §4.3, arc length)."""
    return torch.linalg.vector_norm(principal_angles(U, V), dim=-1)


def chordal_distance(U: Tensor, V: Tensor) -> Tensor:
    """‖sin θ‖₂, for k = l also ‖UUᵀ − VVᵀ‖_F / √2 (EAS §4.3 calls it the projection F-norm)."""
    return torch.linalg.vector_norm(principal_angles(U, V).sin(), dim=-1)


def projection_distance(U: Tensor, V: Tensor) -> Tensor:
    """sin θ_max, for k = l also ‖UUᵀ − VVᵀ‖₂: the projection *2-norm* of EAS §4.3, not its F-norm."""
    return principal_angles(U, V)[..., -1].sin()


def procrustes_distance(U: Tensor, V: Tensor) -> Tensor:
    """2‖sin(θ/2)‖₂, for k = l also min ‖U − VQ‖_F over Q ∈ O(k) (EAS §4.3 calls it the chordal F-norm)."""
    return 2 * torch.linalg.vector_norm((principal_angles(U, V) / 2).sin(), dim=-1)


def binet_cauchy_distance(U: Tensor, V: Tensor) -> Tensor:
    """√(1 − ∏ cos²θ), for k = l also √(1 − det(UᵀV)²) (Ye, Lim 2016)."""
    # As a sum of log(1 − sin²θ), because 1 − ∏ cos²θ cancels near 0.
    return torch.log1p(-principal_angles(U, V).sin().square()).sum(-1).expm1().neg().sqrt()


def fubini_study_distance(U: Tensor, V: Tensor) -> Tensor:
    """arccos ∏ cos θ in radians: the angle between the spans in the Plücker embedding (EAS §4.3)."""
    cosine = principal_angles(U, V).cos().prod(-1)
    return torch.atan2(binet_cauchy_distance(U, V), cosine)


_DISTANCES = {
    "geodesic": geodesic_distance,
    "chordal": chordal_distance,
    "projection": projection_distance,
    "procrustes": procrustes_distance,
    "binet_cauchy": binet_cauchy_distance,
    "fubini_study": fubini_study_distance,
}


def distance(U: Tensor, V: Tensor, kind: str = "geodesic") -> Tensor:
    """The distance named `kind` between span U and span V, shape=[...]; each is a metric on Gr(k, n).

    For k ≠ l the min(k, l) angles are used; the value is 0 when one span contains the other, so it is no
    metric then (Ye, Lim 2016). Raises ValueError for an unknown kind.
    """
    if kind not in _DISTANCES:
        raise ValueError(f"unknown distance {kind!r}; expected one of {', '.join(_DISTANCES)}")
    return _DISTANCES[kind](U, V)


def projection_kernel(U: Tensor, V: Tensor) -> Tensor:
    """‖UᵀV‖²_F = Σ cos²θ, shape=[...]; positive semidefinite, also across dimensions."""
    U64, V64, dtype = pair64(U, V)
    return (U64.mT @ V64).square().sum((-2, -1)).to(dtype)


def binet_cauchy_kernel(U: Tensor, V: Tensor) -> Tensor:
    """det(UᵀV)² = ∏ cos²θ, shape=[...]; positive semidefinite. Raises ValueError for k ≠ l."""
    U64, V64, dtype = pair64(U, V, same_dim=True)
    return torch.linalg.det(U64.mT @ V64).square().to(dtype)


def gram(frames: Frames, kernel: Callable[[Tensor, Tensor], Tensor] = projection_kernel) -> Tensor:
    """Gram matrix of kernel(Uᵢ, Uⱼ), shape=[T, T]: symmetric, and PSD to rounding if the kernel is PSD."""
    frames, _, _, dtype = collect64(frames, None, 0)
    K = torch.zeros(len(frames), len(frames), dtype=torch.float64, device=frames[0].device)
    for i, U in enumerate(frames):
        for j, V in enumerate(frames[: i + 1]):
            K[i, j] = K[j, i] = kernel(U, V)
    return K.to(dtype)
