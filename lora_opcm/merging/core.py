"""The core space: what several low-rank updates of one module share, in matrices of the size of their summed rank.

Every ΔWₜ = Q_B Cₜ Q_Aᵀ exactly, at a cost of O((m + n) R² + R³) for the summed rank R. Gram matrices, cores and
their factorisations are float64 whatever the inputs are. Source: Core Space, arXiv 2509.17786.

Nothing here is compiled: the time is in products and LAPACK, which torch.compile calls as they are. Compiled, Gram
matrices and projections took 1.2 times as long on a CPU (torch 2.13), after 25 s of compiling.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..lowrank import LowRank
from ..numerics import gram_matrix, half, keep_rank, nonzero_svd, working_dtype


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal columns Q = columns @ transform that span several factors, without forming Q.

    `columns` (n, R) is the stack of factors as it came, `transform` (R, p) float64, and `coords` (p, R)
    holds QᵀX: the factors in the basis. With a transform, columns = Q @ coords holds exactly, whatever rounding
    the Gram matrix suffered; only the orthonormality of Q, and so nothing a sum of updates could notice, feels
    it. Without one, `columns` is Q itself, and what of the factors lies below 1e-10 of their span is left out, unless
    Q is square.
    """

    columns: Tensor
    transform: Tensor | None
    coords: Tensor

    @property
    def nested(self) -> bool:
        """Whether the first j columns of the factors lie in the first j directions (Cholesky: yes)."""
        return self.transform is not None

    def __getitem__(self, which: Any) -> "Basis":
        """One basis of several, or some of them."""
        transform = None if self.transform is None else self.transform[which]
        return Basis(self.columns[which], transform, self.coords[which])

    def __matmul__(self, x: Tensor) -> Tensor:
        """Q @ x for x (p, k), multiplied where `columns` lies and returned where `x` does."""
        coefficients = x if self.transform is None else self.transform @ x
        return (self.columns @ coefficients.to(self.columns)).to(x.device)

    @classmethod
    def of(cls, blocks: Sequence[Tensor]) -> "Basis":
        """A basis of the span of all columns of `blocks`, each (n, r_t).

        Cholesky of the Gram matrix: nR² flops and one pass over the data. Columns that several blocks share, as
        adapters with one frozen factor do, count once. Where columns depend on each other all the same (zeros
        among them) a rank-revealing QR in float64 takes its place; where they may span all of the space, nothing.
        """
        stack = torch.cat(list(blocks), 1)  # by rows, whatever came: the product takes half the time
        wide = stack.to(working_dtype(stack.dtype))
        if stack.shape[1] >= stack.shape[0]:
            return cls.square(wide)
        return cls.from_gram(blocks, wide, gram_matrix(wide, half(stack)))

    @classmethod
    def from_gram(cls, blocks: Sequence[Tensor], wide: Tensor, gram: Tensor) -> "Basis":
        """`of`, from the blocks side by side in the working dtype and their Gram matrix on the CPU."""
        basis, found = cls.by_cholesky(wide, gram)
        if found:
            return basis
        first = [next(i for i, y in enumerate(blocks) if x.shape == y.shape and torch.equal(x, y)) for x in blocks]
        kept = sorted(set(first))
        if len(kept) == len(blocks):
            return cls._by_qr(wide.cpu(), gram, any(map(half, blocks)))
        once = cls.of([blocks[t] for t in kept])
        coords = dict(zip(kept, once.coords.split([blocks[t].shape[1] for t in kept], 1), strict=True))
        return replace(once, coords=torch.cat([coords[t] for t in first], 1))

    @classmethod
    def _by_qr(cls, stack: Tensor, gram: Tensor, single: bool) -> "Basis":
        """Of columns that nearly depend on each other; `single` says that `gram` was multiplied in float32."""
        wide = stack.double()
        # Squaring the condition number costs digits: float64 has some to spare beyond the inputs' own.
        if stack.dtype != torch.float64:
            basis, found = cls.by_cholesky(wide, gram_matrix(wide) if single else gram, 1e8)
            if found:
                return basis
        unit = wide / gram.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        q, r = torch.linalg.qr(unit)
        u, s, _ = torch.linalg.svd(r, full_matrices=False)
        keep = int((s > 1e-10 * s[:1]).sum())
        q = q @ u[:, :keep]
        return cls(q, None, q.mT @ wide)

    @classmethod
    def square(cls, stack: Tensor) -> "Basis":
        """The basis of all of R^n, for stacks that may span it."""
        return cls(torch.eye(len(stack), dtype=torch.float64), None, stack.double())

    @classmethod
    def by_cholesky(cls, stack: Tensor, gram: Tensor, limit: float | None = None) -> "tuple[Basis, Tensor]":
        """The basis of stack [..., n, R] from its Gram matrix on the CPU, and where it is one.

        It is none where ‖L⁻¹‖² of columns of length 1, at least their condition number squared, exceeds the limit, 64R
        unless given: that bounds how the rounding of `columns @ transform` grows, and of the Gram matrix in QᵀQ.
        """
        norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        chol, failed = torch.linalg.cholesky_ex(gram / (norms[..., :, None] * norms[..., None, :]))
        inverse = torch.linalg.solve_triangular(chol, torch.eye(gram.shape[-1], dtype=chol.dtype), upper=False)
        size = inverse.square().sum((-2, -1))  # NaN where a column is zero
        found = (failed == 0) & (size <= (64 * norms.shape[-1] if limit is None else limit))
        return cls(stack, inverse.mT / norms[..., :, None], chol.mT * norms[..., None, :]), found


