"""Subspaces: frames, principal angles, distances, φ and its null, geodesics, means, kernels.

A point of the Grassmannian Gr(k, n) is the span of a frame: a tensor U, shape=[..., n, k], with UᵀU = I.
U and UQ, Q ∈ O(k), are the same point, so no distance, φ or kernel depends on Q. Frames stand in columns.

Everything is computed in float64 on frames orthonormalised again in float64, because a float32 frame is
orthonormal only to 1e-7, and returned in the dtype of the inputs (the wider of two). What is not a frame
raises ValueError or TypeError.

Sources, by the names used below:
- Björck, Golub, "Numerical methods for computing angles between linear subspaces", Math. Comp. 1973
- EAS: Edelman, Arias, Smith, "The geometry of algorithms with orthogonality constraints", SIMAX 1998
- Bendokat, Zimmermann, Absil, "A Grassmann manifold handbook", 2020 (arXiv 2011.13699)
- Ye, Lim, "Schubert varieties and distances between subspaces of different dimensions", SIMAX 2016
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from .lowrank import LowRank

Frames = Sequence[Tensor]
Weights = Sequence[float] | None
Update = LowRank | Tensor


def orthonormalise(x: Tensor) -> Tensor:
    """Frame with the span of the columns of x, shape=[..., n, k], by QR with diag(R) > 0.

    A frame comes back as it is, and the first j columns keep their span, for every j. Raises ValueError where
    a column depends on those before it, to ten times the rounding of x: QR would put an arbitrary direction there.
    """
    x64 = _columns(x)
    Q, R = torch.linalg.qr(x64)
    R = R.diagonal(dim1=-2, dim2=-1)  # (..., k)
    eps = max(torch.finfo(x.dtype).eps, torch.finfo(R.dtype).eps * x.shape[-2])
    noise = 10 * eps * torch.linalg.vector_norm(x64, dim=-2)
    if not (R.abs() > noise).all():
        raise ValueError(f"columns are linearly dependent or not finite, shape {tuple(x.shape)}")
    return (Q * R.sign()[..., None, :]).to(x.dtype)


def random_frame(
    n: int, k: int, *, batch=(), generator: Generator | None = None, dtype=torch.float32
) -> Tensor:
    """Frame uniform (Haar) on the Stiefel manifold, shape=[..., n, k]; its span is uniform on Gr(k, n).

    Drawn in float64, then cast: a seed gives the same subspace in every dtype.
    """
    device = None if generator is None else generator.device
    x = torch.randn(*batch, n, k, generator=generator, dtype=torch.float64, device=device)
    return orthonormalise(x).to(dtype)


def projector(U: Tensor) -> Tensor:
    """Orthogonal projector UUᵀ onto span U, shape=[..., n, n]. Forms n × n: for tests and teaching."""
    U64 = _frame(U)
    return (U64 @ U64.mT).to(U.dtype)


def principal_angles(U: Tensor, V: Tensor) -> Tensor:
    """Principal angles between span U and span V: radians in [0, π/2], ascending, shape=[..., min(k, l)].

    U, shape=[..., n, k]; V, shape=[..., n, l]. Cosines are the singular values of UᵀV, sines those of the
    part of the smaller frame outside the larger span (Björck, Golub 1973). Cosines lose half the digits near
    0, sines near π/2; atan2 of both is accurate on all of [0, π/2].
    """
    A, B, dtype = _pair(U, V)
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


def phi(x: Update, y: Update, k: int | None = None, l: int | None = None, side: str = "left") -> Tensor:
    """Similarity φ = ‖UᵀV‖²_F / min(k, l): the mean squared cosine of the principal angles, in [0, 1].

    x, y: a LowRank, or a frame, shape=[..., n, k]. From a LowRank come its k (l for y) leading left singular
    vectors, or right ones for side="right"; from a frame its first k columns, whatever the side. None takes
    all. Where σ_k = σ_{k+1} the update does not determine its k leading vectors. Read φ beside `phi_null`.
    Raises ValueError for more directions than there are, a zero update, unequal n, or another side.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    U, V, dtype = _pair(_leading(x, k, side, "x", "k"), _leading(y, l, side, "y", "l"))
    value = (U.mT @ V).square().sum((-2, -1)) / min(U.shape[-1], V.shape[-1])
    return value.clamp(0, 1).to(dtype)


