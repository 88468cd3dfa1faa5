"""The same methods on several bases, side by side, all three on the book's texts, SmolLM2 on puzzles too; and on
adapters of one base that were trained otherwise.

Gains are recovered gains in per cent with their resamples, shape=[1 + resamples]; the first is no resample.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from .evidence import growth, tables
from .evidence.choice import RULE, ratio, rule
from .evidence.recipes import UNEVEN, source
from .evidence.rows import AS_PUBLISHED, MAIN
from .evidence.tables import Evidence, Row, interval
from .generation import tables as generation
from .tasks import tasks

PLAIN = "task arithmetic"
RECIPES = "recipes.xz"  # the outcomes of adapters trained otherwise
SAID = {"OPCM, α = 0.75": "OPCM", "whitened sum, p = 0.5": "whitened sum"}  # a row of puzzles → the row of texts


@dataclass(frozen=True, eq=False)
class Landed:
    """A method on a base.

    Attributes
    ----------
    gain : array, shape=[1 + resamples]
        At the scale that validation chose.
    scale : float
        That scale, in mean norms; over training seeds the median.
    lost : array, shape=[1 + resamples], or None
        How much less of the gain the rule without data keeps, on the same examples; None where it was not tried.
    """

    gain: np.ndarray
    scale: float
    lost: np.ndarray | None


Base = Mapping[str, Landed]


def elsewhere(base: str = "mpnet") -> Evidence:
    """The outcomes of the text tasks on another base than MiniLM, by its name in `embedded`."""
    return tables.published(f"{base}.xz")


def texts(evidence: Evidence, rank: int | None, rows: Mapping[tuple, Row] | None = None) -> dict[str, Landed]:
    """Every row on texts, of the bake-off unless given."""
    found = {}
    for (label, cut), row in (evidence.bake_off if rows is None else rows).items():
        if cut == rank and not row.outcomes[0].trial.natural:
            at = tables.at_step(evidence, row.outcomes, RULE)
            found[label] = Landed(row.draws, float(np.median(row.ratios)), row.draws - at.draws if at else None)
    return found


def puzzles(run: generation.Run, rank: int | None, metric: str) -> dict[str, Landed]:
    """Every row of puzzles by one metric, "right" or "likelihood".

    The rule was marked on validation questions only, so what it loses is counted on these.
    """
    found = {}
    for row in run.rows:
        if row.rank == rank:
            gain = 100 * run.gain(generation.tested(run, row, metric)[0], metric)
            rule = generation.fixed(run, row, ratio(RULE), metric)
            lost = None if rule is None else 100 * (_validated(run, row, metric) - rule)
            found[SAID.get(row.label, row.label)] = Landed(gain, row.scale, lost)
    return found


def _validated(run: generation.Run, row: generation.Merge, metric: str) -> np.ndarray:
    """The gain on validation questions at the scale that they choose, in every resample."""
    tried = row.marks["validation"]
    means = run.weights["validation"] @ np.stack([marks[metric] for marks in tried.values()], 1)
    chosen = np.array(list(tried)) == generation.picks(run, row)[:, None]
    return run.gain(means[chosen], metric, "validation")


def bases(rank: int | None = None) -> dict[str, Base]:
    """Base → its rows: of SmolLM2 on texts, then on puzzles by log likelihood and by exact match."""
    run = generation.Run()
    return {
        "MiniLM": texts(tables.published(), rank),
        "mpnet": texts(elsewhere("mpnet"), rank),
        "SmolLM2, texts": texts(elsewhere("smollm2"), rank),
        "SmolLM2, likelihood": puzzles(run, rank, "likelihood"),
        "SmolLM2, exact": puzzles(run, rank, "right"),
    }


def recipes(alike: bool = False) -> dict[str, Base]:
    """Recipe of training → the main rows, as ranks come, all of rank 16 and one seed: first the published recipe.

    If `alike`, that is counted on the test texts that the others were tried on, which are the first ones of all.
    """
    other = tables.published(RECIPES)
    run = _alike(other) if alike else tables.published()
    (seed,) = {outcome.trial.seed for outcome in other.outcomes}
    names = [name for name in dict.fromkeys(o.trial.recipe for o in other.outcomes) if not name.startswith("rank")]
    parts = {name: (other, other.select("robustness", recipe=name)) for name in names}
    parts = {"published": (run, {(m, None): run.select("bake_off", (seed,))[m, None] for m in MAIN})} | parts
    return {name: texts(evidence, None, evidence.rows(part)) for name, (evidence, part) in parts.items()}


def _alike(other: Evidence) -> Evidence:
    """The bake-off of the training seed of `other`, on as many test texts of each task as it has."""
    (seed,), count = {o.trial.seed for o in other.outcomes}, max(max(o.sizes["test"]) for o in other.outcomes)
    run = tables.published()
    found = [o.first(count) for o in run.outcomes if (o.trial.part, o.trial.seed) == ("bake_off", seed)]
    return Evidence(run.about, found)


def longer(recipe: str = UNEVEN) -> pd.DataFrame:
    """What the main rows keep of the tasks whose adapters `recipe` trained longer, and of the others, in per cent.

    Beside what they keep of the same texts under the published recipe; `value` is how much more the recipe favours the
    first over the others than the published one does, with its 95 % interval over texts; `least` and `most` are the
    ends of an interval so wide that those of all rows together are right in 95 % (Bonferroni).
    """
    other = tables.published(RECIPES)
    run = _alike(other)
    theirs = other.select("robustness", recipe=recipe)
    ours = run.select("bake_off", (theirs[PLAIN, None][0].trial.seed,))
    long = [i for i, task in enumerate(tasks()) if source(recipe, task) != "published"]
    halves = {"longer": long, "others": [i for i in range(len(tasks())) if i not in long]}
    rows = {}
    for label in MAIN:
        found = {"published": run.row(ours[label, None]), recipe: other.row(theirs[label, None])}
        kept = {(half, name): row.of(which) for half, which in halves.items() for name, row in found.items()}
        apart = {name: kept["longer", name] - kept["others", name] for name in found}
        draws = apart[recipe] - apart["published"]
        wide = np.quantile(draws[1:], [0.025 / len(MAIN), 1 - 0.025 / len(MAIN)])
        more = span(draws) | dict(zip(("least", "most"), wide.tolist(), strict=True))
        rows[label] = {f"{half}, {name}": x[0] for (half, name), x in kept.items()} | more
    return pd.DataFrame(rows).T


def common(found: Mapping[str, Base]) -> list[str]:
    """The methods that all bases have, best on the first base first."""
    first, *rest = found.values()
    shared = [label for label in first if all(label in base for base in rest)]
    return sorted(shared, key=lambda label: -first[label].gain[0])


def ahead(found: Mapping[str, Base], of: str = PLAIN) -> pd.DataFrame:
    """How much more of the gain each method keeps than `of`, on every base, with 95 % intervals over examples."""
    rows = [
        (base, label, landed[label].gain - landed[of].gain) for base, landed in found.items() for label in common(found)
    ]
    return pd.DataFrame({"base": base, "method": label} | span(more) for base, label, more in rows)


def ahead_everywhere(found: Mapping[str, Base]) -> list[str]:
    """The methods that keep more than `PLAIN` on every base, by more than the interval of the difference."""
    least = ahead(found).groupby("method", sort=False).low.min()
    return list(least.index[least > 0])


def lengths(found: Mapping[str, Base]) -> pd.DataFrame:
    """The scale that validation chose, in mean norms, shape=[methods, bases]."""
    return pd.DataFrame({base: {label: rows[label].scale for label in common(found)} for base, rows in found.items()})


def ruled(found: Mapping[str, Base]) -> pd.DataFrame:
    """What the rule without data keeps less of the gain than the scale that validation chose, with 95 % intervals."""
    rows = [(base, label, rows[label]) for base, rows in found.items() for label in common(found)]
    return pd.DataFrame(
        {"base": base, "method": label} | span(row.lost) for base, label, row in rows if row.lost is not None
    )


def two(evidence: Evidence) -> pd.DataFrame:
    """What pairs of adapters keep of the gain at scales that nothing chose, all pairs of seed 1 together."""
    found = {label: rows for (label, _), rows in evidence.select("pairs", (1,)).items() if label in AS_PUBLISHED}
    return pd.DataFrame(
        {"method": label, "pairs": len(rows)} | span(evidence.row(rows).draws) for label, rows in found.items()
    )


def few(base: str = "smollm2") -> pd.DataFrame:
    """Two, four and eight adapters of a base in one, at the lengths that validation chose.

    Two and four are of `rows.fours`, whose training seed and texts are not those of all eight.

    Returns
    -------
    DataFrame
        A line a method and number of `adapters`: `value`, `low`, `high`, what is kept of the gain in per cent; `scale`
        in mean norms, of pairs the geometric mean; `more`, how much more is kept than by `PLAIN`, and `lost`, how much
        less the rule without data keeps, each with the ends of its interval.
    """
    evidence, lines = elsewhere(base), []
    kept: dict[tuple[int, str], Landed] = {}
    for label in growth.labels(evidence):
        for count, outcomes in growth.sets(evidence, label).items():
            step = rule(count)
            tuned, ruled = (evidence.row(outcomes, at) for at in (None, lambda o, k=step: (o.picked[0][0], k)))
            scale = float(np.exp(np.log(tuned.ratios).mean()))
            kept[count, label] = Landed(tuned.pooled, scale, tuned.pooled - ruled.pooled)
        kept[len(tasks()), label] = texts(evidence, None)[label]
    for (count, label), row in kept.items():
        line: dict = {"adapters": count, "method": label, "scale": row.scale} | span(row.gain)
        for name, draws in (("more", row.gain - kept[count, PLAIN].gain), ("lost", row.lost)):
            line |= {name: draws[0], f"{name} low": interval(draws)[0], f"{name} high": interval(draws)[1]}
        lines.append(line)
    return pd.DataFrame(lines)


def judged(found: Mapping[str, Base]) -> pd.DataFrame:
    """Lengths, in mean norms, that SmolLM2 asks for by three judges: right `texts`, `likelihood` of puzzles, and
    `whole`, at which most of their validation questions are answered wholly right.

    `last`, whether no longer one was tried of puzzles; `surely`, whether whole answers ask for less than texts do in
    39 of 40 resamples of the questions, within what was tried; `value`, `low`, `high`, how many points of the gain in
    whole answers `whole` has beyond the rule without data, on the questions that chose it.
    """
    run, asked, lines = generation.Run(), lengths(found), {}
    for row in run.rows:
        label = SAID.get(row.label, row.label)
        if row.rank is None and label in asked.index:
            texts, likelihood = asked.loc[label, ["SmolLM2, texts", "SmolLM2, likelihood"]]
            picks, tried = generation.picks(run, row, "right"), list(row.marks["validation"])
            gains = {scale: 100 * generation.fixed(run, row, scale, "right") for scale in tried}
            line = {"texts": texts, "likelihood": likelihood, "whole": picks[0], "last": picks[0] == max(tried)}
            line["surely"] = max(tried) > picks[0] and float((picks[1:] < texts - 1e-2).mean()) >= 0.975
            lines[label] = line | span(gains[picks[0]] - gains[ratio(RULE)])
    return pd.DataFrame(lines).T.reindex(asked.index)


def agreement(found: Mapping[str, Base], without: str = "") -> pd.DataFrame:
    """Spearman's correlation of the methods' gains between every two bases, with 95 % intervals over examples."""
    labels, names, rows = [label for label in common(found) if label != without], list(found), []
    ranks = {name: rankdata([found[name][label].gain for label in labels], axis=0) for name in names}
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            a, b = (ranks[name] - ranks[name].mean(0) for name in (one, other))
            rho = (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))
            rows.append({"one": one, "other": other} | span(rho))
    return pd.DataFrame(rows)


def span(values: np.ndarray) -> dict[str, float]:
    """A value and its 95 % interval, as columns."""
    low, high = interval(values)
    return {"value": float(values[0]), "low": low, "high": high}
