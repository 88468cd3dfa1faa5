"""Low-rank updates ΔW = left @ right, never formed, and the core space that several of them share.

Every function costs O((m + n) R² + R³) for R the summed rank, instead of O(m n min(m, n)) for the dense
algorithm. Gram matrices, cores and their factorisations are float64 whatever the inputs are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .parallel import full_precision

# Singular values below RTOL · σ₁ count as zero. Factors in float32 or less carry relative rounding of 1e-7;
# a direction that small is noise, and treating it as a direction is the null-space trap of design.
RTOL = {torch.float64: 1e-12}
RTOL_SINGLE = 1e-6


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
            raise ValueError(
                f"expected left (m, r) and right (r, n), got {tuple(left.shape)} and {tuple(right.shape)}"
            )
        if left.dtype != right.dtype or not left.is_floating_point():
            raise ValueError(f"expected two factors of one float dtype, got {left.dtype} and {right.dtype}")

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
        u, s, vh = self.svd()
        k = keep_rank(s, rank, energy)
        root = s[:k].sqrt()
        total = float(s.double().square().sum())
        dropped = float(s[k:].double().square().sum()) / total if total else 0.0
        return LowRank((u[:, :k] * root).to(self.dtype), (root[:, None] * vh[:k]).to(self.dtype)), dropped

    def regauge(self, g: Tensor) -> "LowRank":
        """The same update with factors (left @ g, g⁻¹ @ right), for g in GL(r), shape=[r, r]."""
        work = g.double()
        left = self.left.double() @ work
        right = torch.linalg.solve(work, self.right.double())
        return LowRank(left.to(self.dtype), right.to(self.dtype))

    def inner(self, other: "LowRank") -> float:
        """Frobenius inner product ⟨ΔW, ΔW'⟩ = ⟨LᵀL', R R'ᵀ⟩, in float64."""
        if self.shape != other.shape:
            raise ValueError(f"expected updates of one shape, got {self.shape} and {other.shape}")
        lefts = self.left.double().mT @ other.left.double()
        rights = self.right.double() @ other.right.double().mT
        return float((lefts * rights).sum())

    def norm(self) -> float:
        """Frobenius norm ‖ΔW‖_F, in float64."""
        return max(self.inner(self), 0.0) ** 0.5


def add(updates: Sequence[LowRank], weights: Sequence[float] | None = None) -> LowRank:
    """Σ wᵢΔWᵢ, exact: factors side by side, of rank Σ rᵢ. Weights are 1 unless given."""
    weights = [1.0] * len(updates) if weights is None else weights
    left = torch.cat([u.left * w for u, w in zip(updates, weights, strict=True)], dim=1)
    return LowRank(left, torch.cat([u.right for u in updates], dim=0))