class PhiNull(NamedTuple):
    """Mean and standard deviation of φ between independent uniform subspaces."""

    mean: float
    std: float


def phi_null(n: int, k: int, l: int) -> PhiNull:
    """Exact mean max(k, l)/n and standard deviation of φ for independent uniform subspaces of Rⁿ.

    For P = UUᵀ, Q = VVᵀ, X = tr PQ: E X = kl/n and Var X = 2kl(n−k)(n−l) / (n²(n−1)(n+2)). By invariance
    E Q_ij Q_pq = a δ_ij δ_pq + b (δ_ip δ_jq + δ_iq δ_jp), so E X² = ak² + 2bk; the traces tr Q = tr Q² = l
    give an² + 2bn = l² and an + bn(n+1) = l.
    """
    if not (1 <= k <= n and 1 <= l <= n):
        raise ValueError(f"expected 1 <= k, l <= n, got n={n}, k={k}, l={l}")
    variance = 2 * k * l * (n - k) * (n - l) / (n**2 * max(n - 1, 1) * (n + 2))
    return PhiNull(max(k, l) / n, math.sqrt(variance) / min(k, l))


def phi_pvalue(value: Tensor | float, n: int, k: int, l: int) -> Tensor:
    """P(φ >= value) for independent uniform subspaces, float64, in the shape of value. Needs scipy.

    The Beta law with the moments of `phi_null` where φ can lie, [max(0, k+l−n)/min(k, l), 1]. Exact if one of
    k, l, n−k, n−l is 1: for k = 1, φ ~ Beta(l/2, (n−l)/2). Otherwise an approximation: in Monte Carlo for
    n >= 64 and k, l <= n/2 right to about a tenth at p = 0.01 and to a half at 0.001. Further out read it as
    "far outside the null", no more. Small n is worse: for k = l = 2, n = 4 it says 0.0025 for 0.01.
    """
    from scipy.special import betainc

    mean, std = phi_null(n, k, l)
    low = max(0, k + l - n) / min(k, l)
    value = torch.as_tensor(value, dtype=torch.float64)
    if std == 0:
        return torch.ones_like(value)
    mu, var = (mean - low) / (1 - low), (std / (1 - low)) ** 2
    total = mu * (1 - mu) / var - 1
    above = ((1 - value) / (1 - low)).clamp(0, 1).detach().cpu().numpy()
    return torch.as_tensor(betainc((1 - mu) * total, mu * total, above), dtype=torch.float64)


def tangent(U: Tensor, Z: Tensor) -> Tensor:
    """Horizontal part (I − UUᵀ)Z of Z, shape=[..., n, k]; tangent vectors at U are the H with UᵀH = 0."""
    U64, Z64 = _frame(U), Z.double()
    return (Z64 - U64 @ (U64.mT @ Z64)).to(torch.promote_types(U.dtype, Z.dtype))


def exp(U: Tensor, H: Tensor) -> Tensor:
    """Frame reached at time 1 by the geodesic from U with velocity H, shape=[..., n, k] (EAS theorem 2.3).

    With H = QΣWᵀ it is UW cos Σ Wᵀ + Q sin Σ Wᵀ. A part of H inside span U would turn the frame without
    moving the span, and is dropped.
    """
    U64 = _frame(U)
    Q, S, Wh = torch.linalg.svd(tangent(U64, H), full_matrices=False)
    V = (U64 @ Wh.mT * S.cos()[..., None, :] + Q * S.sin()[..., None, :]) @ Wh
    return V.to(torch.promote_types(U.dtype, H.dtype))


