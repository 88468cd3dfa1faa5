"""Low-rank updates ΔW = left @ right, never formed.

Every function costs O((m + n) r² + r³) for rank r, instead of O(m n min(m, n)) for the dense algorithm; what has
the size of the rank is factorised in float64 whatever the inputs are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from .numerics import keep_rank, nonzero_svd, working_dtype


@dataclass(frozen=True, eq=False)
class LowRank:
    """An update ΔW = left @ right.

    Attributes
    ----------
    left : Tensor, shape=[m, r]
        Up-projection; any scaling (α/r) is folded in.
    right : Tensor, shape=[r, n]
        Down-projection.

    Raises
    ------
    ValueError
        If the factors are not matrices that can be multiplied, or differ in dtype.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self):
        left, right = self.left, self.right
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise ValueError(f"expected left (m, r) and right (r, n), got {tuple(left.shape)} and {tuple(right.shape)}")
        if left.dtype != right.dtype or not left.is_floating_point():
            raise ValueError(f"expected two factors of one float dtype, got {left.dtype} and {right.dtype}")

    @classmethod
    def from_dense(cls, matrix: Tensor) -> "LowRank":
        """A dense matrix (m, n) as factors of rank min(m, n), one of them the identity."""
        m, n = matrix.shape
        eye = torch.eye(min(m, n), dtype=matrix.dtype, device=matrix.device)
        return cls(eye, matrix) if m <= n else cls(matrix, eye)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of the weight."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """Number of columns of `left`: an upper bound of the rank of ΔW."""
        return self.left.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    def delta(self) -> Tensor:
        """The dense ΔW, shape=[m, n], for tests and teaching. Half precision is multiplied in float32."""
        work = working_dtype(self.dtype)
        return (self.left.to(work) @ self.right.to(work)).to(self.dtype)

    def to(self, *args, **kwargs) -> "LowRank":
        """Both factors through `Tensor.to`."""
        return LowRank(self.left.to(*args, **kwargs), self.right.to(*args, **kwargs))

    def wide(self) -> "LowRank":
        """In float32 or better: so that half precision is rounded once, at the end."""
        return self.to(working_dtype(self.dtype))

    def __mul__(self, scale: float) -> "LowRank":
        return LowRank(self.left * scale, self.right)

    __rmul__ = __mul__

    def __add__(self, other: "LowRank") -> "LowRank":
        return add([self, other])

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thin SVD: QR of both factors, SVD of the small core.

        Returns
        -------
        U, S, Vh : Tensor, shapes [m, k], [k], [k, n]
            Numerically nonzero directions only (σ > 1e-6 σ₁, or 1e-12 σ₁ for float64 inputs), descending.
            Computed in float64; returned in float32, or float64 for float64 inputs.
        """
        q_left, r_left = torch.linalg.qr(self.left.double())
        q_right, r_right = torch.linalg.qr(self.right.double().mT)
        u, s, vh = nonzero_svd(r_left @ r_right.mT, self.dtype)
        work = working_dtype(self.dtype)
        return (q_left @ u).to(work), s.to(work), (vh @ q_right.mT).to(work)

    def balanced(self) -> "LowRank":
        """The same update in the balanced gauge, left = U√Σ and right = √ΣVᵀ.

        Signs are fixed (the largest entry of each column of U is positive), so that for distinct singular
        values the factors depend on ΔW alone.
        """
        u = self.truncate()[0]
        if not u.rank:
            return u
        signs = u.left.gather(0, u.left.abs().argmax(0, keepdim=True)).sign()[0]
        return LowRank(u.left * signs, signs[:, None] * u.right)

    def truncate(self, rank: int | None = None, energy: float | None = None) -> tuple["LowRank", float]:
        """The best approximation of lower rank (Eckart–Young), in the balanced gauge.

        Returns
        -------
        update : LowRank
            Of at most `rank`, or of the smallest rank that keeps a share `energy` of ‖ΔW‖²_F.
        dropped : float
            Share of ‖ΔW‖²_F that was cut off.
        """
        update, dropped = leading(*self.svd(), rank, energy)
        return update.to(self.dtype), dropped

    def zero(self) -> "LowRank":
        """The zero update of this shape and dtype, of rank 0, which holds no number."""
        return LowRank(self.left.new_zeros(self.shape[0], 0), self.right.new_zeros(0, self.shape[1]))

    def regauge(self, g: Tensor) -> "LowRank":
        """The same update to rounding, with factors (left @ g, g⁻¹ @ right) for g in GL(r), shape=[r, r]."""
        work = g.to(self.left.device, torch.float64)
        left = self.left.double() @ work
        right = torch.linalg.solve(work, self.right.double())
        return LowRank(left.to(self.dtype), right.to(self.dtype))

    def inner(self, other: "LowRank") -> float:
        """Frobenius inner product ⟨ΔW, ΔW'⟩ = ⟨LᵀL', R R'ᵀ⟩, in float64.

        Raises
        ------
        ValueError
            If the shapes (m, n) differ.
        """
        if self.shape != other.shape:
            raise ValueError(f"expected updates of one shape, got {self.shape} and {other.shape}")
        lefts = self.left.double().mT @ other.left.double()
        rights = self.right.double() @ other.right.double().mT
        return float((lefts * rights).sum())

    def norm(self) -> float:
        """Frobenius norm ‖ΔW‖_F, in float64; where long columns cancel, by QR, which squares no condition number."""
        sides = self.left.double(), self.right.double().mT
        terms = (sides[0].mT @ sides[0]) * (sides[1].mT @ sides[1])
        if (total := float(terms.sum())) < 1e-6 * float(terms.abs().sum()):
            left, right = (torch.linalg.qr(x, mode="r").R for x in sides)
            return float((left @ right.mT).norm())
        return total**0.5


