"""Random updates and adapters, and the dense algorithms they are held against."""

import torch

from lora_opcm import Adapter, LowRank


def update(m, n, r, generator, dtype=torch.float32, scale=1.0) -> LowRank:
    left = torch.randn(m, r, generator=generator, dtype=torch.float64)
    right = torch.randn(r, n, generator=generator, dtype=torch.float64)
    return LowRank((scale * left).to(dtype), right.to(dtype))


def adapter(shapes, rank, generator, dtype=torch.float32) -> Adapter:
    return Adapter({name: update(m, n, rank, generator, dtype) for name, (m, n) in shapes.items()})


def dense(u: LowRank) -> torch.Tensor:
    return u.left.double() @ u.right.double()


def error(u: LowRank, reference: torch.Tensor) -> float:
    """Relative Frobenius distance."""
    return float((dense(u) - reference).norm() / reference.norm())


def dense_opcm(deltas: list[dict[str, torch.Tensor]], alpha: float, variant: str) -> dict[str, torch.Tensor]:
    """OPCM on dense float64 matrices, step by step with its λ, as the paper and the released code write it.

    The one departure is stated in the definition: the diagonal is cleared only on nonzero directions.
    """
    norm = lambda d: sum(x.norm() ** 2 for x in d.values()) ** 0.5  # noqa: E731
    merged, norms, lam = dict(deltas[0]), [norm(deltas[0])], 1.0
    for delta in deltas[1:]:
        norms.append(norm(delta))
        total = {}
        for name, d in delta.items():
            u, s, vh = torch.linalg.svd(merged[name], full_matrices=True)
            nonzero = int((s > 1e-6 * s[0]).sum())
            share = s.cumsum(0) / s.sum()
            p = u.mT @ d @ vh.mT
            p.diagonal()[:nonzero] = 0
            if variant == "fusionbench":
                k = int((share <= alpha).sum())
                p[:k, :k] = 0
            else:
                k = 0 if alpha == 0 else int((share < alpha).sum()) + 1
                p[:k, :] = 0
                p[:, :k] = 0
            total[name] = lam * merged[name] + u @ p @ vh
        lam_next = norm(total) / (sum(norms) / len(norms))
        merged, lam = {name: x / lam_next for name, x in total.items()}, lam_next
    return merged