def log(U: Tensor, V: Tensor) -> Tensor:
    """Velocity H at U, shape=[..., n, k], of the shortest geodesic to span V: exp(U, H) spans V.

    UᵀH = 0 and ‖H‖_F is the geodesic distance. With UᵀV = XCYᵀ, C = cos θ: H = (VY − UXC) diag(θ/sin θ) Xᵀ,
    the algorithm of Bendokat, Zimmermann, Absil 2020, §5.2, where θ/sin θ, a smooth function of C, replaces
    a second SVD and its arcsin: tiny, equal and nearly right angles cost no accuracy. ValueError for k ≠ l.
    Cut locus: at an angle of π/2 there are several shortest geodesics; one is returned, chosen by rounding.
    """
    U64, V64, dtype = _pair(U, V, same_dim=True)
    X, C, Yh = torch.linalg.svd(U64.mT @ V64)
    ratio = 1 / torch.sinc(C.clamp(max=1).arccos() / math.pi)
    H = tangent(U64, (V64 @ Yh.mT - U64 @ X * C[..., None, :]) * ratio[..., None, :])
    return (H @ X.mT).to(dtype)


def geodesic(U: Tensor, V: Tensor, t: Tensor | float) -> Tensor:
    """Frame at time t on the shortest geodesic from U (t = 0) to span V (t = 1), shape=[..., n, k].

    t is a number or a tensor, whose shape leads that of the result. At t = 1 the frame is align(V, U).
    """
    U64, V64, dtype = _pair(U, V, same_dim=True)
    t = torch.as_tensor(t, dtype=torch.float64, device=U.device)[..., None, None]
    return exp(U64, t * log(U64, V64)).to(dtype)


def procrustes(U: Tensor, V: Tensor) -> Tensor:
    """Q, shape=[..., l, k], that minimises ‖U − VQ‖_F: the polar factor of VᵀU (Schönemann 1966).

    U, shape=[..., n, k]; V, shape=[..., n, l]. For k = l, Q ∈ O(k), reflections included; for l > k its
    columns are orthonormal, for l < k its rows. Not unique where a principal angle is π/2.
    """
    U64, V64, dtype = _pair(U, V)
    X, _, Yh = torch.linalg.svd(V64.mT @ U64, full_matrices=False)
    return (X @ Yh).to(dtype)


def align(V: Tensor, to: Tensor) -> Tensor:
    """V Q with Q = procrustes(to, V): for k = l the frame of span V nearest to the frame `to`."""
    V64, to64, dtype = _pair(V, to)
    return (V64 @ procrustes(to64, V64)).to(dtype)


def chordal_mean(frames: Frames, weights: Weights = None, k: int | None = None) -> Tensor:
    """Frame, shape=[n, k], of the k leading eigenvectors of Σ wᵢUᵢUᵢᵀ: it maximises Σ wᵢ‖UᵀUᵢ‖²_F.

    For equal dimensions it maximises Σ wᵢφ(U, Uᵢ) and minimises Σ wᵢ chordal_distance². From the thin SVD of
    [√w₁U₁ … √w_TU_T]; nothing n × n is formed. frames: [n, kᵢ] each, kᵢ may differ if k is given. weights:
    default equal. φ divides by min(k, kᵢ), so for mixed dimensions the weights that maximise Σ wᵢφ are
    wᵢ/min(k, kᵢ). Not unique where eigenvalues k and k+1 agree. Raises ValueError for negative weights, or a
    k larger than the number of directions the frames span.
    """
    frames, w, k, dtype = _collect(frames, weights, k)
    stack = torch.cat([U * x**0.5 for U, x in zip(frames, w, strict=True)], dim=-1)  # (n, Σkᵢ)
    X, S, _ = torch.linalg.svd(stack, full_matrices=False)
    rank = int((S > max(1e-12, 10 * torch.finfo(dtype).eps) * S[0]).sum())
    if not 1 <= k <= rank:
        raise ValueError(f"k={k}, but the frames with positive weight span {rank} directions")
    return X[:, :k].to(dtype)


