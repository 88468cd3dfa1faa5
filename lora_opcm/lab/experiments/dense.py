"""OPCM of whole matrices, as its paper and its released code have it: what the core space is measured against."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def step(merged: Tensor, delta: Tensor, alpha: float = 0.5) -> Tensor:
    """One more update, both shape=[m, n], by the SVD of the whole sum.

    Source: arXiv 2501.09522, equations 5 to 9. The diagonal is cleared where σ is not rounding noise.
    """
    u, s, vh = torch.linalg.svd(merged)
    k = int((s.cumsum(0) / s.sum() < alpha).sum()) + 1
    p = u.mT @ delta @ vh.mT
    p.diagonal()[: int((s > 1e-6 * s[0]).sum())] = 0
    p[:k], p[:, :k] = 0, 0
    return merged + u @ p @ vh


def fusionbench(layers: Mapping[str, Sequence[Tensor]], alpha: float = 0.5) -> dict[str, Tensor]:
    """All updates of all layers, each shape=[m, n], by the algorithm of FusionBench, restated from its description.

    Its package does not import beside transformers 5. Of what lies before `alpha` of the nuclear norm the k × k block
    is cleared, and all of the diagonal; at the end the whole has the mean norm of the updates.
    """
    merged = {}
    for name, (first, *rest) in layers.items():
        total = first.clone()
        for delta in rest:
            u, s, vh = torch.linalg.svd(total)
            k = int((s.cumsum(0) / s.sum() <= alpha).sum())
            p = u.mT @ delta @ vh.mT
            p.diagonal().zero_()
            p[:k, :k] = 0
            total += u @ p @ vh
        merged[name] = total
    norm = lambda parts: torch.stack([x.square().sum() for x in parts]).sum().sqrt()  # noqa: E731
    mean = torch.stack([norm(parts) for parts in zip(*layers.values(), strict=True)]).mean()
    return {name: total * (mean / norm(merged.values())) for name, total in merged.items()}
