"""How much two updates overlap: φ beside its null, module by module for two adapters."""

import math
import warnings
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..lowrank import LowRank, Updates
from ..parallel import Progress, parallel_map
from ..values import Count, expect
from .angles import principal_angles
from .frames import frame64, pair64

if TYPE_CHECKING:
    import pandas

Update = LowRank | Tensor  # or a frame, shape=[..., n, k]

# The columns of `similarity`
SIDES = [f"{what}_{side}" for side in ("left", "right") for what in ("phi", "null", "std", "p", "angle")]
COLUMNS = ["cosine", "norm_a", "norm_b", "energy_a", "energy_b", "gap_a", "gap_b", *SIDES]
TIE = 1e-3  # of σ_k: about what half-precision files round away


def phi(x: Update, y: Update, k: int | None = None, l: int | None = None, side: str = "left") -> Tensor:
    """Similarity φ = ‖UᵀV‖²_F / min(k, l): the mean squared cosine of the principal angles, in [0, 1].

    x, y: a LowRank, or a frame, shape=[..., n, k]. From a LowRank come its k (l for y) leading left singular
    vectors, or right ones for side="right"; from a frame its first k columns, whatever the side. None takes
    all. For k = l = r it depends on the two subspaces alone; for fewer directions on which ones lead, and where
    σ_k = σ_{k+1} the update does not say that: warns if σ_k exceeds σ_{k+1} by less than 0.1 %. Read φ beside
    `phi_null`. Raises ValueError for more directions than there are, a zero update, unequal n, or another side.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    U, V, dtype = pair64(_leading(x, k, side, "x", "k"), _leading(y, l, side, "y", "l"))
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


def _leading(x: Update, k: int | None, side: str, name: str, letter: str) -> Tensor:
    """The k leading directions of a LowRank or frame as columns, shape=[..., n, k]."""
    if isinstance(x, LowRank):
        U, S, Vh = x.svd()
        x = U if side == "left" else Vh.mT
        if k is not None and 0 < k < len(S) and gap(S, k) < TIE:
            warnings.warn(f"phi: σ_{k} and σ_{k + 1} tie, which {k} directions lead is not determined", stacklevel=3)
        if x.shape[-1] == 0:
            raise ValueError(f"{name} is a zero update: it has no directions, φ is undefined")
    available = frame64(x).shape[-1]
    if k is not None and not 1 <= k <= available:
        raise ValueError(f"expected 1 <= {letter} <= {available}, the directions of {name}, got {letter}={k}")
    return x[..., :k]


def gap(singular_values: Tensor, k: int) -> float:
    """(σ_k − σ_{k+1}) / σ_k, in [0, 1]: 0 where k cuts through a tie, 1 where σ_k is the last one.

    A change E of the update turns its k leading directions by an angle of sine at most ‖E‖ / (σ_k − σ_{k+1} − ‖E‖),
    in spectral norms (Wedin 1972).
    """
    here = float(singular_values[k - 1])
    return 1 - float(singular_values[k]) / here if k < len(singular_values) else 1.0


def similarity(a: Updates, b: Updates, k: int = 8, l: int = 8, progress: Progress | None = None) -> "pandas.DataFrame":
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
        independent uniform subspaces `null_left`, `null_right` with standard deviations `std_left`, `std_right`,
        upper-tail p-values `p_left`, `p_right`, the smallest principal angles `angle_left`, `angle_right` in
        radians, `cosine` = ⟨ΔW_a, ΔW_b⟩ over norms, `norm_a`, `norm_b`, the shares of the squared norm in the
        leading directions `energy_a`, `energy_b`, and `gap_a`, `gap_b` = (σ_k − σ_{k+1}) / σ_k, near 0 where
        the update hardly says which directions lead. NaN where an update is zero: it has no directions. `pooled`
        of the table is the line for the whole adapter.

    Raises
    ------
    ValueError
        If no module is shared, shapes differ, or k or l is no integer of at least 1.
    """
    import pandas as pd

    expect(Count, k=k, l=l)
    names = [name for name in a.modules if name in b.modules]
    if not names:
        raise ValueError(f"{a!r} and {b!r} share no module")
    rows = parallel_map(lambda name: _row(name, a.modules[name], b.modules[name], k, l), names, progress)
    return pd.DataFrame(rows).set_index("module")


def pooled(table: "pandas.DataFrame") -> "pandas.DataFrame":
    """The rows of `similarity` as two lines, left and right: means over the modules, and how far from chance.

    Columns `phi` and `null`, the means of φ and of its expectation, `std`, the standard deviation of that mean for
    independent uniform subspaces, one pair a module, and `z` = (phi − null) / std. A small overlap of every module
    shows here that no module shows alone. Rows of several tables may be stacked.
    """
    import pandas as pd

    rows = {}
    for side in ("left", "right"):
        t = table[[f"phi_{side}", f"null_{side}", f"std_{side}"]].dropna()
        phi, null = t[f"phi_{side}"].mean(), t[f"null_{side}"].mean()
        std = float(t[f"std_{side}"].pow(2).sum()) ** 0.5 / max(len(t), 1)
        rows[side] = {"phi": phi, "null": null, "std": std, "z": (phi - null) / std if std else math.nan}
    return pd.DataFrame(rows).T


def _row(name: str, x: LowRank, y: LowRank, k: int, l: int) -> dict:
    if x.shape != y.shape:
        raise ValueError(f"{name}: expected updates of one shape, got {x.shape} and {y.shape}")
    (ux, sx, vx), (uy, sy, vy) = x.svd(), y.svd()
    k, l = min(k, len(sx)), min(l, len(sy))
    norm_x, norm_y = float(sx.norm()), float(sy.norm())
    row = {"module": name} | dict.fromkeys(COLUMNS, math.nan) | {"norm_a": norm_x, "norm_b": norm_y}
    if k:
        row["energy_a"], row["gap_a"] = float(sx[:k].square().sum()) / norm_x**2, gap(sx, k)
    if l:
        row["energy_b"], row["gap_b"] = float(sy[:l].square().sum()) / norm_y**2, gap(sy, l)
    if k and l:
        row["cosine"] = x.inner(y) / (norm_x * norm_y)
        for side, p, q in (("left", ux[:, :k], uy[:, :l]), ("right", vx[:k].mT, vy[:l].mT)):
            value, n = float(phi(p, q)), p.shape[0]
            row[f"phi_{side}"], (row[f"null_{side}"], row[f"std_{side}"]) = value, phi_null(n, k, l)
            row[f"p_{side}"] = float(phi_pvalue(value, n, k, l))
            row[f"angle_{side}"] = float(principal_angles(p, q)[0])
    return row