# -- the core space -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal columns Q = columns @ transform that span several factors, without forming Q.

    `columns` (n, R) is the stack of factors as it came, `transform` (R, p) float64, and `coords` (p, R)
    holds QᵀX: the factors in the basis. columns = Q @ coords holds exactly, whatever rounding the Gram matrix
    suffered; only the orthonormality of Q, and so nothing a sum of updates could notice, feels it.
    """

    columns: Tensor
    transform: Tensor | None
    coords: Tensor

    @property
    def nested(self) -> bool:
        """Whether the first j columns of the factors lie in the first j directions (Cholesky: yes)."""
        return self.transform is not None

    def __matmul__(self, x: Tensor) -> Tensor:
        """Q @ x for x (p, k), multiplied where `columns` lies and returned where `x` does."""
        coefficients = x if self.transform is None else self.transform @ x
        return (self.columns @ coefficients.to(self.columns)).to(x.device)

    @classmethod
    def of(cls, blocks: Sequence[Tensor]) -> "Basis":
        """A basis of the span of all columns of `blocks`, each (n, r_t).

        Cholesky of the Gram matrix: nR² flops and one pass over the data. Where columns are nearly
        dependent (identical adapters, R > n, zero factors) squaring the condition number would cost
        accuracy, and a rank-revealing QR in float64 takes its place.
        """
        stack = side_by_side(blocks)
        return cls.from_gram(stack.to(working_dtype(stack.dtype)), gram_matrix(stack))

    @classmethod
    def from_gram(cls, stack: Tensor, gram: Tensor) -> "Basis":
        """The basis of the columns of `stack` (n, R), on any device, from their Gram matrix on the CPU."""
        norms = gram.diagonal().sqrt()
        if stack.shape[1] <= stack.shape[0] and bool((norms > 0).all()):
            chol, failed = torch.linalg.cholesky_ex(gram / (norms[:, None] * norms))
            if not failed:
                identity = torch.eye(len(norms), dtype=chol.dtype, device=chol.device)
                inverse = torch.linalg.solve_triangular(chol, identity, upper=False)
                # ‖L⁻¹‖ is the condition number and bounds how float32 rounding grows in `columns @ transform`.
                if inverse.square().sum() <= 64 * len(norms):
                    return cls(stack, inverse.mT / norms[:, None], chol.mT * norms)
        wide = stack.cpu().double()
        unit = wide / norms.clamp_min(torch.finfo(torch.float64).tiny)
        q, r = torch.linalg.qr(unit)
        u, s, _ = torch.linalg.svd(r, full_matrices=False)
        keep = int((s > 1e-10 * s[:1]).sum())
        q = q @ u[:, :keep]
        return cls(q, None, q.mT @ wide)


@dataclass(frozen=True, eq=False)
class Core:
    """T updates of one module in the space they share: ΔWₜ = Q_B Cₜ Q_Aᵀ, exactly.

    `factors` holds each Cₜ = left (p, rₜ) @ right (rₜ, q) in float64. A rule f with f(P X Qᵀ) = P f(X) Qᵀ for
    orthonormal P, Q may be run on the cores and lifted.
    Source: core space merging, arXiv 2509.17786; here the bases stay implicit.
    """

    left: Basis
    right: Basis
    factors: list[LowRank]
    dtype: torch.dtype

    @property
    def cores(self) -> list[Tensor]:
        """The Cₜ, each (p, q), float64."""
        return [f.left @ f.right for f in self.factors]

    def live(self, t: int) -> tuple[int, int]:
        """Leading rows and columns outside which the first t cores are zero."""
        done = sum(f.rank for f in self.factors[:t])
        p, q = self.left.coords.shape[0], self.right.coords.shape[0]
        return (done if self.left.nested else p), (done if self.right.nested else q)

    def frames(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Thin SVD of each core, U (p, k), S (k), Vh (k, q), at the cost of its rank."""
        found = []
        for f in self.factors:
            q_left, r_left = torch.linalg.qr(f.left)
            q_right, r_right = torch.linalg.qr(f.right.mT)
            u, s, vh = nonzero_svd(r_left @ r_right.mT, self.dtype)
            found.append((q_left @ u, s, vh @ q_right.mT))
        return found

    def lift(self, x: Tensor, rank: int | None = None, energy: float | None = None) -> tuple[LowRank, float]:
        """Q_B x Q_Aᵀ for x (p, q), truncated if asked, in the balanced gauge; and the energy dropped."""
        u, s, vh = nonzero_svd(x, self.dtype)
        k = keep_rank(s, rank, energy)
        root = s[:k].sqrt()
        left = self.left @ (u[:, :k] * root)
        right = self.right @ (vh[:k].mT * root)
        total = float(s.square().sum())
        dropped = float(s[k:].square().sum()) / total if total else 0.0
        return LowRank(left.to(self.dtype), right.mT.to(self.dtype).contiguous()), dropped


def reduce(updates: Sequence[LowRank]) -> Core:
    """The core space of updates of one shape and any ranks.

    Raises
    ------
    ValueError
        If the shapes differ, or there is no update.
    """
    shapes = {u.shape for u in updates}
    if len(shapes) != 1:
        raise ValueError(f"expected updates of one shape, got {sorted(shapes) or 'none'}")
    return _core(updates, Basis.of([u.left for u in updates]), Basis.of([u.right.mT for u in updates]))


