"""The rows that `inspect` and `compare` show."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..files import Adapter
from ..files.names import twins
from ..lowrank import LowRank
from ..parallel import Progress, parallel_map

if TYPE_CHECKING:
    import pandas

DEGREES = 57.29577951308232


def inspected(adapter: Adapter, progress: Progress | None = None) -> tuple[list[dict], dict]:
    """One row a module, and what is true of the whole adapter."""
    rows = parallel_map(lambda item: _row(*item), adapter.items(), progress)
    odd = [f"{row['module']} is zero" for row in rows if not row["spectrum"]]
    odd += [
        f"{row['module']} has rank {len(row['spectrum'])}, stored as {row['rank']}"
        for row in rows
        if 0 < len(row["spectrum"]) < row["rank"]
    ]
    odd += [f"{name} is stored in full ({tuple(t.shape)}), not as factors" for name, t in adapter.saved.items()]
    odd += [f"{' and '.join(names)} are one layer, under {len(names)} names" for names in twins(adapter)]
    summary = {
        "source": adapter.source,
        "format": adapter.format,
        "base model": adapter.base_model or "not named",
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "modules": len(rows),
        "numbers stored": sum(u.left.numel() + u.right.numel() for u in adapter.values()),
        "norm": adapter.norm(),
        "id": adapter.id,
        "odd": odd,
    }
    return rows, summary


def _row(name: str, update: LowRank) -> dict:
    s = update.svd()[1].double()
    energy = s.square()
    total = max(float(energy.sum()), 1e-300)
    return {
        "module": name,
        "shape": f"{update.shape[0]}×{update.shape[1]}",
        "rank": update.rank,
        "scale": float(getattr(update, "scale", 1.0)),
        "‖ΔW‖": float(s.norm()),
        "σ₁": float(s[0]) if len(s) else 0.0,
        "effective rank": float(s.sum() ** 2) / total,
        "energy in 4": float(energy[:4].sum()) / total,
        "spectrum": s.tolist(),
    }


def against_chance(names: Sequence[str], tables: Mapping[tuple[int, int], "pandas.DataFrame"]) -> list[str]:
    """A line a pair: mean φ over the modules beside its null, ± the standard deviation of the mean, and z."""
    from ..geometry import pooled

    lines = []
    for (i, j), table in tables.items():
        sides = [
            f"φ of {word} {t['phi']:.4f}, chance {t['null']:.4f} ± {t['std']:.4f} (z = {t['z']:.1f})"
            for word, (_, t) in zip(("outputs", "inputs"), pooled(table).iterrows(), strict=True)
        ]
        lines.append(f"{names[i]} + {names[j]}: {'; '.join(sides)}")
    return lines


def compared(
    names: Sequence[str], tables: Mapping[tuple[int, int], "pandas.DataFrame"], modules: bool, sizes: Sequence[int]
) -> list[dict]:
    """One row a pair (or a module of a pair), from the `similarity` of each; `sizes`: modules of each adapter."""
    from ..geometry import pooled

    rows = []
    for (i, j), table in tables.items():
        pair = {"pair": f"{names[i]} + {names[j]}"}
        for module, part in table.groupby(level=0, sort=False) if modules else [("", table)]:
            mean, angles = part.mean(), part[["angle_left", "angle_right"]]
            alone = {"only first": sizes[i] - len(table), "only second": sizes[j] - len(table)}
            rows.append(pair | ({"module": module} if modules else {"modules": len(table)} | alone) | {
                "cosine": float(mean.cosine),
                "φ outputs": float(mean.phi_left),
                "× chance": float((part.phi_left / part.null_left).mean()),
                "φ inputs": float(mean.phi_right),
                "× chance ": float((part.phi_right / part.null_right).mean()),
                "smallest angle, °": float(angles.min().min() * DEGREES),
            })  # fmt: skip
            if not modules:
                z = pooled(table).z
                rows[-1] |= {"z outputs": float(z.left), "z inputs": float(z.right)}
    return rows
