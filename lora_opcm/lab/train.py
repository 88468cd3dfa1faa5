"""`python -m lora_opcm.lab.train FOLDER`: train the adapters of the protocol that are not there yet."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from filelock import FileLock

from ..adapters import AdapterError, load_adapter
from .assets import AssetError, cache_dir
from .evaluation import Evaluator
from .tasks import load_task, tasks
from .training import Protocol, manifest_entry, save_adapter_half, train_adapter


def train(
    folder: Annotated[Path, typer.Argument(help="where the adapters and manifest.json go")],
    task: Annotated[list[str] | None, typer.Option(help="one of the eight; all unless given")] = None,
    seed: int = 0,
    rank: int = 16,
    report_to: Annotated[str, typer.Option(help="experiment tracker, as in transformers")] = "none",
):
    """Train one LoRA per task, measure it on the whole test set, and keep the manifest up to date."""
    protocol = Protocol(seed=seed, rank=rank, alpha=2 * rank)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) if path.exists() else {}
    for name in task or tasks():
        data = load_task(name)
        done = manifest.get(name, {})
        trained = (folder / name / "adapter_model.safetensors").exists()
        if trained and done.get("protocol") == asdict(protocol) and done.get("data_sha256") == data.sha256:
            typer.echo(f"{name}: up to date")
            continue
        run = cache_dir() / "runs" / f"{name}-seed{seed}-r{rank}"
        if not trained or done:
            typer.echo(f"{name}: training")
            model = train_adapter(data, run, protocol, report_to=report_to)
            save_adapter_half(model, folder / name)
            history = json.loads((run / "history.json").read_text())
            (folder / name / "history.json").write_text(json.dumps(history) + "\n")
        evaluator = Evaluator([data])
        zero_shot = float(evaluator.correct()[name].mean())
        own = float(evaluator.correct(load_adapter(folder / name))[name].mean())
        entry = manifest_entry(
            data, folder / name, protocol, zero_shot=round(zero_shot, 4), own=round(own, 4)
        )
        with FileLock(cache_dir() / "manifest.lock"):  # other tasks may train beside this one
            manifest = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(dict(sorted((manifest | {name: entry}).items())), indent=1) + "\n")
        shutil.rmtree(run, ignore_errors=True)  # checkpoints served their purpose
        typer.echo(f"{name}: zero-shot {zero_shot:.1%}, own adapter {own:.1%}")


def main():
    try:
        typer.run(train)
    except (AdapterError, AssetError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
