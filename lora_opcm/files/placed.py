"""Where in the files of a base model the experts of an adapter are (peft's `target_parameters`).

A base holds them as its model class does, in one parameter (E, out, in) or (E, in, out), or one by one, as their
authors did and as transformers still writes them: gate and up projections apart, under one of two spellings
(transformers' conversion_mapping). An adapter does not say which of its wrappers is which parameter, and neither says
which way a parameter lies. Shapes do, or else the adapter is refused.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from ..lowrank import LowRank
from .adapter import Adapter, AdapterError, Kind
from .experts import home
from .names import canonical

# A parameter → the layers of one expert whose outputs, one after the other, are its own.
LAYERS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Parameter:
    """A parameter (E, m, n) as the base holds it: for each expert, the keys its rows are in, and from which row on."""

    shape: tuple[int, ...]
    places: Sequence[tuple[tuple[str, int], ...]]
    whole: bool

    def pieces(self, expert: int, update: LowRank) -> Iterator[tuple[str, int, LowRank]]:
        """Key, first row, and the product that is added there, of an update (m, n)."""
        places = self.places[expert]
        rows = self.shape[1] // len(places)
        for i, (key, first) in enumerate(places):
            yield key, first, LowRank(update.left[i * rows : (i + 1) * rows], update.right)


def placed(adapter: Adapter, shapes: Shapes, where: str) -> dict[str, dict[int, LowRank]]:
    """Keys of the base → first row → the product that is added to the rows from there on, for the adapter's experts.

    A key counts as a matrix with the columns of its last dimension. `shapes` are those of the base.

    Raises
    ------
    AdapterError
        If the base has no such parameter, or none that a wrapper fits, or they fit in more than one way.
    """
    wrappers: dict[str, dict[str, list[str]]] = {}  # of a module: wrapper → names of its experts
    for name, kind in adapter.kinds.items():
        if kind.name == "expert" and name in adapter:
            wrappers.setdefault(home(name), {}).setdefault(name.rpartition(".")[0], []).append(name)
    homes: dict[str, set[str]] = {}
    for key in shapes if wrappers else ():
        inside = re.sub(r"(\.\d+\.\w+\.weight|\.\w+)$", "", key)
        homes.setdefault(canonical(inside), set()).add(inside)
    found: dict[str, dict[int, LowRank]] = {}
    for module, names in wrappers.items():
        kind, spelled = adapter.kinds[next(iter(names.values()))[0]], homes.get(canonical(module), set())
        spelled = spelled & {module} or spelled
        known = {p: x for at in spelled for p in kind.parameters if (x := _parameter(at, p, kind.experts, shapes))}
        sizes = [adapter[some[0]].shape for some in names.values()]
        order, turned = _fit(module, known, kind, sizes, len(spelled), where)
        for some, parameter in zip(names.values(), order, strict=True):
            for name in some:
                update = LowRank(adapter[name].right.mT, adapter[name].left.mT) if turned else adapter[name]
                for key, first, piece in parameter.pieces(int(name.rpartition(".")[2]), update):
                    found.setdefault(key, {})[first] = piece
    return found


def _parameter(home: str, name: str, experts: int, shapes: Shapes) -> Parameter | None:
    shape = shapes.get(f"{home}.{name}", ())
    shape = (1, *shape) if len(shape) == 2 else shape
    if len(shape) == 3:
        return Parameter(shape, [((f"{home}.{name}", e * shape[1]),) for e in range(shape[0])], True)
    for layers in LAYERS.get(name, ()):
        keys = [tuple(f"{home}.{e}.{layer}.weight" for layer in layers) for e in range(experts)]
        each = {shapes.get(key, ()) for row in keys for key in row}
        if len(each) == 1 and len(one := each.pop()) == 2 and f"{home}.{experts}.{layers[0]}.weight" not in shapes:
            places = [tuple((key, 0) for key in row) for row in keys]
            return Parameter((experts, one[0] * len(layers), one[1]), places, False)
    return None


def _fit(
    module: str,
    known: Mapping[str, Parameter],
    kind: Kind,
    sizes: Sequence[tuple[int, int]],
    spelled: int,
    where: str,
) -> tuple[Sequence[Parameter], bool]:
    """The parameter of each wrapper, whose updates have `sizes`, and whether all of them lie (E, in, out)."""
    fits = [
        (order, turned)
        for turned in (False, True)
        for order in permutations(known.values(), len(sizes))
        if all(p.shape == (kind.experts, *(size[::-1] if turned else size)) for p, size in zip(order, sizes))
        and (not turned or all(p.whole for p in order))
    ]
    if len(fits) != 1 or spelled != 1:
        base = ", ".join(f"{p} {x.shape}" for p, x in known.items()) or f"none of {', '.join(kind.parameters)}"
        ways = "in one way only, which files do not tell of" if fits else "them"
        raise AdapterError(
            f"{where}: {module}: updates of {kind.experts} experts (target_parameters),"
            f" {', '.join(map(str, sizes))}, the base has {base}, expected parameters that fit {ways};"
            " --drop leaves modules out by name, or load both with peft and use merge_and_unload"
        )
    return fits[0]