def karcher_mean(frames: Frames, weights: Weights = None, tol: float = 1e-12, max_iter: int = 1000) -> Tensor:
    """Frame, shape=[n, k], that minimises Σ wᵢ geodesic_distance(U, Uᵢ)², by U ← exp(U, Σ wᵢ log(U, Uᵢ)).

    Starts at the chordal mean; done when ‖Σ wᵢ log(U, Uᵢ)‖_F <= tol (radians, weights scaled to sum 1), and
    warns if max_iter steps do not reach that. Frames of one dimension. Unique if they lie in a ball of radius
    π/4 (Afsari 2011); beyond it, a stationary point.
    """
    frames, w, _, dtype = _collect(frames, weights, None)
    U, stack = chordal_mean(frames, w), torch.stack(frames)  # (n, k), (T, n, k)
    share = torch.tensor(w, dtype=U.dtype, device=U.device) / sum(w)
    for _ in range(max_iter):
        H = (share[:, None, None] * log(U, stack)).sum(0)
        if H.norm() <= tol:
            return U.to(dtype)
        U = exp(U, H)
    warnings.warn(f"karcher_mean: gradient {H.norm():.1e} > {tol:.1e} after {max_iter} steps", stacklevel=2)
    return U.to(dtype)


def ascend_phi(
    frames: Frames, weights: Weights = None, k=None, steps=500, step_size=1.0, start=None, generator=None
) -> tuple[Tensor, Tensor]:
    """Riemannian gradient ascent on Σ wᵢφ(U, Uᵢ): (frame, shape=[n, k]; objective, shape=[steps + 1]).

    Default weights 1/T. The gradient is the horizontal part of the Euclidean one (EAS eq. 2.70); each step
    follows `exp`. step_size is in units of 1/L, L = 2λ₁ a bound on the second derivative along geodesics: up
    to 1 the objective never falls. From almost every start (default: random, by generator) it converges to
    the chordal mean with weights wᵢ/min(k, kᵢ), by a factor of about 1 − (λ_k − λ_{k+1})/λ₁ a step.
    """
    frames, w, k, dtype = _collect(frames, weights, k)
    scaled = [U * (x / min(k, U.shape[-1])) ** 0.5 for U, x in zip(frames, w, strict=True)]
    Z = torch.cat(scaled, dim=-1)  # (n, Σkᵢ), objective ‖ZᵀU‖²_F
    rate = step_size / (2 * torch.linalg.matrix_norm(Z, 2) ** 2)
    if start is None:
        start = random_frame(Z.shape[0], k, generator=generator, dtype=Z.dtype).to(Z.device)
    U = _frame(start)
    if U.shape != (Z.shape[0], k):
        raise ValueError(f"expected a start of shape {(Z.shape[0], k)}, got {tuple(U.shape)}")
    history = [(Z.mT @ U).square().sum()]
    for _ in range(steps):
        U = exp(U, rate * tangent(U, 2 * Z @ (Z.mT @ U)))
        history.append((Z.mT @ U).square().sum())
    return U.to(dtype), torch.stack(history).to(dtype)


def projection_kernel(U: Tensor, V: Tensor) -> Tensor:
    """‖UᵀV‖²_F = Σ cos²θ, shape=[...]; positive semidefinite, also across dimensions."""
    U64, V64, dtype = _pair(U, V)
    return (U64.mT @ V64).square().sum((-2, -1)).to(dtype)


def binet_cauchy_kernel(U: Tensor, V: Tensor) -> Tensor:
    """det(UᵀV)² = ∏ cos²θ, shape=[...]; positive semidefinite. Raises ValueError for k ≠ l."""
    U64, V64, dtype = _pair(U, V, same_dim=True)
    return torch.linalg.det(U64.mT @ V64).square().to(dtype)


