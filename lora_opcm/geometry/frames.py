"""Frames: orthonormal columns, shape=[..., n, k]. A point of the Stiefel manifold V(k, n).

Everything in this room is computed in float64 on frames orthonormalised again in float64, because a float32 frame
is orthonormal only to 1e-7, and returned in the dtype of the inputs (the wider of two). What is not a frame raises
ValueError or TypeError.
"""

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Generator, Tensor

Frames = Sequence[Tensor]
Weights = Sequence[float] | None


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


def random_frame(n: int, k: int, *, batch=(), generator: Generator | None = None, dtype=torch.float32) -> Tensor:
    """Frame uniform (Haar) on the Stiefel manifold, shape=[..., n, k]; its span is uniform on Gr(k, n).

    Drawn in float64, then cast: a seed gives the same subspace in every dtype.
    """
    device = None if generator is None else generator.device
    x = torch.randn(*batch, n, k, generator=generator, dtype=torch.float64, device=device)
    return orthonormalise(x).to(dtype)


def projector(U: Tensor) -> Tensor:
    """Orthogonal projector UUᵀ onto span U, shape=[..., n, n]. Forms n × n: for tests and teaching."""
    U64 = frame64(U)
    return (U64 @ U64.mT).to(U.dtype)


def procrustes(U: Tensor, V: Tensor) -> Tensor:
    """Q, shape=[..., l, k], that minimises ‖U − VQ‖_F: the polar factor of VᵀU (Schönemann 1966).

    U, shape=[..., n, k]; V, shape=[..., n, l]. For k = l, Q ∈ O(k), reflections included; for l > k its
    columns are orthonormal, for l < k its rows. Not unique where a principal angle is π/2.
    """
    U64, V64, dtype = pair64(U, V)
    X, _, Yh = torch.linalg.svd(V64.mT @ U64, full_matrices=False)
    return (X @ Yh).to(dtype)


def align_frame(V: Tensor, to: Tensor) -> Tensor:
    """V Q with Q = procrustes(to, V): for k = l the frame of span V nearest to the frame `to`."""
    V64, to64, dtype = pair64(V, to)
    return (V64 @ procrustes(to64, V64)).to(dtype)


def _columns(x: Tensor) -> Tensor:
    """x in float64, after checks of type and shape."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"expected a real floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim < 2 or not 1 <= x.shape[-1] <= x.shape[-2]:
        raise ValueError(f"expected columns, shape [..., n, k] with 1 <= k <= n, got {tuple(x.shape)}")
    return x.double()


# -- what the rest of the room asks of its inputs -------------------------------------------------------------


def frame64(U: Tensor) -> Tensor:
    """U in float64, orthonormal to float64 rounding."""
    U64 = _columns(U)
    error = (U64.mT @ U64 - torch.eye(U.shape[-1], dtype=U64.dtype, device=U.device)).abs().amax().item()
    if not error <= max(1e-3, 8 * torch.finfo(U.dtype).eps):
        raise ValueError(
            f"columns are not orthonormal, |UᵀU - I| = {error:.2g} for shape {tuple(U.shape)}; "
            "call orthonormalise first"
        )
    return U64 if error < 1e-14 else orthonormalise(U64)


def pair64(U: Tensor, V: Tensor, same_dim: bool = False) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both frames in float64, and the dtype of the result."""
    U64, V64 = frame64(U), frame64(V)
    if U.shape[-2] != V.shape[-2]:
        raise ValueError(f"ambient dimensions n differ: shapes {tuple(U.shape)} and {tuple(V.shape)}")
    if same_dim and U.shape[-1] != V.shape[-1]:
        raise ValueError(f"subspace dimensions k differ: shapes {tuple(U.shape)} and {tuple(V.shape)}")
    return U64, V64, torch.promote_types(U.dtype, V.dtype)


def collect64(frames: Frames, weights: Weights, k: int | None):
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
    dtype = reduce(torch.promote_types, [U.dtype for U in frames])
    return [frame64(U) for U in frames], w, shapes[0][1] if k is None else k, dtype
