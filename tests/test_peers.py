"""Other packages, timed beside a merge, are asked for the same update."""

import pytest

import lora_opcm as lo
from lora_opcm.lab.experiments.peers import COUNT, RANK, against_peers, peft_model, updates


@pytest.mark.parametrize("method, kind, options", [("svd", "svd", {}), ("ties", "ties_svd", {"density": 0.2})])
def test_peft_gives_the_update_of_the_merge_beside_it(method, kind, options):
    layers = {name: updates(40, 28, seed=i) for i, name in enumerate("01")}
    model = peft_model(layers)
    model.add_weighted_adapter([str(t) for t in range(COUNT)], [1.0] * COUNT, "merged", kind, svd_rank=RANK, **options)
    adapters = [lo.Adapter({name: parts[t] for name, parts in layers.items()}) for t in range(COUNT)]
    merged = lo.merge(adapters, method, rank=RANK, scale=1.0, **options)
    for name in layers:
        theirs = model.base_model.model.get_submodule(name).get_delta_weight("merged")
        here = merged.modules[name].delta()
        assert (theirs - here).norm() < 1e-4 * here.norm()


def test_every_peer_has_its_times():
    found = against_peers(24, rounds=1).set_index("peer")
    assert {"peft, svd", "peft, ties_svd", "FusionBench, OPCM restated"} <= set(found.index)
    assert (found[["ours, ms", "peer, ms", "times ours"]] > 0).all(axis=None)