def gram(frames: Frames, kernel: Callable[[Tensor, Tensor], Tensor] = projection_kernel) -> Tensor:
    """Gram matrix of kernel(Uᵢ, Uⱼ), shape=[T, T]: symmetric, and PSD to rounding if the kernel is PSD."""
    frames, _, _, dtype = _collect(frames, None, 0)
    K = torch.zeros(len(frames), len(frames), dtype=torch.float64, device=frames[0].device)
    for i, U in enumerate(frames):
        for j, V in enumerate(frames[: i + 1]):
            K[i, j] = K[j, i] = kernel(U, V)
    return K.to(dtype)


def _columns(x: Tensor) -> Tensor:
    """x in float64, after checks of type and shape."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"expected a real floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim < 2 or not 1 <= x.shape[-1] <= x.shape[-2]:
        raise ValueError(f"expected columns, shape [..., n, k] with 1 <= k <= n, got {tuple(x.shape)}")
    return x.double()


def _frame(U: Tensor) -> Tensor:
    """U in float64, orthonormal to float64 rounding."""
    U64 = _columns(U)
    error = (U64.mT @ U64 - torch.eye(U.shape[-1], dtype=U64.dtype, device=U.device)).abs().amax().item()
    if not error <= max(1e-3, 8 * torch.finfo(U.dtype).eps):
        raise ValueError(
            f"columns are not orthonormal, |UᵀU - I| = {error:.2g} for shape {tuple(U.shape)}; "
            "call orthonormalise first"
        )
    return U64 if error < 1e-14 else orthonormalise(U64)


def _pair(U: Tensor, V: Tensor, same_dim: bool = False) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both frames in float64, and the dtype of the result."""
    U64, V64 = _frame(U), _frame(V)
    if U.shape[-2] != V.shape[-2]:
        raise ValueError(f"ambient dimensions n differ: shapes {tuple(U.shape)} and {tuple(V.shape)}")
    if same_dim and U.shape[-1] != V.shape[-1]:
        raise ValueError(f"subspace dimensions k differ: shapes {tuple(U.shape)} and {tuple(V.shape)}")
    return U64, V64, torch.promote_types(U.dtype, V.dtype)


def _leading(x: Update, k: int | None, side: str, name: str, letter: str) -> Tensor:
    """The k leading directions of a LowRank or frame as columns, shape=[..., n, k]."""
    if isinstance(x, LowRank):
        U, _, Vh = x.svd()
        x = U if side == "left" else Vh.mT
        if x.shape[-1] == 0:
            raise ValueError(f"{name} is a zero update: it has no directions, φ is undefined")
    available = _frame(x).shape[-1]
    if k is not None and not 1 <= k <= available:
        raise ValueError(f"expected 1 <= {letter} <= {available}, the directions of {name}, got {letter}={k}")
    return x[..., :k]


def _collect(frames: Frames, weights: Weights, k: int | None):
    """Frames in float64, weights, k (the common dimension unless given), and the dtype of the result."""
    frames = list(frames)
    shapes = [tuple(U.shape) for U in frames]
    if not frames or any(len(s) != 2 or s[0] != shapes[0][0] for s in shapes):
        raise ValueError(f"expected one or more frames, shape [n, k] with one n, got shapes {shapes}")
    if k is None and len(set(shapes)) > 1:
        raise ValueError(f"expected frames of one shape (or k, where it can be given), got shapes {shapes}")
    w = [1 / len(frames)] * len(frames) if weights is None else [float(x) for x in weights]
    if len(w) != len(frames) or not all(0 <= x < math.inf for x in w) or not any(w):
        raise ValueError(f"expected {len(frames)} finite weights >= 0, not all zero, got {w}")
    dtype = frames[0].dtype
    for U in frames:
        dtype = torch.promote_types(dtype, U.dtype)
    return [_frame(U) for U in frames], w, shapes[0][1] if k is None else k, dtype
