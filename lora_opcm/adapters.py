"""Adapters: module name → `LowRank` plus metadata; reading PEFT, kohya and diffusers files.

Reading never executes anything from a file and opens no path that a file names. Tensors are mapped from disk
and read when used: replace a file that is loaded (as `writing.save_adapter` does), do not overwrite it in place.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import configs, formats
from .formats import LINEAR, AdapterError, Kind
from .lowrank import LowRank, finite

__all__ = ["Adapter", "AdapterError", "Kind", "Stored", "combine", "load_adapter"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
MAX_TENSORS, MAX_NAME = 200_000, 500  # a hostile header must not cost more than a large adapter
LARGEST = 1e38  # of a float64 factor: norms of products must not overflow
FACTOR_DTYPES = ("F64", "F32", "F16", "BF16")
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Stored(LowRank):
    """A `LowRank` as it came from a file, which still knows its bytes, so that saving it loses nothing.

    `left` is s·up and `right` is down, as matrices. Half precision factors stay what they are where s·up is
    exact in them (s a power of two, as a rule), and are float32 here otherwise. Every operation on it gives a
    plain `LowRank`.

    Attributes
    ----------
    up, down : Tensor
        As in the file: shape (a convolution's is 4-dimensional) and dtype.
    scale : float
        s.
    alpha : Tensor, optional
        kohya's scalar, as in the file.
    """

    up: Tensor
    down: Tensor
    scale: float
    alpha: Tensor | None = None

    @classmethod
    def fold(cls, up: Tensor, down: Tensor, scale: float, alpha: Tensor | None = None) -> "Stored":
        left, right = up.reshape(up.shape[0], -1), down.reshape(down.shape[0], -1)
        dtype = torch.promote_types(left.dtype, right.dtype)
        if scale != 1:
            folded = left.to(dtype) * scale
            if dtype in (torch.float16, torch.bfloat16):
                wide = left.float() * scale
                if not torch.equal(folded.float(), wide):
                    folded, dtype = wide, torch.float32
            left = folded
        return cls(left.to(dtype), right.to(dtype), up, down, scale, alpha)


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """Low-rank updates of the modules of one base model, and what a file says besides.

    Attributes
    ----------
    modules : dict of str to LowRank
        Module name as in the base model, "encoder.layer.0.attention.self.query", to its ΔW (out, in) with the
        scaling folded in, in the orientation of nn.Linear.weight whatever the layer is: an embedding is
        (dim, vocabulary), a convolution (out, in·∏kernel). In the kohya format the names are the underscored
        ones of the file, ``lora_unet_mid_block_…``, since the dots cannot be put back without guessing.
    base_model : str, optional
        What the file calls its base model; for kohya the family (`ss_base_model_version`). Never opened.
    format : {"peft", "kohya", "diffusers"}
    kinds : dict of str to Kind
        Which modules are convolutions or embeddings; the others are linear.
    config : dict
        adapter_config.json, as it came.
    saved : dict of str to Tensor
        Full tensors that replace those of the base: `modules_to_save`, and embeddings peft wrote in full. One
        adapter carries them from file to file, unchanged in dtype; `combine` demands that all agree.
    metadata : dict of str to str
        Of the safetensors header.
    dtype : torch.dtype
        Of the file, and of what is saved unless told otherwise. An update may be wider, see `Stored`.
    source : str
        Where it was loaded from, for messages.
    """

    modules: dict[str, LowRank]
    base_model: str | None = None
    format: str = "peft"
    kinds: dict[str, Kind] = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    source: str = "adapter"

    def __post_init__(self):
        if self.dtype is None:
            object.__setattr__(self, "dtype", _widest(u.dtype for u in self.modules.values()))

    def __repr__(self) -> str:
        ranks = sorted({u.rank for u in self.modules.values()})
        return (
            f"Adapter({len(self.modules)} modules, rank {ranks}, {self.dtype}, {self.format}, {self.source})"
        )

    def norm(self) -> float:
        """Frobenius norm ‖ΔW‖_F over all modules, in float64."""
        return math.sqrt(sum(u.norm() ** 2 for u in self.modules.values()))

    def delta(self, name: str) -> Tensor:
        """The dense ΔW of one module in the shape of its base weight, for tests and teaching.

        Transposed where the weight lies (in, out): embeddings, and linear layers if the config says
        `fan_in_fan_out`. Shaped ``(out, in, *kernel)`` for convolutions.
        """
        update, kind = self.modules[name], self.kinds.get(name, LINEAR)
        if kind.name == "conv":
            return update.delta().reshape(update.shape[0], -1, *kind.kernel)
        return update.delta().mT if self.transposed(name) else update.delta()

    def transposed(self, name: str) -> bool:
        """Whether the base weight of a module lies (in, out)."""
        kind = self.kinds.get(name, LINEAR).name
        return kind == "embedding" or kind == "linear" and bool(self.config.get("fan_in_fan_out"))

    def with_modules(self, modules: Mapping[str, LowRank]) -> "Adapter":
        """The same metadata with other updates."""
        config = self.config
        if set(modules) != set(self.modules) and "target_modules" in config:
            config = config | {"target_modules": None}  # they no longer say which modules; saving lists them
        return replace(self, modules=dict(modules), config=config)

    def regauge(self, seed: int = 0) -> "Adapter":
        """The updates with factors (left G, G⁻¹ right), for a random G ∈ GL(r) per module: the same to rounding.

        G = Q diag(d) with orthogonal Q and d between 1/2 and 2, so its condition number is at most 4.
        """
        generator = torch.Generator().manual_seed(seed)
        modules = {}
        for name, u in self.modules.items():
            q, _ = torch.linalg.qr(torch.randn(u.rank, u.rank, generator=generator, dtype=torch.float64))
            d = 4 ** (torch.rand(u.rank, generator=generator, dtype=torch.float64) - 0.5)
            modules[name] = u.regauge(q * d)
        return self.with_modules(modules)


def combine(adapters: Sequence[Adapter], modules: Mapping[str, LowRank]) -> Adapter:
    """One adapter with updates `modules`, and metadata that all of `adapters` agree on.

    Kinds are united, the dtype is the widest, the rest is the first adapter's.

    Raises
    ------
    AdapterError
        If formats or base models differ (the last part of their names counts: a local copy of "org/name" is
        the same), a module has another shape or is another kind of layer in one of them, or full tensors
        (`saved`) are not equal.
    """
    shapes_of(adapters)
    first = adapters[0]
    kinds = first.kinds | {name: first.kinds.get(name, LINEAR) for name in first.modules}
    for other in adapters[1:]:
        both = f"{first.source} and {other.source}"
        if other.format != first.format:
            raise AdapterError(f"{both}: expected one format, got {first.format} and {other.format}")
        bases = [(a.base_model or "").replace("\\", "/").rstrip("/") for a in (first, other)]
        if all(bases) and len({b.rpartition("/")[2].lower() for b in bases}) > 1:
            raise AdapterError(f"{both}: expected one base model, got {bases[0]} and {bases[1]}")
        for name in other.modules:
            kind = other.kinds.get(name, LINEAR)
            if kinds.setdefault(name, kind) != kind:
                raise AdapterError(
                    f"{both}: {name}: expected one kind of layer, got {kinds[name]} and {kind}"
                )
        for name in sorted(first.saved.keys() | other.saved.keys()):
            ours, theirs = first.saved.get(name), other.saved.get(name)
            if ours is None or theirs is None or ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
                raise AdapterError(
                    f"{both}: {name}: expected one full tensor (modules_to_save) in both, got different ones;"
                    " a merge of low-rank updates has no rule for them"
                )
    kinds = {name: kind for name, kind in kinds.items() if kind != LINEAR}
    return replace(first.with_modules(modules), kinds=kinds, dtype=_widest(a.dtype for a in adapters))


def shapes_of(adapters: Sequence[Adapter]) -> dict[str, tuple[int, int]]:
    """Every module any adapter has, with the shape (m, n) all that have it agree on; AdapterError if they do not."""
    shapes: dict[str, tuple[int, int]] = {}
    for adapter in adapters:
        for name, update in adapter.modules.items():
            if shapes.setdefault(name, update.shape) != update.shape:
                raise AdapterError(
                    f"{adapter.source}: {name} has shape {update.shape}, in an earlier adapter {shapes[name]}"
                )
    return shapes


def scaled(like: Adapter, updates: Mapping[str, LowRank], factor: float = 1.0) -> Adapter:
    """`updates` times `factor` with the metadata of `like`, in its dtype.

    Each side takes the root of the factor, so that half precision overflows as late as it can.

    Raises
    ------
    AdapterError
        If a factor is not finite in that dtype.
    """
    root, modules = math.sqrt(abs(factor)), {}
    for name, u in updates.items():
        modules[name] = u = LowRank(u.left * math.copysign(root, factor), u.right * root).to(like.dtype)
        if not (finite(u.left) and finite(u.right)):
            raise AdapterError(
                f"{like.source}: {name}: the merge is not finite in {like.dtype}, expected smaller updates"
            )
    return like.with_modules(modules)


# -- reading -------------------------------------------------------------------------------------------------


def load_adapter(path: str | os.PathLike, only: Callable[[str], bool] | None = None) -> Adapter:
    """Read an adapter: a PEFT folder, its .safetensors file, or a kohya or diffusers .safetensors file.

    A folder without an adapter of its own may hold one further down (`weights_of`).

    The format is detected by the keys. Scales: PEFT as its config says (`configs.Scales`); kohya α/r by the
    module's `.alpha`, and s = 1 where that is missing, as sd-scripts does; diffusers likewise, or by the PEFT
    config it keeps in the header.

    With `only`, no more than the modules and full tensors whose names it holds true of are read and checked.

    Raises
    ------
    AdapterError
        For whatever is no plain LoRA (`formats.REFUSED_KEYS`, `configs.REFUSED_OPTIONS`), pickles, truncated
        or corrupt files, factors that are not float or hold NaN or Inf, shapes that do not fit, half a
        module, no module at all. The message names the file, the module, what came and what was expected.
    """
    path = weights_of(path)
    if not path.suffix and not path.exists():
        raise AdapterError(f"{path}: no such file or folder")
    if path.suffix.lower() in PICKLES:
        raise AdapterError(
            f"{path}: a pickle can run code when it is opened, so only safetensors are read; convert it where"
            " you trust it: safetensors.torch.save_file(torch.load(path, weights_only=True), …)"
        )
    config = configs.read_config(path.parent / CONFIG) if (path.parent / CONFIG).is_file() else None
    try:
        with safe_open(path, framework="pt") as file:
            return _read(file, path, config, only or (lambda name: True))
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterError(f"{path}: not a readable safetensors file (truncated?): {reason}") from error


def weights_of(path: str | os.PathLike, depth: int = 3) -> Path:
    """The file that holds the factors: `path` itself, or the one in a folder.

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


def _read(file, path: Path, config: dict | None, only: Callable[[str], bool]) -> Adapter:
    where, metadata = str(path), file.metadata() or {}
    if len(file.keys()) > MAX_TENSORS or max(map(len, file.keys()), default=0) > MAX_NAME:
        raise AdapterError(
            f"{where}: {len(file.keys())} tensors with names of up to {max(map(len, file.keys()))} characters,"
            f" expected at most {MAX_TENSORS} and {MAX_NAME}: no adapter has more"
        )
    dialects, factors, rest = formats.group(file.keys(), where)
    saved, scales = {}, None
    if dialects <= {"peft"} and config is not None:
        format, config_path = "peft", str(path.parent / CONFIG)
        configs.check_config(config, config_path)
        rest += [parts["alpha"] for parts in factors.values() if "alpha" in parts]
        names = {k: formats.carried(k, config.get("modules_to_save") or [], factors) for k in rest}
        formats.refuse([k for k, name in names.items() if name is None], where)
        saved = {n: _tensor(file, key, where, factor=False) for key, n in names.items() if only(n)}
        scales = configs.Scales(config, config_path)
        base = config.get("base_model_name_or_path")
    else:
        formats.refuse(rest, where)
        if len(dialects) > 1 and "kohya" in dialects:
            raise AdapterError(f"{where}: expected keys of one format, got {' and '.join(sorted(dialects))}")
        format, config = "kohya" if dialects == {"kohya"} else "diffusers", {}
        if format == "diffusers":
            scales = configs.header_scales(metadata, factors, where)
        base = metadata.get("ss_base_model_version")
    if not factors:
        raise AdapterError(f"{where}: an empty adapter: no LoRA factor in it")
    modules, kinds = {}, {}
    for name in filter(only, factors):
        parts = factors[name]
        modules[name] = update = _update(file, name, parts, scales, where)
        if "embedding" in parts:
            kinds[name] = Kind("embedding")
        elif update.down.ndim > 2:
            kinds[name] = Kind("conv", tuple(update.down.shape[2:]))
    keys = [parts[role] for parts in factors.values() for role in ("up", "down") if role in parts]
    names = {file.get_slice(key).get_dtype() for key in keys}  # of all factors, whatever `only` says
    dtype = _widest(t for t in DTYPES if DTYPES[t] in names & set(FACTOR_DTYPES))
    base = base if isinstance(base, str) else None
    return Adapter(modules, base, format, kinds, config, saved, metadata, dtype, where)


def _update(file, name: str, parts: dict[str, str], scales, where: str) -> Stored:
    if "up" not in parts or "down" not in parts:
        raise AdapterError(f"{where}: {name}: expected two factors, got only {min(parts.values())}")
    up, down = (_tensor(file, parts[role], where) for role in ("up", "down"))
    shapes = f"{where}: {name}: {parts['up']} is {tuple(up.shape)} and {parts['down']} {tuple(down.shape)}"
    if up.ndim != down.ndim or up.ndim < 2 or set(up.shape[2:]) - {1} or not up.numel() * down.numel():
        raise AdapterError(f"{shapes}, expected (m, r) and (r, n), or (out, r, 1, 1) and (r, in, h, w)")
    rank = down.shape[0]
    if up.shape[1] != rank:
        hint = " (a grouped convolution?)" if up.ndim > 2 else ""
        raise AdapterError(f"{shapes}, expected one rank, got {up.shape[1]} and {rank}{hint}")
    alpha = _tensor(file, parts["alpha"], where) if "alpha" in parts else None
    if alpha is None:
        scale = scales(name, rank) if scales else 1.0
    elif alpha.numel() != 1 or not float(alpha):
        # Zero: kohya's trainer reads it as α = r, its merge script as no update at all.
        raise AdapterError(f"{where}: {name}: alpha is {alpha.tolist()}, expected one nonzero number")
    else:
        scale = float(alpha) / rank
    update = Stored.fold(up, down, scale, alpha)
    if scale != 1 and not finite(update.left):
        raise AdapterError(f"{where}: {name}: scale {scale:g} times {parts['up']} overflows {update.dtype}")
    largest = (
        max(float(x.abs().max()) for x in (update.left, update.right)) if update.dtype == torch.float64 else 0
    )
    if largest > LARGEST:
        raise AdapterError(f"{where}: {name}: a factor holds {largest:.1e}, expected below {LARGEST:.0e}")
    return update


def _tensor(file, key: str, where: str, factor: bool = True) -> Tensor:
    dtype = file.get_slice(key).get_dtype()
    expected = FACTOR_DTYPES if factor else DTYPES.values()
    if dtype not in expected:
        raise AdapterError(f"{where}: {key} is {dtype} (quantised?), expected one of {', '.join(expected)}")
    tensor = file.get_tensor(key)
    if not finite(tensor):
        raise AdapterError(f"{where}: {key} holds NaN or Inf, expected finite numbers")
    return tensor


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return reduce(torch.promote_types, dict.fromkeys(dtypes)) if (dtypes := list(dtypes)) else torch.float32
