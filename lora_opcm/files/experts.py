"""LoRA on the parameters of a mixture of experts (peft's `target_parameters`): one module for each expert.

peft wraps the module that holds such parameters once for each of them: the keys of the first begin with its name and
`.base_layer` as often as there are others, those of the last with its name. For a parameter (E, …) of E experts,
`lora_A` is (E·r, in), one expert after the other, and `lora_B` (out, r·E), where neighbours are of different experts;
r is the rank of one expert. Which wrapper is which parameter only the model's class says, so parameters of one module
whose ranks or scales may be confused are refused, and so are adapters of other parameters (peft refuses these, too).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import torch
from torch.nn.functional import pad

from ..lowrank import LowRank
from .adapter import Adapter, AdapterError, Kind
from .format import Stored
from .names import canonical
from .peft import Scales

MAX_PARAMETERS = 5  # of one module, where their ranks and scales are not all the same
MAX_EXPERTS, MAX_MODULES = 4096, 200_000  # of a parameter, of a file: a hostile header must not cost much
Factors = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Expert:
    """Which part of a wrapper's factors is a module's: expert `index`, `scale` times its product."""

    wrapper: str
    index: int
    scale: float
    kind: Kind

    def of(self, whole: Stored) -> Stored:
        e, count = self.index, self.kind.experts
        rows, columns = slice(e * whole.rank // count, (e + 1) * whole.rank // count), slice(e, None, count)
        return Stored(
            whole.left[:, columns], whole.right[rows], whole.up[:, columns], whole.down[rows], whole.scale, None
        )


def home(name: str) -> str:
    """The module that holds the parameters, from the name of a wrapper or of one of its experts."""
    return re.sub(r"(\.base_layer)*(\.\d+)?$", "", name)


def split(
    factors: Factors, config: Mapping, scales: Scales, shape: Callable[[str], Sequence[int]], where: str
) -> tuple[Factors, dict[str, Expert]]:
    """The factors of a file with one module, `wrapper.index`, for each expert, and what part of the wrapper it is.

    `shape` says that of the tensor of a key.

    Raises
    ------
    AdapterError
        If the config does not say which rank and scale a wrapper has.
    """
    parents: dict[str, set[str]] = {}
    for target in config.get("target_parameters") or ():
        parent, _, parameter = target.rpartition(".")
        parents.setdefault(parent, set()).add(parameter)
    targets = config.get("target_modules")
    modules = set(targets) if isinstance(targets, list) else set()
    wrappers: dict[str, list[str]] = {}
    for name, parts in factors.items() if parents else ():
        if {"up", "down"} <= parts.keys() and "embedding" not in parts:
            wrappers.setdefault(re.sub(r"(\.base_layer)+$", "", name), []).append(name)
    experts: dict[str, Expert] = {}
    pieces: dict[str, list[str]] = {}
    for module, names in wrappers.items():
        tails = [module, *(module[i + 1 :] for i, x in enumerate(module) if x == ".")]
        named = set().union(*(parents.get(tail, ()) for tail in tails))
        rows = [min(shape(factors[name]["down"])[:1], default=0) for name in names]
        if names == [module] and named <= {"weight"} and (modules & {*tails} or rows == [scales.rank(module)]):
            continue  # a layer
        parameters = sorted(named | parents.get("", set()))
        if not parameters:
            continue
        sizes = _sizes(module, rows, parameters, scales, where)
        for name, (rank, scale), length in zip(names, sizes, rows, strict=True):
            kind = Kind("expert", experts=length // rank, parameters=tuple(parameters))
            pieces[name] = [f"{name}.{index}" for index in range(kind.experts)]
            if len(experts) + kind.experts > MAX_MODULES:
                raise AdapterError(f"{where}: more than {MAX_MODULES} experts, no adapter has as many")
            experts |= {each: Expert(name, i, scale, kind) for i, each in enumerate(pieces[name])}
    return {each: parts for name, parts in factors.items() for each in pieces.get(name, [name])}, experts


def _sizes(
    module: str, rows: Sequence[int], parameters: Sequence[str], scales: Scales, where: str
) -> list[tuple[int, float]]:
    """(rank, scale) of each wrapper: those that the config gives the parameters, in the order that fits the factors."""
    known = [(scales.rank(f"{module}.{p}"), scales(f"{module}.{p}", None)) for p in parameters]
    orders = {tuple(known[:1] * len(rows))}
    if len(set(known)) > 1:
        orders = set(permutations(known, len(rows))) if len(known) <= MAX_PARAMETERS else set()
    fit = []
    for order in sorted(orders):
        counts = {n / rank for n, (rank, _) in zip(rows, order, strict=True)}
        if len(counts) == 1 and 1 <= min(counts) <= MAX_EXPERTS and min(counts).is_integer():
            fit.append(list(order))
    if len(fit) != 1 or len(known) < len(rows):
        said = ", ".join(
            f"{p} rank {rank}, scale {scale:g}" for p, (rank, scale) in zip(parameters, known, strict=True)
        )
        raise AdapterError(
            f"{where}: {module}: factors of {', '.join(map(str, rows))} rows for parameters ({said}), expected one"
            " way to have the rows of each be its rank times the number of experts"
        )
    return fit[0]


def refuse_others(adapters: Sequence[Adapter]) -> None:
    """Raise AdapterError if two adapters wrap other parameters of one module, or one has a layer for each expert."""
    known: dict[str, tuple[tuple[str, ...], str]] = {}
    for adapter in adapters:
        for name, kind in adapter.kinds.items():
            if kind.name == "expert":
                parameters, first = known.setdefault(home(name), (kind.parameters, adapter.source))
                if parameters != kind.parameters:
                    raise AdapterError(
                        f"{first} and {adapter.source}: {home(name)}: expected LoRA on the same parameters of the"
                        f" experts (target_parameters), got {', '.join(parameters)} and {', '.join(kind.parameters)}:"
                        " files number them and do not say which is which"
                    )
    homes = {canonical(module): (module, source) for module, (_, source) in known.items()}
    for adapter in adapters:
        for name in adapter:
            each = re.match(r"(.*_experts)_\d+_", canonical(name))
            if each and each[1] in homes:
                module, first = homes[each[1]]
                raise AdapterError(
                    f"{first} and {adapter.source}: expected one way to hold the experts, got one tensor of all in"
                    f" {module} (target_parameters) and a layer for each, {name}: train both with one version of"
                    " transformers, or --drop (drop=) the experts"
                )


def stacked(adapter: Adapter) -> tuple[Adapter, dict[str, tuple[int, float]]]:
    """The adapter with its experts in wrappers again, as peft has them, and parameter → (rank, scale).

    All parameters of a module get one rank, by zeros, and one scale: a config could not say which wrapper is which.
    An expert that is missing is zero.
    """
    homes: dict[str, list[str]] = {}
    for name, kind in adapter.kinds.items():
        if kind.name == "expert" and name in adapter:
            homes.setdefault(home(name), []).append(name)
    modules, sizes = dict(adapter.modules), dict[str, tuple[int, float]]()
    for module, names in homes.items():
        updates = {name: modules.pop(name) for name in names}
        stored = {u.scale if isinstance(u, Stored) else None for u in updates.values()}
        scale = stored.pop() if len(stored) == 1 else None
        rank, kind = max(1, *(u.rank for u in updates.values())), adapter.kinds[names[0]]
        sizes |= {f"{module}.{p}": (rank, 1.0 if scale is None else scale) for p in kind.parameters}
        for wrapper in dict.fromkeys(name.rpartition(".")[0] for name in names):
            like = next(u for name, u in updates.items() if name.rpartition(".")[0] == wrapper)
            each = [updates.get(f"{wrapper}.{e}", like.zero()) for e in range(kind.experts)]
            pairs = [(u.up, u.down) if scale is not None and isinstance(u, Stored) else (u.left, u.right) for u in each]
            up = torch.stack([pad(u, (0, rank - u.shape[1])) for u, _ in pairs], -1).flatten(1)
            down = torch.cat([pad(d, (0, 0, 0, rank - len(d))) for _, d in pairs])
            modules[wrapper] = LowRank(up, down) if scale is None else Stored.fold(up, down, scale)
    return (replace(adapter, modules=modules) if homes else adapter), sizes
