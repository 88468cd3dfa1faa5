"""Modules of one shape side by side: what is small is computed for all of them in one call.

One module is hundreds of calls of some microseconds, between which Python passes its lock from thread to thread; a
batch makes as many calls as one module does. A module has the same bytes in any batch, alone in one too: what is cut or
grouped by its numbers is so for each by its own, and modules that part ways (`Uneven`) go on alone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ..files import Adapter
from ..lowrank import LowRank
from ..numerics import gram_matrix, keep_rank, nonzero_svd, working_dtype
from .core import Basis, Core, Spectrum

NUMBERS = {True: 2**26, False: 2**22}  # that are stacked at once, on a device and without one


@dataclass(frozen=True, eq=False)
class Batch:
    """The cores of B modules whose updates have the same shapes and ranks, for rules that take many at once.

    `left` and `right` hold columns [B, n, R], transforms and coordinates [B, R, R], upper triangular: no column depends
    on others. Beside `batch[i]`, the `Core` of one, it has what a `Core` has, with B in front of every shape.
    """

    left: Basis
    right: Basis
    ranks: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(
        cls, modules: Sequence[Sequence[LowRank]], device: str | torch.device | None = None
    ) -> "tuple[Batch, list[int], dict[int, Core]]":
        """Of those whose columns are independent on both sides, which they are, and the cores of the others.

        Columns are stacked on `device`, where Gram matrices are multiplied and results are lifted; all that has the
        size of R is float64 on the CPU.
        """
        dtype = reduce(torch.promote_types, [u.dtype for u in modules[0]])
        left, here, left_of = _side([[u.left for u in updates] for updates in modules], device)
        right, there, right_of = _side([[u.right.mT for u in updates] for updates in modules], device)
        found = here & there
        rest = (~found).nonzero().flatten().tolist()
        others = {i: Core.of(modules[i], left_of(i), right_of(i)) for i in rest}
        batch = cls(left, right, tuple(u.rank for u in modules[0]), working_dtype(dtype))
        return batch.of_these(found), found.nonzero().flatten().tolist(), others

    def of_these(self, which: Tensor | slice) -> "Batch":
        """The batch of some of its modules."""
        if isinstance(which, Tensor) and bool(which.all()):
            return self
        return Batch(self.left[which], self.right[which], self.ranks, self.dtype)

    def __len__(self) -> int:
        return len(self.left.coords)

    def __getitem__(self, i: int) -> Core:
        return Core.between(self.left[i], self.right[i], self.ranks, self.dtype)

    @property
    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """Left [B, R, rₜ] and right [B, rₜ, R] of every update."""
        left, right = (side.coords.split(list(self.ranks), -1) for side in (self.left, self.right))
        return [(b, a.mT) for b, a in zip(left, right, strict=True)]

    def total(self) -> Tensor:
        """Σ Cₜ, [B, R, R]."""
        return self.left.coords @ self.right.coords.mT

    def norms(self) -> list[list[float]]:
        """Of every module, the squared norm ‖ΔWₜ‖² of each update."""
        inner = (self.left.coords.mT @ self.left.coords) * (self.right.coords.mT @ self.right.coords)
        blocks = (x.split(list(self.ranks), -2)[t] for t, x in enumerate(inner.split(list(self.ranks), -1)))
        return torch.stack([x.sum((-2, -1)).clamp_min(0) for x in blocks], -1).tolist()

    def frames(self) -> list[Spectrum]:
        """Thin SVD of each core."""
        found = []
        for left, right in self.factors:
            (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right.mT)
            u, s, vh = nonzero_svd(r_left @ r_right.mT, self.dtype)
            found.append(Spectrum(q_left @ u, s, vh @ q_right.mT))
        return found

    def lift(self, x: Spectrum, rank: int | None = None) -> list[tuple[LowRank, float]]:
        """`Core.lift` of each, cut to a rank if asked."""
        u, s, vh = x
        k = keep_rank(s, rank)
        root, sizes = s[:, :k].sqrt(), s.square()
        left = (self.left @ (u[..., :k] * root[:, None])).to(self.dtype)
        right = (self.right @ (vh[:, :k].mT * root[:, None])).to(self.dtype).mT.contiguous()
        dropped = (sizes[:, k:].sum(-1) / sizes.sum(-1)).nan_to_num().tolist()
        return [(LowRank(b, a), x) for b, a, x in zip(left, right, dropped, strict=True)]


def batches(
    adapters: Sequence[Adapter], names: Iterable[str], together: Callable[[str], bool], device: bool
) -> list[list[str]]:
    """Names of modules whose updates have equal shapes, ranks and dtypes, where they go `together`: `NUMBERS` at a time
    at most, and so few, if there are not many, that every thread has some."""
    found, groups = [], dict[tuple, list[str]]()
    for name in names:
        if not together(name):
            found.append([name])
            continue
        like = next(a.modules[name] for a in adapters if name in a.modules)
        updates = [a.modules.get(name) for a in adapters]
        key = like.shape, tuple((u.rank, u.dtype) if u else (0, like.dtype) for u in updates)
        groups.setdefault(key, []).append(name)
    for (shape, each), group in groups.items():
        fit = NUMBERS[device] // (sum(shape) * sum(rank for rank, _ in each))
        step = max(1, min(fit, -(-len(group) // torch.get_num_threads())))
        found += [group[i : i + step] for i in range(0, len(group), step)]
    return found


def _side(
    modules: Sequence[Sequence[Tensor]], device: str | torch.device | None
) -> tuple[Basis, Tensor, Callable[[int], Basis]]:
    """`Basis.by_cholesky` of the blocks (n, rₜ) of every module, and the basis of one of them, whatever it takes."""
    (n, _), R = modules[0][0].shape, sum(x.shape[1] for x in modules[0])
    dtype = reduce(torch.promote_types, [x.dtype for x in modules[0]])
    stack = torch.empty(len(modules), n, R, dtype=working_dtype(dtype), device=device)
    for there, blocks in zip(stack, modules, strict=True):
        there.copy_(torch.cat(list(blocks), 1))
    single = dtype.itemsize == 2
    # MPS has no float64: what needs it is multiplied here.
    gram = gram_matrix(stack.cpu() if stack.device.type == "mps" and not single else stack, single)
    basis, found = Basis.by_cholesky(stack, gram)
    return basis, found, lambda i: basis[i] if found[i] else Basis.from_gram(modules[i], stack[i], gram[i])
