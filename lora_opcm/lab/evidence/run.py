"""`python -m lora_opcm.lab.evidence.run FOLDER`: train what is missing, merge, evaluate; goes on where it stopped.

Merges run side by side on the cores, and one process evaluates them on a GPU if there is one. Every trial is a line
in FOLDER/outcomes.jsonl when it is done.
"""

import multiprocessing
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from ...files import Adapter
from ...lowrank import LowRank
from ...merging.merge import merge
from ..attach import applied
from ..bases.encoder import MINILM
from ..evaluation import Evaluator
from ..tasks import load_task, tasks
from . import recipes, rows
from .choice import RULE, START, Candidate, chosen, ratio, score, search
from .outcomes import Outcome, Trial, cut, read_lines

ALWAYS = (0, 1, 2, 3)  # steps tried on test texts in any case: what a rule without data may choose
BOUNDS = ("", "own", "joint")
GRAM_TEXTS = 512  # of the training texts of each task, for RegMean
Packed = dict[str, tuple[np.ndarray, np.ndarray]]  # factors by module, as they travel between processes
Merged = tuple[list[Packed], float, dict]


def merge_trial(trial: Trial, folder: str) -> Merged:
    """The merged adapters of a trial, one for each of its options; the mean norm of their parts; what it took."""
    torch.set_num_threads(1)
    adapters = [recipes.adapter(folder, trial.recipe, trial.seed, task) for task in trial.tasks]
    mean = float(np.mean([a.norm() for a in adapters]))
    found, about = [], {"seconds": [], "rank": [], "dropped": []}
    for options in trial.options:
        start = time.perf_counter()
        merged = _merged(adapters, trial, options)
        about["seconds"].append(round(time.perf_counter() - start, 3))
        about["rank"].append(max(u.rank for u in merged.modules.values()))
        about["dropped"].append(round(max(merged.dropped.values(), default=0.0), 6))  # by the last cut of a stream
        found.append({name: (u.left.numpy(), u.right.numpy()) for name, u in merged.modules.items()})
    return found, mean, about


def _merged(adapters: list[Adapter], trial: Trial, options: dict) -> Adapter:
    rest = options if trial.natural else options | {"scale": 1.0}
    if trial.cap is None or trial.method == "whitened_sum":
        cap = {} if trial.cap is None else {"cap": trial.cap}
        return merge(adapters, trial.method, rank=trial.rank, **rest, **cap)
    state = adapters[0]
    for new in adapters[1:]:
        state = merge([state, new], trial.method, rank=trial.cap, dtype=torch.float32, **rest)
    return state


