"""OPCM one adapter at a time: the state is the plain sum S = Σ P_t(Δ_t), cut to a rank if one is given."""

from collections.abc import Mapping

from ..lowrank import LowRank
from ..merging.core import Core
from ..merging.rules.projection import project
from ..numerics import working_dtype
from ..values import Limit, Scale, Share, Variant
from .stream import State
from .update import UpdateStream


class ContinualMerger(UpdateStream):
    """Merges adapters one at a time by orthogonal projection (arXiv 2501.09522).

    Parameters
    ----------
    alpha : float in [0, 1]
        Share of the merged update's nuclear norm that is protected from new adapters.
    variant : {"paper", "fusionbench"}
        Two-sided cut, or the released code's block cut.
    scale : "norm", "auto" or float
        "norm" is the published rule, ‖M‖ = mean ‖Δ_t‖; another, as in `merge`, is a different method.
    rank : int, optional
        Cap on the state's rank per module; what it cuts off is reported in `state.history`.

    Its history says of every adapter: `lambda`, the published λ that the merged adapter would be divided by;
    `cleared`, the share of ‖Δ‖² that the projection removed; `dropped`, the share of the new sum's squared norm
    that the cap cut off; and the largest `rank` of a module.
    """

    kind = "opcm"

    def __init__(
        self,
        alpha: Share = 0.5,
        variant: Variant = "paper",
        scale: Scale = "norm",
        rank: Limit = None,
    ):
        super().__init__(alpha=alpha, variant=variant, scale=scale, rank=rank)

    def grow(self, kept: LowRank | None, update: LowRank) -> tuple[LowRank, dict[str, float]]:
        """S + P(Δ), cut to the cap. A module's first update is taken whole."""
        update = update.to("cpu", working_dtype(update.dtype))  # the state is never half precision
        whole = update.norm() ** 2
        if kept is None:
            size = let_in = whole
            update, share = update.truncate(rank=self.rank)
        else:
            core = Core.of([kept, update])
            new = project(core.cores[1], core.cores[0], self.alpha, self.variant, core.dtype)
            total = core.cores[0] + new
            size, let_in = float(total.square().sum()), float(new.square().sum())
            update, share = core.lift(total, rank=self.rank)
        return update, {"whole": whole, "let in": let_in, "cut off": share * size}

    def record(self, numbers: Mapping[str, float], state: State[LowRank], norm: float) -> dict[str, float]:
        size, cut_off = size_of(state), numbers.get("cut off", 0.0)
        whole = numbers.get("whole", 0.0)
        mean = sum(state.norms) / len(state.norms)
        return {
            "lambda": size / mean if size else 1.0,
            "cleared": 1 - numbers.get("let in", 0.0) / whole if whole else 0.0,
            "dropped": cut_off / (size**2 + cut_off) if size else 0.0,
            "rank": max((u.rank for u in state.modules.values()), default=0),
        }

    def refuse_removal(self, adapter) -> None:
        raise ValueError(
            f"cannot remove {adapter.source} (the state holds {', '.join(self.state.names)}): every adapter that came"
            " later was projected against it, and the state keeps only their sum. Merge the others anew, or keep"
            " a state of whitened_sum, which can forget"
        )


def size_of(state: State[LowRank]) -> float:
    """‖S‖_F over all modules of a state."""
    return sum(u.norm() ** 2 for u in state.modules.values()) ** 0.5
