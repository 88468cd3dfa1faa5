"""How two adapters overlap, module by module: φ against its null, cosine, energy, and alignment."""

import math

import torch

from .adapters import Adapter
from .grassmann import phi, phi_null, phi_pvalue, principal_angles
from .lowrank import LowRank
from .options import check
from .parallel import Progress, parallel_map

SIDES = [f"{what}_{side}" for side in ("left", "right") for what in ("phi", "null", "p", "angle")]
COLUMNS = ["cosine", "norm_a", "norm_b", "energy_a", "energy_b", *SIDES]


def similarity(a: Adapter, b: Adapter, k: int = 8, l: int = 8, progress: Progress | None = None):
    """One row for each module that both adapters change.

    Parameters
    ----------
    k, l : int
        Leading directions of `a` and of `b`; cut to the rank where a module has fewer.
    progress : callable, optional
        Wrapped around the modules as they are done, as in `merge`.

    Returns
    -------
    pandas.DataFrame
        Index module. Columns `phi_left`, `phi_right` (output and input side), their expectation for
        independent uniform subspaces `null_left`, `null_right`, upper-tail p-values `p_left`, `p_right`, the
        smallest principal angles `angle_left`, `angle_right` in radians, `cosine` = ⟨ΔW_a, ΔW_b⟩ over norms,
        `norm_a`, `norm_b`, and the shares of the squared norm in the leading directions `energy_a`, `energy_b`.
        NaN where an update is zero: it has no directions.

    Raises
    ------
    ValueError
        If no module is shared, shapes differ, or k or l is no integer of at least 1.
    """
    import pandas as pd

    check(k=k, l=l)

    names = [name for name in a.modules if name in b.modules]
    if not names:
        raise ValueError(f"{a.source} and {b.source} share no module")
    rows = parallel_map(lambda name: _row(name, a.modules[name], b.modules[name], k, l), names, progress)
    return pd.DataFrame(rows).set_index("module")


def _row(name: str, x: LowRank, y: LowRank, k: int, l: int) -> dict:
    if x.shape != y.shape:
        raise ValueError(f"{name}: expected updates of one shape, got {x.shape} and {y.shape}")
    (ux, sx, vx), (uy, sy, vy) = x.svd(), y.svd()
    k, l = min(k, len(sx)), min(l, len(sy))
    norm_x, norm_y = float(sx.norm()), float(sy.norm())
    row = {"module": name} | dict.fromkeys(COLUMNS, math.nan) | {"norm_a": norm_x, "norm_b": norm_y}
    if k:
        row["energy_a"] = float(sx[:k].square().sum()) / norm_x**2
    if l:
        row["energy_b"] = float(sy[:l].square().sum()) / norm_y**2
    if k and l:
        row["cosine"] = x.inner(y) / (norm_x * norm_y)
        for side, p, q in (("left", ux[:, :k], uy[:, :l]), ("right", vx[:k].mT, vy[:l].mT)):
            value, n = float(phi(p, q)), p.shape[0]
            row[f"phi_{side}"], row[f"null_{side}"] = value, phi_null(n, k, l).mean
            row[f"p_{side}"] = float(phi_pvalue(value, n, k, l))
            row[f"angle_{side}"] = float(principal_angles(p, q)[0])
    return row


def align(adapter: Adapter, to: Adapter) -> Adapter:
    """The representative of `adapter` whose balanced factors lie nearest to those of `to`: the same update.

    Per module, the orthogonal Procrustes solution on stacked balanced factors [left; rightᵀ], Q ∈ O(k). The
    update ΔW does not change, nor does any φ. Modules that `to` lacks, or has at another rank, are balanced.
    """

    def one(name: str) -> LowRank:
        update = adapter.modules[name]
        x = update.to(torch.float64).balanced()  # rounded once, at the end
        y = to.modules[name].to(torch.float64).balanced() if name in to.modules else None
        if y is None or y.rank != x.rank or y.shape != x.shape:
            return x.to(update.dtype)
        # Σ σ is weighed equally on both sides in the balanced gauge, so both sides have a say in Q.
        u, _, vh = torch.linalg.svd(x.left.mT @ y.left + x.right @ y.right.mT)
        q = u @ vh
        return LowRank(x.left @ q, q.mT @ x.right).to(update.dtype)

    return adapter.with_modules(dict(zip(adapter.modules, parallel_map(one, adapter.modules))))