class Spectrum(NamedTuple):
    """A matrix (p, q) by its singular value decomposition: U (p, k), σ (k), descending and ≥ 0, and Vᵀ (k, q).

    What a rule returns that has it anyway: it need not be found a second time. Of a batch, all are [B, …].
    """

    u: Tensor
    s: Tensor
    vh: Tensor

    @classmethod
    def of(cls, x: "Tensor | Spectrum", dtype: torch.dtype) -> "Spectrum":
        """Of any matrix, without what is rounding noise for factors of `dtype`."""
        return x if isinstance(x, Spectrum) else cls(*nonzero_svd(x, dtype))

    def dense(self) -> Tensor:
        return (self.u * self.s) @ self.vh


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
    def of(cls, updates: Sequence[LowRank], *bases: Basis) -> "Core":
        """The core space of updates of one shape and any ranks; of the bases of both sides if they are known.

        Where factors are nearly dependent, or may span all of a side, all is done in float64 (`_careful`); what rank
        then counts is numerically nonzero directions.

        Raises
        ------
        ValueError
            If the shapes differ, or there is no update.
        """
        shapes = {u.shape for u in updates}
        if len(shapes) != 1:
            raise ValueError(f"expected updates of one shape, got {sorted(shapes) or 'none'}")
        core = _core(updates, *bases)
        return core if core.left.nested and core.right.nested else _careful(updates, core.dtype)

    @classmethod
    def between(cls, left: Basis, right: Basis, ranks: Sequence[int], dtype: torch.dtype) -> "Core":
        """The core of updates of these ranks whose factors have these bases."""
        pairs = zip(left.coords.split(list(ranks), dim=1), right.coords.split(list(ranks), dim=1))
        return cls(left, right, [LowRank(b, a.mT) for b, a in pairs], dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q), the shape of every Cₜ."""
        return self.left.coords.shape[0], self.right.coords.shape[0]

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
        p, q = self.shape
        return (done if self.left.nested else p), (done if self.right.nested else q)

    def frames(self, count: int | None = None) -> list[Spectrum]:
        """Thin SVD of each core, or of the first `count`, at the cost of its rank."""
        found = []
        for f in self.factors[:count]:
            q_left, r_left = torch.linalg.qr(f.left)
            q_right, r_right = torch.linalg.qr(f.right.mT)
            u, s, vh = nonzero_svd(r_left @ r_right.mT, self.dtype)
            found.append(Spectrum(q_left @ u, s, vh @ q_right.mT))
        return found

    def lift(self, x: Tensor | Spectrum, rank: int | None = None, energy: float | None = None) -> tuple[LowRank, float]:
        """Q_B x Q_Aᵀ for x (p, q), truncated if asked, in the balanced gauge; and the energy dropped."""
        u, s, vh = Spectrum.of(x, self.dtype)
        k = keep_rank(s, rank, energy)
        root = s[:k].sqrt()
        left = self.left @ (u[:, :k] * root)
        right = self.right @ (vh[:k].mT * root)
        total = float(s.square().sum())
        dropped = float(s[k:].square().sum()) / total if total else 0.0
        return LowRank(left.to(self.dtype), right.mT.to(self.dtype).contiguous()), dropped


def _careful(updates: Sequence[LowRank], dtype: torch.dtype) -> Core:
    """The core of the updates in float64 on the CPU; of their balanced gauge, where a basis is not of their columns.

    A gauge of large condition number makes nearly dependent columns that cancel in the product. Cut as columns,
    their rounding becomes a direction of the update, or a small direction is lost; a balanced column is as long
    as what it does to the update. Where nothing is cut, as of columns that span all of a side, the factors of a core
    are still in that gauge, and rules may look at them.
    """
    wide = [u.to("cpu", torch.float64) for u in updates]
    core = _core(wide)
    if not (core.left.nested and core.right.nested):
        core = _core([u.balanced() for u in wide])
    return replace(core, dtype=dtype)


def _core(updates: Sequence[LowRank], *bases: Basis) -> Core:
    left, right = bases or (Basis.of([u.left for u in updates]), Basis.of([u.right.mT for u in updates]))
    dtype = reduce(torch.promote_types, [u.dtype for u in updates])
    return Core.between(left, right, [u.rank for u in updates], working_dtype(dtype))
