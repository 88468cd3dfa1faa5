"""A table of what every method gave for two small adapters: nothing of it may move unnoticed.

It says that a result changed, not which is right: that is for `test_references.py`. Where a change is meant,
`python tests/test_golden.py` writes the table again, and its diff shows which methods and options moved.

Left out is what rounding decides, and no table can hold: `rank` and `energy` of a flat spectrum, whose leading
directions are any (Iso-C, Iso-CTS, subspace boosting, whitened sums of power 1; the last with a `cap` too); and chordal
means of fewer directions than the only adapter of module c has, all of them being as good. Karcher means are in: of two
subspaces with no right angle between them there is one, and the iteration starts there. `lora_opcm` depends on the
gauge, and is in with the one of the fixed adapters.
"""

import json
from pathlib import Path

import pytest
import torch
from factories import adapter, dense

import lora_opcm as lo

TABLE = Path(__file__).with_name("golden_merges.json")
SHAPES = {"a": (8, 12), "b": (14, 6), "c": (7, 9)}
COMMON = [{}, {"rank": 2}, {"energy": 0.9}, {"weights": [0.6, -1.5]}]
OPTIONS = {
    "mean": [{}],
    "task_arithmetic": [{}, {"scale": 0.3}],
    "cat": [{}],
    "svd": [{}, {"scale": -2}],
    "ties": [{}, {"density": 0.6, "scale": 2}],
    "dare": [{}, {"density": 0.3}, {"seed": 7}],
    "dare_ties": [{}, {"density": 0.3}, {"seed": 7}],
    "magnitude_prune": [{}, {"density": 0.3, "scale": 2}],
    "knots_ties": [{}, {"density": 0.3, "scale": 2}],
    "tsv": [{}, {"directions": 2}, {"scale": 0.4}],
    "iso_c": [{}, {"scale": 0.4}],
    "iso_cts": [{}, {"common": 0.5, "scale": 2}, {"common": 0}],
    "core_ties": [{}, {"density": 0.3, "scale": 2}],
    "core_dare_ties": [{}, {"density": 0.3}, {"seed": 7}],
    "regmean": [{}],
    "ctm": [{}, {"k": 2}, {"rule": "ties"}, {"rule": "ties", "k": 4, "density": 0.3}],
    "chordal_mean": [{}, {"k": 2, "scale": 2}],
    "karcher_mean": [{}, {"k": 2, "scale": 2}],
    "quotient_mean": [{}, {"k": 2, "scale": 2}, {"steps": 2}],
    "opcm": [
        {}, {"alpha": 0}, {"alpha": 0.25}, {"alpha": 1}, {"variant": "fusionbench"},
        {"alpha": 0.8, "variant": "fusionbench"}, {"scale": 0.7},
    ],
    "lora_opcm": [{}, {"gauge": "balanced"}, {"alpha": 0.2}, {"alpha": 1, "gauge": "balanced"}],
    "whitened_sum": [{}, {"power": 0}, {"power": 1}, {"cap": 2}, {"power": 0.2, "cap": 4, "scale": 2},
                     {"sides": "left"}, {"sides": "right", "power": 0}, {"sides": "left", "power": 1, "cap": 3}],
    "whitening": [{}, {"scale": 0.4}],
    "magmax": [{}, {"scale": 0.5}],
    "subspace_boosting": [{}, {"beta": 0.2, "scale": 2}, {"beta": 1}],
    "svc": [{}, {"alpha": 0.4, "scale": 2}],
    "pico": [{}, {"scale": 2}],
    "wudi": [{}, {"ridge": 0}, {"ridge": 0.3, "scale": 0.4}],
    "actmat": [{}, {"ridge": 0.3, "scale": 2}],
    "dop": [{}, {"alpha": 0.3, "scale": 2}],
}  # fmt: skip


def flat(method, options):
    one_side = options.get("sides", "both") != "both"
    return method in ("iso_c", "iso_cts", "subspace_boosting") or (options.get("power") == 1 and not one_side)


CASES = {
    " ".join([method, *(f"{k}={v}" for k, v in (options | common).items())]): (method, options | common)
    for method, several in OPTIONS.items()
    for options in several
    for common in COMMON
    if not (flat(method, options) and ("rank" in common or "energy" in common))
}


def numbers(method, options):
    """module -> the norm of the merged ΔW, and its component along one fixed direction, to ten decimals."""
    generator = torch.Generator().manual_seed(20)
    adapters = [adapter(SHAPES, 3, generator, torch.float64) for _ in range(2)]
    adapters[1] = adapters[1].with_modules({n: adapters[1].modules[n] for n in "ab"})
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    directions = {n: draw(*shape) for n, shape in SHAPES.items()}
    inputs = [{n: draw(20, shape[1]) for n, shape in SHAPES.items()} for _ in adapters]
    if method == "chordal_mean" and "k" in options:
        adapters = [a.with_modules({n: a.modules[n] for n in "ab"}) for a in adapters]
    if method == "regmean":
        options = options | {"grams": [{n: x.mT @ x for n, x in one.items()} for one in inputs]}
    merged = {n: dense(u) for n, u in lo.merge(adapters, method, **options).modules.items()}
    found = {n: (x.norm(), (x * directions[n]).sum() / directions[n].norm()) for n, x in merged.items()}
    return {n: [round(float(x), 10) + 0.0 for x in pair] for n, pair in found.items()}


@pytest.fixture(scope="module")
def table():
    return json.loads(TABLE.read_text())


def test_the_table_holds_every_method_and_case(table):
    assert set(OPTIONS) == set(lo.methods().index)
    assert set(table) == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_golden(case, table):
    found = numbers(*CASES[case])
    assert set(found) == set(table[case])
    for name, (norm, component) in table[case].items():
        assert found[name] == pytest.approx([norm, component], abs=1e-6 * norm + 1e-9, rel=0), name


if __name__ == "__main__":
    rows = [f"{json.dumps(case)}: {json.dumps(numbers(*CASES[case]))}" for case in CASES]
    TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n")
