"""Reading adapters.

Reading never executes anything from a file and opens no path that a file names, but the parts that an index names in
its own folder. Tensors are mapped from disk and read when used: replace a file that is loaded (as `save_adapter`
does), do not overwrite it in place.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..lowrank import LowRank
from . import peft
from .adapter import DTYPES, Adapter, AdapterError
from .diffusers import CONFIGS
from .expanded import SUFFIXES as EXPANDED
from .experts import Expert, split
from .names import UNDERSCORED, doubled
from .parts import INDEX, PART, Tensors, opened
from .peft import CONFIG, WEIGHTS
from .refusals import PICKLES, and_more, check_config, refuse
from .table import formats
from .updates import Scales, tensor_of, updates_of

MAX_TENSORS, MAX_NAME = 200_000, 500  # a hostile header must not cost more than a large adapter


def load_adapter(path: str | os.PathLike, only: Callable[[str], bool] | None = None) -> Adapter:
    """Read an adapter: a PEFT folder, its .safetensors file, or a kohya or diffusers .safetensors file.

    A folder without an adapter of its own may hold one further down (`weights_of`). One in several files is read
    through its index. LoHa, LoKr and LoCon with a core are expanded into two factors (`expanded`). What is read
    otherwise than it stands there (those, an integer α, names without a component, …) is said in a warning.

    The format is detected by the keys. Scales: PEFT as its config says (`peft.Scales`); kohya α/r by the
    module's `.alpha`, and s = 1 where that is missing, as sd-scripts does; diffusers likewise, or by the PEFT
    config it keeps in the header.

    With `only`, no more than the modules and full tensors whose names it holds true of are read and checked.

    Raises
    ------
    AdapterError
        For whatever is no plain LoRA (`refusals.REFUSED_KEYS`, `refusals.REFUSED_OPTIONS`), pickles, truncated
        or corrupt files, factors that are not float or hold NaN or Inf, shapes that do not fit, half a
        module, no module at all. The message names the file, the module, what came and what was expected.
    """
    return _load(path, lambda tensors, layout: _read(tensors, layout, only or (lambda name: True)))


def outline(path: str | os.PathLike) -> Adapter:
    """An adapter with the names of its modules and full tensors, its format and its config, and no number."""

    def read(tensors: Tensors, layout: Layout) -> Adapter:
        nothing = LowRank(torch.zeros(0, 0), torch.zeros(0, 0))
        modules, saved = dict.fromkeys(layout.factors, nothing), dict.fromkeys(layout.saved, torch.zeros(0))
        return Adapter(dict(modules), layout.base, layout.format, {}, layout.config, saved, source=layout.where)

    return _load(path, read)


def _load(path: str | os.PathLike, read: "Callable[[Tensors, Layout], Adapter]") -> Adapter:
    path = weights_of(path)
    if not path.suffix and not path.exists():
        raise AdapterError(f"{path}: no such file or folder")
    if path.suffix.lower() in PICKLES:
        raise AdapterError(
            f"{path}: a pickle can run code when it is opened, so only safetensors are read; convert it where"
            " you trust it: safetensors.torch.save_file(torch.load(path, weights_only=True), …)"
        )
    config = peft.read_config(path.parent / CONFIG) if (path.parent / CONFIG).is_file() else None
    try:
        with ExitStack() as stack:
            tensors = opened(path, stack)
            return read(tensors, _layout(tensors, path, config))
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterError(f"{path}: not a readable safetensors file (truncated?): {reason}") from error


def weights_of(path: str | os.PathLike, depth: int = 3) -> Path:
    """The file that holds the factors, or the index of several: `path` itself, or the one in a folder.

    In a folder without an adapter, as a downloaded snapshot may be, the one adapter up to `depth` levels down.

    Raises
    ------
    AdapterError
        If there is none, or more than one.
    """
    folder = path = Path(path)
    if not path.is_dir():
        return path
    for suffix in (".safetensors", *sorted(PICKLES)):
        if (folder / WEIGHTS).with_suffix(suffix).is_file():
            return (folder / WEIGHTS).with_suffix(suffix)
    parts = sorted(folder.glob("*" + INDEX)) or [p for p in sorted(folder.glob("*.safetensors")) if PART.search(p.name)]
    if parts:
        return parts[0]
    hint = ""
    if not (folder / CONFIG).is_file():
        files = sorted(folder.glob("*.safetensors"))
        if len(files) == 1:
            return files[0]
        inside = sorted({p.parent for d in range(depth) for p in folder.glob("*/" * (d + 1) + CONFIG)})
        if len(inside) == 1:
            return weights_of(inside[0])
        found = [str(p.relative_to(folder)) for p in inside] or [p.name for p in files]
        if found:
            more = f" and {len(found) - 8} more" if len(found) > 8 else ""
            hint = f"; there are {len(found)} inside, name one: {', '.join(found[:8])}{more}"
    raise AdapterError(f"{folder}: expected {CONFIG} and {WEIGHTS}, or one .safetensors file{hint}")


def group(keys: Iterable[str], where: str) -> tuple[set[str], dict[str, dict[str, str]], list[str]]:
    """Sort the keys of a file.

    Returns
    -------
    dialects : names of the formats whose suffixes were met, "" for factors that no format has alone
    factors : module → {"up": key, "down": key, "alpha": key, "embedding": key of an embedding factor}
    rest : keys that belong to no LoRA factor

    Raises
    ------
    AdapterError
        If a module is spelled in two ways.
    """
    suffixes = {end: (f.name, part) for f in formats().values() for end, part in f.suffixes.items()}
    suffixes |= {end: ("", part) for end, part in EXPANDED.items()}
    dialects: set[str] = set()
    factors: dict[str, dict[str, str]] = {}
    rest: list[str] = []
    for key in sorted(keys):
        for suffix, (dialect, part) in suffixes.items():
            if key.endswith(suffix) and len(key) > len(suffix):
                dialects.add(dialect)
                parts = factors.setdefault(key.removesuffix(suffix).removeprefix(peft.PREFIX), {})
                if part.role in parts or (parts and part.embedding != ("embedding" in parts)):
                    raise AdapterError(f"{where}: {key} and {min(parts.values())} name one module twice")
                parts[part.role] = key
                if part.embedding:
                    parts["embedding"] = key
                break
        else:
            rest.append(key)
    alphas = {k for k in rest if k.endswith(".alpha") and k.removesuffix(".alpha") in factors}
    for key in alphas:
        factors[key.removesuffix(".alpha")]["alpha"] = key
    return dialects, factors, [k for k in rest if k not in alphas]


@dataclass
class Layout:
    """What is known of an adapter before a tensor is read: what `group` found, and who says the scales."""

    where: str
    format: str
    base: Any
    config: dict
    metadata: dict[str, str]
    factors: dict[str, dict[str, str]]
    saved: dict[str, str]
    scales: Scales
    experts: dict[str, Expert]


def _layout(tensors: Tensors, path: Path, config: dict | None) -> Layout:
    where, metadata = str(path), tensors.metadata
    if len(tensors.keys()) > MAX_TENSORS or max(map(len, tensors.keys()), default=0) > MAX_NAME:
        raise AdapterError(
            f"{where}: {len(tensors.keys())} tensors with names of up to {max(map(len, tensors.keys()))} characters,"
            f" expected at most {MAX_TENSORS} and {MAX_NAME}: no adapter has more"
        )
    if CONFIGS in metadata and path.name != peft.WEIGHTS:
        config = None  # a file that says its scales needs no folder that says others
    dialects, factors, rest = group(tensors.keys(), where)
    rest = _without_zeros(tensors, rest, where)
    saved: dict[str, str] = {}
    experts: dict[str, Expert] = {}
    if dialects == {""} and config is None:
        dialects = {"kohya" if all(map(UNDERSCORED.match, factors)) else "diffusers"}
    dialects -= {""}
    if dialects <= {"peft"} and config is not None:
        format, config_path, config = "peft", str(path.parent / CONFIG), peft.as_lora(config)
        check_config(config, config_path)
        rest += [parts["alpha"] for parts in factors.values() if "alpha" in parts]
        names = {k: peft.carried(k, config.get("modules_to_save") or [], factors) for k in rest}
        refuse([k for k, name in names.items() if name is None], where)
        saved = {name: key for key, name in names.items() if name is not None}
        bare = [key for parts in factors.values() for key in parts.values()]
        if bare and not any(key.startswith(peft.PREFIX) for key in bare):
            warnings.warn(f"{where}: {bare[0]}{and_more(bare)}: read as {peft.PREFIX}{bare[0]}", stacklevel=2)
        said = peft.Scales(config, config_path)
        factors, experts = split(factors, config, said, tensors.shape, where)
        scales: Scales = said
        base = config.get("base_model_name_or_path")
    else:
        refuse(rest, where)
        if dialects <= {"peft", "diffusers"}:  # diffusers writes PEFT's keys, too
            dialects = {"diffusers"}
        if len(dialects) > 1:
            raise AdapterError(f"{where}: expected keys of one format, got {' and '.join(sorted(dialects))}")
        (format,) = dialects
        if config is not None and path.name == peft.WEIGHTS:
            warnings.warn(f"{where}: {format} keys: {CONFIG} beside it says nothing of them", stacklevel=2)
        config = {}
        unsaid = {n: min(parts.values()) for n, parts in factors.items() if "alpha" not in parts}
        wrapped = [n for n, key in unsaid.items() if key.startswith(peft.PREFIX)]
        if wrapped and format == "diffusers" and CONFIGS not in metadata:
            raise AdapterError(f"{where}: {wrapped[0]}: expected {CONFIG} beside it, for the scale")
        scales = formats()[format].scales(metadata, unsaid, where)
        base = metadata.get("ss_base_model_version")
    if not factors:
        raise AdapterError(f"{where}: an empty adapter: no LoRA factor in it")
    if said_twice := doubled(name for name in factors if name not in experts):
        warnings.warn(f"{where}: {said_twice}: each is a module of its own", stacklevel=2)
    base = base if isinstance(base, str) else None
    return Layout(where, format, base, config, metadata, factors, saved, scales, experts)


def _without_zeros(tensors: Tensors, keys: list[str], where: str) -> list[str]:
    """The keys but those of full differences that are zero, as some trainers write them."""
    full = [k for k in keys if re.search(r"\.diff(_b)?$", k)]
    zero = [k for k in full if not bool(tensor_of(tensors, k, where).any())]
    if zero:
        warnings.warn(f"{where}: {zero[0]}{and_more(zero)}: differences that are zero, left out", stacklevel=2)
    return [k for k in keys if k not in zero]


def _read(tensors: Tensors, layout: Layout, only: Callable[[str], bool]) -> Adapter:
    where = layout.where
    saved = {n: tensor_of(tensors, key, where, DTYPES.values()) for n, key in layout.saved.items() if only(n)}
    if empty := [n for n, t in saved.items() if not t.numel()]:
        raise AdapterError(
            f"{where}: {empty[0]}: a full tensor of shape {tuple(saved[empty[0]].shape)}, which holds nothing"
        )
    modules, kinds, dtype = updates_of(tensors, layout.factors, layout.scales, only, where, layout.experts)
    return Adapter(modules, layout.base, layout.format, kinds, layout.config, saved, layout.metadata, dtype, where)
