"""Plain sums, the baseline of everything."""

from torch import Tensor

from ..batch import Batch
from ..core import Core
from ..method import merge_method


def whole(count: int) -> float:
    return 1.0


@merge_method("cat", source="exact sum; peft's cat", keeps="one sum", plain=True, share=whole, batched=True)
def cat(core: Core | Batch) -> Tensor:
    """The exact sum of the updates, of the sum of their ranks."""
    return core.total()


@merge_method(
    "mean", source="Wortsman et al., arXiv 2203.05482", keeps="one sum", share=lambda count: 1 / count, batched=True
)
def mean(core: Core | Batch) -> Tensor:
    """The mean of the updates."""
    return core.total() / len(core.factors)


@merge_method(
    "task_arithmetic", source="Ilharco et al., arXiv 2212.04089", keeps="one sum", plain=True, share=whole, batched=True
)
def task_arithmetic(core: Core | Batch) -> Tensor:
    """The sum of the updates, as large as they are together."""
    return core.total()


@merge_method(
    "svd", source="Eckart and Young 1936; peft's svd", keeps="one sum", largest=True, share=whole, batched=True
)
def svd(core: Core | Batch) -> Tensor:
    """The sum, cut to the largest rank among the adapters unless told otherwise."""
    return core.total()