@full_precision()
def reduce_batch(modules: Sequence[Sequence[LowRank]], device: str | torch.device) -> list[Core]:
    """`reduce` of several modules whose updates have the same shapes, ranks and dtypes.

    Their factors are stacked on `device`, where one batched product a side gives all Gram matrices and the
    cores are lifted later; everything of size R is float64 on the CPU.
    """
    bases = []
    for blocks in ([[u.left for u in us] for us in modules], [[u.right.mT for u in us] for us in modules]):
        stack = torch.stack([side_by_side(b).mT for b in blocks]).mT
        there = stack.to(device)
        # MPS has no float64: what needs it is multiplied before it goes there.
        gram = gram_matrix(stack if there.device.type == "mps" and not _half(stack) else there)
        bases.append(map(Basis.from_gram, there.to(working_dtype(stack.dtype)), gram))
    return [_core(updates, left, right) for updates, left, right in zip(modules, *bases)]


def _core(updates: Sequence[LowRank], left: Basis, right: Basis) -> Core:
    dtype = updates[0].dtype
    for u in updates[1:]:
        dtype = torch.promote_types(dtype, u.dtype)
    ranks = [u.rank for u in updates]
    pairs = zip(left.coords.split(ranks, dim=1), right.coords.split(ranks, dim=1))
    return Core(left, right, [LowRank(b, a.mT) for b, a in pairs], working_dtype(dtype))


# -- small helpers -------------------------------------------------------------------------------------------


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything less works in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def side_by_side(blocks: Sequence[Tensor]) -> Tensor:
    """[X₁ … X_T], each (n, r_t), in the layout the blocks came in: no strided copies."""
    if blocks[0].mT.is_contiguous():
        return torch.cat([b.mT for b in blocks], 0).mT
    return torch.cat(list(blocks), 1)


def gram_matrix(x: Tensor, width: int = 64) -> Tensor:
    """xᵀx in float64 on the CPU, shape=[..., R, R] for x [..., n, R]; only blocks on and above the diagonal.

    Multiplied where x lies: half precision in float32, where its products are exact, all else in float64.
    """
    x = x.float() if _half(x) else x.double()
    gram = torch.zeros(*x.shape[:-2], x.shape[-1], x.shape[-1], dtype=torch.float64)
    for i in range(0, x.shape[-1], width):
        block = (x[..., i : i + width].mT @ x[..., i:]).to("cpu").double()
        gram[..., i : i + width, i:], gram[..., i:, i : i + width] = block, block.mT
    return gram


def _half(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


def nonzero_svd(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of `x` without the directions that are rounding noise for factors of `dtype`."""
    if dtype != torch.float64 and x.dtype == torch.float64 and 16 <= x.shape[0] <= x.shape[1]:
        # Half the time of an SVD, and as good to 1e-8 where no singular value is below 1e-4 σ₁.
        values, u = torch.linalg.eigh(x @ x.mT)
        if values[0] > 1e-8 * values[-1]:
            u, s = u.flip(1), values.flip(0).sqrt()
            return u, s, (u / s).mT @ x
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    k = int((s > RTOL.get(dtype, RTOL_SINGLE) * s[:1]).sum())
    return u[:, :k], s[:k], vh[:k]


def keep_rank(s: Tensor, rank: int | None = None, energy: float | None = None) -> int:
    """How many of the singular values `s` (descending) to keep: at most `rank`, and no more than `energy` asks.

    Raises
    ------
    ValueError
        If rank < 1 or energy is outside (0, 1].
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must lie in (0, 1], got {energy}")
    k = len(s)
    if energy is not None and k:
        share = s.double().square().cumsum(0)
        k = int((share < energy * share[-1] * (1 - 1e-12)).sum()) + 1
    return min(k, len(s), rank if rank is not None else k)
