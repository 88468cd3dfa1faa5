"""Other packages on the same adapters, in turn with what answers the same question here."""

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch

from ...files import Adapter, save_adapter
from ...lowrank import LowRank
from ...merging.merge import merge
from .cost import in_turn
from .dense import fusionbench

RANK, COUNT = 16, 8


def updates(m: int, n: int, count: int = COUNT, seed: int = 0, own: float = 1.0) -> list[LowRank]:
    """Random updates; with `own` below 1 their right factors are one random start and that share of their own."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    start = make(RANK, n) if own < 1 else torch.zeros(RANK, n)
    return [LowRank(make(m, RANK), start + own * make(RANK, n)) for _ in range(count)]


def against_peers(size: int = 1024, rounds: int = 2) -> pd.DataFrame:
    """Eight adapters of two square layers: peft's `add_weighted_adapter`, the OPCM of FusionBench (restated, see
    `dense`), and the common subspace that lorashare makes of adapter files (SHARE; with the extra `peers`).

    Returns
    -------
    DataFrame
        One line a peer: `peer` and `ours`, the processor's milliseconds of both, and by the clock how many times ours
        the peer takes, the median of `rounds`.
    """
    layers = {str(i): updates(size, size, seed=i) for i in range(2)}
    ours = [Adapter({name: parts[t] for name, parts in layers.items()}) for t in range(COUNT)]
    with tempfile.TemporaryDirectory() as folder:
        pairs = [*_peft(layers, ours), *_fusionbench(layers, ours), *_lorashare(ours, folder)]
        rows = []
        for name, way, peer, other in pairs:
            used, ratio = in_turn({name: way, peer: other}, rounds)
            ms, theirs = used.values()
            times = next(iter(ratio.values()))
            rows.append({"peer": peer, "ours": name, "ours, ms": ms, "peer, ms": theirs, "times ours": times})
    return pd.DataFrame(rows)


Pair = tuple[str, Callable, str, Callable]  # what is ours and how to run it; what is theirs and how


def peft_model(layers: dict[str, list[LowRank]]):
    """A model of these linear layers alone that carries their updates as adapters "0", "1", … of peft."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(layers))
    linear = (torch.nn.Linear(*reversed(parts[0].shape)) for parts in layers.values())
    model = get_peft_model(torch.nn.Sequential(*linear), config, "0")
    for t in map(str, range(COUNT)):
        if t != "0":
            model.add_adapter(t, config)
        for name, parts in layers.items():
            layer = model.base_model.model.get_submodule(name)
            layer.lora_A[t].weight.data, layer.lora_B[t].weight.data = parts[int(t)].right, parts[int(t)].left
    return model


def _peft(layers: dict[str, list[LowRank]], ours: list[Adapter]) -> list[Pair]:
    model, names = peft_model(layers), [str(t) for t in range(COUNT)]

    def theirs(kind: str, **options) -> Callable:
        def way():
            model.add_weighted_adapter(names, [1.0] * COUNT, "merged", kind, svd_rank=RANK, **options)
            model.delete_adapter("merged")

        return way

    return [
        ("svd", lambda: merge(ours, "svd", rank=RANK), "peft, svd", theirs("svd")),
        ("ties", lambda: merge(ours, "ties", rank=RANK), "peft, ties_svd", theirs("ties_svd", density=0.2)),
    ]


def _fusionbench(layers: dict[str, list[LowRank]], ours: list[Adapter]) -> list[Pair]:
    deltas = {name: [u.delta() for u in parts] for name, parts in layers.items()}
    way = lambda: merge(ours, "opcm", variant="fusionbench")  # noqa: E731
    return [("opcm, its cut", way, "FusionBench, OPCM restated", lambda: fusionbench(deltas))]


def _lorashare(ours: list[Adapter], folder: str) -> list[Pair]:
    if not find_spec("lorashare"):
        return []
    from lorashare import SHAREModel

    files = [str(save_adapter(a, Path(folder, f"adapter{t}"), format="peft")) for t, a in enumerate(ours)]
    way = lambda: merge(files, "chordal_mean", k=2 * RANK)  # noqa: E731
    other = lambda: SHAREModel.from_adapters(files, num_components=2 * RANK)  # noqa: E731
    return [("chordal mean of files", way, "lorashare, subspace of files", other)]