class Bench:
    """Evaluates trials on all validation and test texts of their tasks.

    On another base than MiniLM, or of a limited number of texts, the grid of scales begins with the rule without data
    and its neighbours, and test texts are asked of the rule (of two adapters, of four or more) and of what validation
    chose: it is for machines that have no day.
    """

    def __init__(self, names: Iterable[str], limit: int | None = None, base: str = MINILM):
        data = [load_task(name) for name in names]
        self.splits = {s: Evaluator(data, s, limit=limit, base=base, fast=True) for s in ("validation", "test")}
        whole = base == MINILM and limit is None
        self.start, self.always = (START, ALWAYS) if whole else ((RULE - 1, RULE, RULE + 1), (RULE - 1, RULE))
        self.device = self.splits["test"].model.device
        self.name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"

    def correct(self, split: str, names: tuple[str, ...], adapter: Adapter | None, scale: float = 1.0) -> np.ndarray:
        """Which texts of the tasks are right, one task after the other."""
        found = self.splits[split].correct(adapter, names, scale=scale)
        return np.concatenate([found[name] for name in names])

    def sizes(self, names: tuple[str, ...]) -> dict[str, list[int]]:
        return {split: [len(e.labels[name]) for name in names] for split, e in self.splits.items()}

    def bounds(self, trial: Trial, folder: str) -> Outcome:
        """What needs no merge: the base model, each task with its own adapter, one adapter trained on all."""
        found = {}
        for split in self.splits:
            parts = [self.correct(split, (task,), adapter_of(trial, folder, task)) for task in trial.tasks]
            found[split] = {(0, 0): np.concatenate(parts)}
        return Outcome(trial, [0.0], 0.0, found["validation"], found["test"], self.sizes(trial.tasks))

    def outcome(self, trial: Trial, merged: Merged, like: Adapter, steps: tuple[Candidate, ...] | None) -> Outcome:
        """Of a trial whose merges are done, of adapters `like` this one; `steps` are its own or those it follows."""
        packed, mean, about = merged
        adapters = [self._here(one, like) for one in packed]
        norms, names, sizes = [a.norm() for a in adapters], trial.tasks, self.sizes(trial.tasks)
        right = {"validation": {}, "test": {}}

        def see(split: str, i: int, step: int) -> np.ndarray:
            if (i, step) not in right[split]:
                scale = 1.0 if trial.natural else ratio(step) * mean / norms[i]
                right[split][i, step] = self.correct(split, names, adapters[i], scale)
            return right[split][i, step]

        if trial.natural:
            candidates: set[Candidate] = {(0, 0)}
        elif steps is not None:
            candidates = set(steps)
        else:
            search(lambda i, step: score(see("validation", i, step), sizes["validation"]), len(adapters), self.start)
            picked = chosen(right["validation"], names, sizes["validation"])
            candidates = {*picked, *((picked[0][0], step) for step in self.always)}
        for i, step in sorted(candidates):
            see("test", i, step)
        return Outcome(trial, norms, mean, **right, sizes=sizes, about=about)

    def regmean(self, trial: Trial, folder: str) -> Outcome:
        """RegMean, whose Gram matrices are of the inputs that training texts give with each task's own adapter."""
        adapters = {task: recipes.adapter(folder, trial.recipe, trial.seed, task) for task in trial.tasks}
        evaluator, found = self.splits["test"], []
        for task, adapter in adapters.items():
            texts = evaluator.base.encode(load_task(task), "train", GRAM_TEXTS)
            found.append(grams(evaluator, adapter, texts))
        merged = merge(list(adapters.values()), "regmean", grams=found, dtype=torch.float32)
        right = {(0, 0): self.correct("test", trial.tasks, merged)}
        mean = float(np.mean([a.norm() for a in adapters.values()]))
        return Outcome(trial, [merged.norm()], mean, {}, right, self.sizes(trial.tasks))

    def _here(self, packed: Packed, like: Adapter) -> Adapter:
        place = lambda x: torch.from_numpy(x).to(self.device)  # noqa: E731
        return like.with_modules({name: LowRank(*map(place, factors)) for name, factors in packed.items()})


@torch.inference_mode()
def grams(evaluator: Evaluator, adapter: Adapter, texts: list) -> dict[str, torch.Tensor]:
    """XᵀX (n, n) of the inputs of every module of the adapter, over the tokens of some texts."""
    found, base = {}, evaluator.base
    batch = {k: t.to(evaluator.model.device) for k, t in base.collate(texts).items()}
    tokens = batch["attention_mask"].bool()

    def look(name):
        def hook(module, inputs, output):
            x = inputs[0][tokens].float()
            found[name] = (x.mT @ x).cpu()

        return hook

    with applied(evaluator.model, adapter, evaluator.exact):
        handles = [evaluator.model.get_submodule(n).register_forward_hook(look(n)) for n in adapter.modules]
        try:
            base.embed(evaluator.model, batch)
        finally:
            for handle in handles:
                handle.remove()
    return found


def adapter_of(trial: Trial, folder: str, task: str) -> Adapter | None:
    """What a bound evaluates on a task."""
    if not trial.method:
        return None
    recipe, name = ("joint", "joint") if trial.method == "joint" else (trial.recipe, task)
    return recipes.adapter(folder, recipe, trial.seed, name)


def needs(trial: Trial) -> list[recipes.Wanted]:
    """The adapters of a trial."""
    if trial.method == "joint":
        return [("joint", trial.seed, "joint")]
    return [(recipes.source(trial.recipe, task), trial.seed, task) for task in trial.tasks if trial.method]


def follow(trial: Trial) -> tuple:
    """What trials share that differ in the order of their tasks alone."""
    return trial.part, trial.label, trial.rank, trial.seed, trial.recipe, frozenset(trial.tasks)


