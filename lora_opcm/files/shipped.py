"""Where the adapters and result tables that ship with the package are."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas


def data_dir() -> Path:
    """The shipped `data` folder: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent.parent
    for folder in (package / "_data", package.parent / "data"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"the shipped data folder is missing beside {package}")


def adapter_path(task: str) -> Path:
    """Folder of the shipped adapter for `task`.

    Raises
    ------
    ValueError
        If no adapter of that name ships, with the names that do.
    """
    folder = data_dir() / "adapters" / task
    if not (folder / "adapter_config.json").is_file():
        names = sorted(p.parent.name for p in folder.parent.glob("*/adapter_config.json"))
        raise ValueError(f"no shipped adapter {task!r}; there are {', '.join(names)}")
    return folder


def results(name: str) -> "pandas.DataFrame":
    """The published table `data/results/<name>.csv`."""
    import pandas as pd

    return pd.read_csv(data_dir() / "results" / f"{name}.csv")
