"""The core space: what several low-rank updates of one module share, in matrices of the size of their summed rank.

Every ΔWₜ = Q_B Cₜ Q_Aᵀ exactly, at a cost of O((m + n) R² + R³) for the summed rank R. Gram matrices, cores and
their factorisations are float64 whatever the inputs are. Source: Core Space, arXiv 2509.17786.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from ..lowrank import LowRank
from ..numerics import full_precision, gram_matrix, half, keep_rank, nonzero_svd, working_dtype


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal columns Q = columns @ transform that span several factors, without forming Q.

    `columns` (n, R) is the stack of factors as it came, `transform` (R, p) float64, and `coords` (p, R)
    holds QᵀX: the factors in the basis. With a transform, columns = Q @ coords holds exactly, whatever rounding
    the Gram matrix suffered; only the orthonormality of Q, and so nothing a sum of updates could notice, feels
    it. Without one, `columns` is Q itself, and what of the factors lies below 1e-10 of their span is left out.
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

    @classmethod
    def of(cls, updates: Sequence[LowRank]) -> "Core":
        """The core space of updates of one shape and any ranks.

        Where factors are nearly dependent, those of their balanced gauge stand for them (`_balanced`); what rank
        then counts is numerically nonzero directions.

        Raises
        ------
        ValueError
            If the shapes differ, or there is no update.
        """
        shapes = {u.shape for u in updates}
        if len(shapes) != 1:
            raise ValueError(f"expected updates of one shape, got {sorted(shapes) or 'none'}")
        core = _core(updates, Basis.of([u.left for u in updates]), Basis.of([u.right.mT for u in updates]))
        return core if core.left.nested and core.right.nested else _balanced(updates, core.dtype)

    @classmethod
    @full_precision()
    def batch(cls, modules: Sequence[Sequence[LowRank]], device: str | torch.device) -> "list[Core]":
        """`Core.of` several modules whose updates have the same shapes, ranks and dtypes.

        Their factors are stacked on `device`, where one batched product a side gives all Gram matrices and the
        cores are lifted later; everything of size R is float64 on the CPU.
        """
        bases = []
        for blocks in (
            [[u.left for u in us] for us in modules],
            [[u.right.mT for u in us] for us in modules],
        ):
            stack = torch.stack([side_by_side(b).mT for b in blocks]).mT
            there = stack.to(device)
            # MPS has no float64: what needs it is multiplied before it goes there.
            gram = gram_matrix(stack if there.device.type == "mps" and not half(stack) else there)
            bases.append(map(Basis.from_gram, there.to(working_dtype(stack.dtype)), gram))
        cores = [_core(updates, left, right) for updates, left, right in zip(modules, *bases, strict=True)]
        return [
            core if core.left.nested and core.right.nested else _balanced(updates, core.dtype)
            for core, updates in zip(cores, modules, strict=True)
        ]

    @property
    def cores(self) -> list[Tensor]:
        """The Cₜ, each (p, q), float64."""
        return [f.left @ f.right for f in self.factors]

    def total(self) -> Tensor:
        """Σ Cₜ, (p, q), in one product."""
        lefts, rights = zip(*((f.left, f.right) for f in self.factors), strict=True)
        return torch.cat(lefts, 1) @ torch.cat(rights, 0)

    def norms(self) -> list[float]:
        """The squared norm ‖Cₜ‖² = ‖ΔWₜ‖² of each update."""
        return [f.norm() ** 2 for f in self.factors]

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


def _balanced(updates: Sequence[LowRank], dtype: torch.dtype) -> Core:
    """The core of the updates in the balanced gauge, in float64 on the CPU.

    A gauge of large condition number makes nearly dependent columns that cancel in the product. Cut as columns,
    their rounding becomes a direction of the update, or a small direction is lost; a balanced column is as long
    as what it does to the update.
    """
    updates = [u.to("cpu", torch.float64).balanced() for u in updates]
    core = _core(updates, Basis.of([u.left for u in updates]), Basis.of([u.right.mT for u in updates]))
    return replace(core, dtype=dtype)


def _core(updates: Sequence[LowRank], left: Basis, right: Basis) -> Core:
    dtype = reduce(torch.promote_types, [u.dtype for u in updates])
    ranks = [u.rank for u in updates]
    pairs = zip(left.coords.split(ranks, dim=1), right.coords.split(ranks, dim=1))
    return Core(left, right, [LowRank(b, a.mT) for b, a in pairs], working_dtype(dtype))


def side_by_side(blocks: Sequence[Tensor]) -> Tensor:
    """[X₁ … X_T], each (n, r_t), in the layout the blocks came in: no strided copies."""
    if blocks[0].mT.is_contiguous():
        return torch.cat([b.mT for b in blocks], 0).mT
    return torch.cat(list(blocks), 1)