def leading(
    u: Tensor, s: Tensor, vh: Tensor, rank: int | None = None, energy: float | None = None
) -> tuple[LowRank, float]:
    """The leading part of a singular value decomposition in the balanced gauge, and the share of the squared norm that
    is left out; see `LowRank.truncate`."""
    k = keep_rank(s, rank, energy)
    root = s[:k].sqrt()
    total = float(s.double().square().sum())
    dropped = float(s[k:].double().square().sum()) / total if total else 0.0
    return LowRank(u[:, :k] * root, root[:, None] * vh[:k]), dropped


class Updates(Protocol):
    """What has an update for each of its modules: an adapter."""

    @property
    def modules(self) -> Mapping[str, LowRank]: ...

    def with_modules(self, modules: Mapping[str, LowRank]) -> Self: ...


def add(updates: Sequence[LowRank], weights: Sequence[float] | None = None) -> LowRank:
    """Σ wᵢΔWᵢ: factors side by side, of rank Σ rᵢ; only weights round. They are 1 unless given.

    Raises
    ------
    ValueError
        If there is no update, the shapes (m, n) differ, or the weights are not as many.
    """
    if len(shapes := {u.shape for u in updates}) != 1:
        raise ValueError(f"expected updates of one shape, got {sorted(shapes) or 'none'}")
    weights = [1.0] * len(updates) if weights is None else weights
    left = torch.cat([u.left * w for u, w in zip(updates, weights, strict=True)], dim=1)
    return LowRank(left, torch.cat([u.right for u in updates], dim=0))


def rounded(update: LowRank, dtype: torch.dtype) -> LowRank:
    """The update in a dtype. Where half precision would lose more than its last bit, columns of one factor are first
    made smaller and those of the other larger, by powers of two: the same update, of factors of like size."""
    new = update.to(dtype)
    if dtype.itemsize > 2 or all(
        torch.equal(x.to(y.dtype), y) for x, y in ((new.left, update.left), (new.right, update.right))
    ):
        return new
    sizes = [torch.linalg.vector_norm(x, dim=0, dtype=torch.float64) for x in (update.left, update.right.mT)]
    shift = ((sizes[1] / sizes[0]).log2() / 2).round().nan_to_num(0, 0, 0)
    if not shift.any():
        return new
    left, right = update.left.double() * 2**shift, update.right.double() * 2 ** -shift[:, None]
    return LowRank(left.to(dtype), right.to(dtype))
