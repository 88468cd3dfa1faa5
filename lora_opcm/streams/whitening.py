"""Sequential whitening one adapter at a time: what is kept is the merged adapter, cut to a rank if one is given."""

from collections.abc import Mapping

from ..lowrank import LowRank
from ..merging.core import Core
from ..merging.rules.frames import whitening
from ..numerics import working_dtype
from ..values import AUTO, Limit, Scale
from .stream import State
from .update import UpdateStream


class WhiteningMerger(UpdateStream):
    """Merges adapters one at a time by making their stacked singular frames orthonormal again (this package).

    A step gives polar([U U_new]) diag(Σ, Σ_new) polar([V V_new])ᵀ. Where no direction depends on others, both frames
    are orthonormal: it is a singular value decomposition, and the next step reads frames and spectrum off the merged
    adapter. Where some do, as with a shared factor, it reads those of the merged adapter all the same (`merge` does,
    too). Nothing else is kept.

    Parameters
    ----------
    rank : int, optional
        Cap on the state's rank per module; what it cuts off is reported in `state.history`.
    scale : float, "auto" or "norm"
        As in `merge`; the norms of the adapters are kept.
    """

    kind = "whitening"

    def __init__(self, rank: Limit = None, scale: Scale = AUTO):
        super().__init__(rank=rank, scale=scale)

    def grow(self, kept: LowRank | None, update: LowRank) -> tuple[LowRank, dict[str, float]]:
        """The step, cut to the cap. A module's first update is taken whole."""
        update = update.to("cpu", working_dtype(update.dtype))  # the state is never half precision
        if kept is None:
            size = update.norm() ** 2
            update, share = update.truncate(rank=self.rank)
        else:
            core = Core.of([kept, update])
            total = whitening(core)
            size = float(total.square().sum())
            update, share = core.lift(total, rank=self.rank)
        return update, {"whole": size, "cut off": share * size}

    def record(self, numbers: Mapping[str, float], state: State[LowRank], norm: float) -> dict[str, float]:
        whole = numbers.get("whole", 0.0)
        rank = max((u.rank for u in state.modules.values()), default=0)
        return {"dropped": numbers.get("cut off", 0.0) / whole if whole else 0.0, "rank": rank}

    def refuse_removal(self, adapter) -> None:
        raise ValueError(
            f"cannot remove {adapter.source} (the state holds {', '.join(self.state.names)}): its directions were"
            " turned to stand at right angles to the others. Merge the others anew, or keep a state of whitened_sum"
            " with no cap, which can forget"
        )
