"""Straight lines on the Grassmannian: tangent vectors, exp, log, geodesics."""

import math

import torch
from torch import Tensor

from .frames import frame64, pair64


def tangent(U: Tensor, Z: Tensor) -> Tensor:
    """Horizontal part (I − UUᵀ)Z of Z, shape=[..., n, k]; tangent vectors at U are the H with UᵀH = 0."""
    U64, Z64 = frame64(U), Z.double()
    return (Z64 - U64 @ (U64.mT @ Z64)).to(torch.promote_types(U.dtype, Z.dtype))


def exp(U: Tensor, H: Tensor) -> Tensor:
    """Frame reached at time 1 by the geodesic from U with velocity H, shape=[..., n, k] (EAS theorem 2.3).

    With H = QΣWᵀ it is UW cos Σ Wᵀ + Q sin Σ Wᵀ. A part of H inside span U would turn the frame without
    moving the span, and is dropped.
    """
    U64 = frame64(U)
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
    U64, V64, dtype = pair64(U, V, same_dim=True)
    X, C, Yh = torch.linalg.svd(U64.mT @ V64)
    ratio = 1 / torch.sinc(C.clamp(max=1).arccos() / math.pi)
    H = tangent(U64, (V64 @ Yh.mT - U64 @ X * C[..., None, :]) * ratio[..., None, :])
    return (H @ X.mT).to(dtype)


def geodesic(U: Tensor, V: Tensor, t: Tensor | float) -> Tensor:
    """Frame at time t on the shortest geodesic from U (t = 0) to span V (t = 1), shape=[..., n, k].

    t is a number or a tensor, whose shape leads that of the result. At t = 1 the frame is align(V, U).
    """
    U64, V64, dtype = pair64(U, V, same_dim=True)
    t = torch.as_tensor(t, dtype=torch.float64, device=U.device)[..., None, None]
    return exp(U64, t * log(U64, V64)).to(dtype)
