"""Evaluation of causal language models, left to lm-evaluation-harness."""

import logging
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
import yaml

from ..assets import AssetError, cache_dir
from ..attach import applied
from ..bases import load
from ..bases.causal import Causal
from ..evaluation import Remembering
from ..tasks.prompts import Function, Prompts


class Harness(Remembering):
    """Evaluates adapters of a causal model on generation tasks; `correct` gives the metric of every answer.

    Parameters
    ----------
    tasks : sequence of Prompts
    base : str
        The model, by hub name or folder.
    limit : int, optional
        Questions per task, the first ones; None asks all.
    quantise : {"", "8bit", "4bit"}
        Of the base, through bitsandbytes.
    batch_size : int or "auto"
    remember : bool
        Keep every answer's metric on disk, by the content of adapter and task and the name of the base.
    unsafe : bool
        Allow tasks that run what the model wrote (HumanEval).

    Attributes
    ----------
    reports : dict
        What the harness itself reports (its aggregates and standard errors), per task, of the last call that
        asked the model. Corpus metrics such as BLEU stand only there.

    Raises
    ------
    AssetError
        If lm-evaluation-harness is not installed.
    ValueError
        If the base is no causal language model.
    """

    def __init__(
        self,
        tasks: Sequence[Prompts],
        base: str,
        limit: int | None = None,
        quantise: str = "",
        batch_size: int | str = 8,
        remember: bool = False,
        unsafe: bool = False,
    ):
        try:
            import lm_eval  # noqa: F401
        except ImportError:
            raise AssetError("language models are evaluated by lm-eval: pip install 'lora-opcm[llm]'") from None
        self.base = load(base, quantise)
        if not isinstance(self.base, Causal):
            raise ValueError(f"{base}: not a causal language model but of the family {self.base.family}")
        if torch.cuda.is_available() and not quantise:
            self.base.model.cuda()
        self.tasks = {task.name: task for task in tasks}
        self.limit, self.batch_size, self.unsafe = limit, batch_size, unsafe
        self.fast = quantise or str(self.base.model.dtype)
        self.memory = cache_dir() / "evaluations" if remember else None
        self.reports = {}

    def _content(self, name: str) -> list:
        task = self.tasks[name]
        return [
            self.base.name,
            task.harness,
            str(task.config),
            task.sha256,
            task.metric,
            task.keep,
            self.limit,
        ]

    def _correct(self, adapter, names: list[str], progress: str, scale: float) -> dict[str, np.ndarray]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        manager, found = TaskManager(), {}
        aside = redirect_stdout(sys.stderr)  # remarks of the harness's own modules
        with applied(self.base.model, adapter, scale=scale) as model, tempfile.TemporaryDirectory() as scratch, aside:
            lm = HFLM(model, tokenizer=self.base.tokenizer, batch_size=self.batch_size, truncation=True)
            for name in names:
                task = self.tasks[name]
                file = Path(scratch, f"{name}.yaml")
                file.write_text(_yaml(task, manager))
                report = simple_evaluate(
                    lm,
                    tasks=[str(file)],
                    task_manager=manager,
                    limit=self.limit,
                    bootstrap_iters=0,
                    confirm_run_unsafe_code=self.unsafe,
                )
                self.reports[name] = report["results"][name]
                rows = [row for row in report["samples"][name] if row["filter"] == task.keep]
                found[name] = np.array([_score(row[task.metric], task.metric) for row in rows], dtype=float)
        return found


class _Dumper(yaml.SafeDumper):
    """YAML as the harness reads it, with functions by name."""


_Dumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def _yaml(task: Prompts, manager) -> str:
    """The config of a task as a file of its own, on top of the registered one where there is one."""
    base = {"include": str(manager.task_index[task.harness].yaml_path)} if task.harness else {}
    return yaml.dump(base | {"task": task.name} | task.config, Dumper=_Dumper)


def _score(value, metric: str) -> float:
    """One answer's metric in [0, 1]; chrF, to the harness a metric of the whole corpus, by sentence here."""
    if metric == "chrf":
        from sacrebleu import sentence_chrf

        reference, answer = value
        return sentence_chrf(answer, [reference]).score / 100
    return float(value)
