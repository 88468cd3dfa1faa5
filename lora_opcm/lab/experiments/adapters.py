"""The adapters that experiments merge: those of the book by seed, of another base, of other people."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from ...files import Adapter, AdapterError, adapter_path, load_adapter
from ..bases import slug
from ..tasks import tasks


def adapter_folder(task: str, seed: int = 0, trained: Path | str = "_build/adapters") -> Path:
    """The folder of one adapter: seed 0 ships with the package, others are in `trained`/seed<n>/<task>.

    Raises
    ------
    AdapterError
        If it was not trained yet, with the command that does.
    """
    if seed == 0:
        return adapter_path(task)
    folder = Path(trained, f"seed{seed}", task)
    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(
            f"{folder}: no adapter; `make experiments PROFILE=full` trains it, or"
            f" `python -m lora_opcm.lab.train {folder.parent} --task {task} --seed {seed}`"
        )
    return folder


def adapters_of(seed: int = 0, trained: Path | str = "_build/adapters") -> dict[str, Adapter]:
    """The eight adapters of one training seed, by task."""
    return {task: load_adapter(adapter_folder(task, seed, trained)) for task in tasks()}


def grown(base: str, names: Sequence[str], seed: int, trained: Path | str) -> dict[str, Adapter]:
    """The adapters of another base, by task, from where `lab.train` puts them.

    That is `trained`/<base>/seed<n>/<task>.

    Raises
    ------
    AdapterError
        If one was not trained yet, with the command that does.
    """
    folder = Path(trained, slug(base), f"seed{seed}")
    for task in names:
        if not (folder / task / "adapter_config.json").is_file():
            raise AdapterError(
                f"{folder / task}: no adapter; `make experiments PROFILE=gpu` trains it, or"
                f" `python -m lora_opcm.lab.train {folder} --task {task} --seed {seed} --base {base}`"
            )
    return {task: load_adapter(folder / task) for task in names}


def collected(collection: str | Mapping[str, str], names: Sequence[str]) -> dict[str, Adapter]:
    """Other people's adapters, by task.

    Parameters
    ----------
    collection : str or mapping
        A hub repository or a folder for each task: a template with `{task}`, or a mapping from task to place.
    names : sequence of str
        The tasks wanted.

    Raises
    ------
    AdapterError
        If the collection names no place for a task, or what lies there is no adapter we read.
    """
    found = {}
    for task in names:
        place = collection.format(task=task) if isinstance(collection, str) else collection.get(task)
        if not place:
            raise AdapterError(f"the collection has no adapter for {task!r}; it has {', '.join(collection)}")
        if not Path(place).is_dir():
            place = snapshot_download(place, allow_patterns=["adapter_config.json", "adapter_model.*"])
        found[task] = load_adapter(place)
    return found


def contents(adapters: Sequence[Adapter]) -> str:
    """Eight digits of the id of every adapter, in order: what a results file names adapters by."""
    return "+".join(adapter.id[:8] for adapter in adapters)


def hashes(seeds: Sequence[int], trained: Path | str = "_build/adapters") -> str:
    """`contents` of the eight adapters of every seed, in order of seed and task."""
    return contents([a for seed in seeds for a in adapters_of(seed, trained).values()])