def run_trials(
    trials: list[Trial],
    folder: Path,
    bench: Bench,
    workers: int,
    deadline: float = float("inf"),
    done: Iterable[Outcome] = (),
) -> Iterator[Outcome]:
    """Merge in processes, evaluate here, in about the order given; what needs adapters that train now waits.

    So does an order of tasks, until the first order of the same has chosen a scale, here or in what is `done`.
    """
    followed = {follow(trial) for trial in trials if trial.steps == ()}
    leaders: dict[tuple, tuple[Candidate, ...]] = {}

    def lead(outcome: Outcome) -> None:
        trial = outcome.trial
        if trial.steps is None and not trial.natural and follow(trial) in followed:
            leaders[follow(trial)] = (outcome.picked[0],)

    def can_run(trial: Trial) -> bool:
        return (trial.steps != () or follow(trial) in leaders) and ready(trial, folder)

    for outcome in done:
        lead(outcome)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare) as pool:
        waiting, running = list(trials), dict[Future, Trial]()
        while (waiting or running) and time.monotonic() < deadline:
            free = max(0, 3 * workers - len(running))
            for trial in list(islice(filter(can_run, waiting), free)):
                waiting.remove(trial)
                if trial.method in BOUNDS:
                    yield bench.bounds(trial, str(folder))
                elif trial.method == "regmean":
                    yield bench.regmean(trial, str(folder))
                else:
                    running[pool.submit(merge_trial, trial, str(folder))] = trial
            finished = wait(running, timeout=1, return_when=FIRST_COMPLETED).done if running else time.sleep(1) or ()
            for future in sorted(finished, key=lambda f: list(running).index(f)):
                trial = running.pop(future)
                steps = leaders[follow(trial)] if trial.steps == () else trial.steps
                like = recipes.adapter(str(folder), trial.recipe, trial.seed, trial.tasks[0])
                outcome = bench.outcome(trial, future.result(), like, steps)
                lead(outcome)
                yield outcome
        pool.shutdown(wait=False, cancel_futures=True)


def ready(trial: Trial, folder: Path) -> bool:
    """Whether the adapters of a trial are trained."""
    return all(recipes.there(folder, *one) for one in needs(trial))


def _prepare():
    torch.set_num_threads(1)


def wanted(trials: Iterable[Trial]) -> list[recipes.Wanted]:
    """The adapters that trials need, in order; and a control of MiniLM whose labels say nothing of their texts."""
    mine = any(recipes.base(trial.recipe) == MINILM for trial in trials)
    control = [("shuffled labels", 1, task) for task in tasks() if mine]
    return list(dict.fromkeys([*(one for trial in trials for one in needs(trial)), *control]))


def main(
    folder: Annotated[Path, typer.Argument(help="adapters, and outcomes.jsonl")],
    part: Annotated[
        list[str] | None, typer.Option(help="of the run: bake_off, stream, pairs, …; all unless given")
    ] = None,
    base: Annotated[
        str, typer.Option(help="minilm; or mpnet, an encoder, or smollm2, a language model: main rows")
    ] = MINILM,
    seed: Annotated[list[int] | None, typer.Option(help="of training; all, or 1 on another base, unless given")] = None,
    train: Annotated[bool, typer.Option(help="train the adapters that are missing")] = True,
    workers: Annotated[int, typer.Option(help="processes that merge, and that train on a GPU; 0: one a core")] = 0,
    seconds: Annotated[float, typer.Option(help="when to stop; what is done by then is kept")] = float("inf"),
    limit: Annotated[int, typer.Option(help="texts a task and split, for a rehearsal; 0: all")] = 0,
):
    """Run all trials of the published run on a base that are not in FOLDER/outcomes.jsonl yet."""
    deadline, begun = time.monotonic() + seconds, time.monotonic()
    workers = workers or multiprocessing.cpu_count()
    trials = rows.published() if base == MINILM else [t for s in seed or [1] for t in rows.elsewhere(base, s)]
    trials = [t for t in trials if (not part or t.part in part) and (not seed or t.seed in seed)]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "outcomes.jsonl"
    cut(file)
    done = list(read_lines(file))
    known = {outcome.trial for outcome in done}
    left = [t for t in trials if t not in known]
    trainer = None
    if train:
        many = workers if torch.cuda.is_available() else 1
        arguments = (str(folder), wanted(trials), many, deadline)
        trainer = multiprocessing.get_context("spawn").Process(target=recipes.train_missing, args=arguments)
        trainer.start()
    bench = Bench(dict.fromkeys(task for t in trials for task in t.tasks), limit or None, base)
    print(f"{len(left)} trials, texts read after {time.monotonic() - begun:.0f} s", flush=True)
    if trainer and torch.cuda.is_available():
        trainer.join()  # a card that trains and evaluates at once does both more slowly
    with open(file, "a") as out:
        for i, outcome in enumerate(run_trials(left, folder, bench, workers, deadline, done), 1):
            outcome.about["device"] = bench.name
            out.write(outcome.line() + "\n")
            out.flush()
            if i % 20 == 0 or i == len(left):
                name = f"{outcome.trial.part}, seed {outcome.trial.seed}, {outcome.trial.label}"
                print(f"{i} of {len(left)} after {time.monotonic() - begun:.0f} s: {name}", flush=True)
    if trainer:
        trainer.terminate() if time.monotonic() > deadline else trainer.join()


if __name__ == "__main__":
    typer.run(main)
