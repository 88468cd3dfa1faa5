"""A merge that takes in one adapter at a time and keeps no adapter: what all streams share."""

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import msgspec
import torch
from torch import Tensor

from ..files import Adapter, AdapterError, combine, level, matched, scaled
from ..files.adapter import widest
from ..files.bundle import FLOATS, DamagedError, damaged, load_bundle, save_bundle
from ..files.full import config_of, full_tensors
from ..files.joint import lasting
from ..lowrank import LowRank
from ..parallel import Progress, parallel_map
from ..values import AUTO, Full, expect, expect_options, factor

S = TypeVar("S")  # what a stream keeps of one module


class Member(msgspec.Struct):
    """One adapter that a stream took in: name, norm ‖Δ‖_F, `Adapter.id`, what taking it in did, dtype."""

    name: str
    norm: float
    id: str
    record: dict[str, int | float]  # a count is read back as one, so that going on writes the same bytes
    dtype: str = ""


class Content(msgspec.Struct):
    """What a state file says beside its tensors."""

    options: dict[str, Any]
    members: list[Member]
    modules: list[str]


@dataclass
class State(Generic[S]):
    """What a stream needs to go on: for every module what it keeps, and for every adapter a `Member`."""

    modules: dict[str, S] = field(default_factory=dict)
    members: list[Member] = field(default_factory=list)

    @property
    def norms(self) -> list[float]:
        """‖Δ_t‖_F of each whole adapter."""
        return [m.norm for m in self.members]

    @property
    def names(self) -> list[str]:
        return [m.name for m in self.members]

    @property
    def history(self) -> list[dict]:
        """One row an adapter: name, norm, and what the stream recorded."""
        return [{"name": m.name, "norm": m.norm} | m.record for m in self.members]


class Stream(ABC, Generic[S]):
    """Merges adapters one at a time. Subclasses say what they keep of a module and how it grows.

    A subclass has a `kind`, a constructor whose parameters are options with types, and

    - `grow(kept, update)`: what is kept with one more update (`kept` is None for a module's first), and numbers that
      add up over modules;
    - `export(kept)`: the merged update of a module, not yet scaled; `shape(kept)`: (m, n);
    - `pack(kept)` and `unpack(tensors)`: what is kept, as named tensors, and back;
    - `shrink(kept, update)`, where that is exact: what is kept without an update, None for nothing;
    - `record(numbers, state, norm)`: what is said of an adapter in the history.
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type["Stream"]]] = {}
    options: dict[str, Any]

    def __init_subclass__(cls, **rest) -> None:
        super().__init_subclass__(**rest)
        if "kind" in cls.__dict__:
            Stream.kinds[cls.kind] = cls

    def __init__(self, **options: Any):
        expect_options(type(self).__init__, **options)
        self.options = options
        self.state: State[S] = State()
        self.like: Adapter | None = None  # metadata and shapes of what was added, for the export

    def __getattr__(self, name: str) -> Any:
        if name != "options" and name in self.options:
            return self.options[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Option names and defaults."""
        return {n: p.default for n, p in list(signature(cls.__init__).parameters.items())[1:]}

    # -- what a subclass says ----------------------------------------------------------------------------------

    @abstractmethod
    def grow(self, kept: S | None, update: LowRank) -> tuple[S, dict[str, float]]: ...

    @abstractmethod
    def export(self, kept: S) -> LowRank: ...

    @abstractmethod
    def shape(self, kept: S) -> tuple[int, int]: ...

    @abstractmethod
    def pack(self, kept: S) -> dict[str, Tensor]: ...

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor]) -> S: ...

    shrink: Callable[[S, LowRank], S | None] | None = None

    def record(self, numbers: Mapping[str, float], state: State[S], norm: float) -> dict[str, float]:
        return dict(numbers)

    def refuse_removal(self, adapter: Adapter) -> None:
        """Raise a ValueError where this stream cannot take an adapter out again."""

    # -- what is the same for all --------------------------------------------------------------------------------

    def add(
        self,
        adapter: Adapter,
        name: str | None = None,
        progress: Progress | None = None,
        disjoint: bool = False,
        any_base: bool = False,
        full: str | None = None,
    ) -> Self:
        """Take in one adapter. A module it lacks counts as zero.

        Known spellings of one layer are one, under the name it came with first. `progress`, `disjoint`, `any_base` and
        `full` are those of `merge`; for a mean a state would have to keep what it does not.

        Raises
        ------
        AdapterError
            As `matched` and `combine`, if it does not go with what was added before: the state is then as it was.
        """
        expect(Full, full=full)
        if full == "mean":
            raise AdapterError(
                f"{adapter.source}: a state keeps one full tensor of a name, and a mean needs all that came: full is"
                " 'first' or 'drop' here, and a merge of all adapters at once (lora-opcm merge --full mean) takes means"
            )
        dtype, count = str(adapter.dtype).removeprefix("torch."), len(self.state.members)
        if twin := next((m.name for m in self.state.members if m.id == adapter.id), ""):
            warnings.warn(f"{adapter.source}: its very factors, as {twin}, are in already: counted again", stacklevel=2)
        member = Member(name or f"adapter {count + 1}", adapter.norm(), adapter.id, {}, dtype)
        if self.like is None:
            matched([adapter], twice=False)
            saved, config = full_tensors([adapter], full), config_of(adapter.config, [adapter], full)
            like = replace(adapter, saved=saved, config=config)
        else:
            _, adapter = pair = matched([self.like, adapter], disjoint, twice=False)
            like = combine(pair, self.like.modules, any_base, full)
        kept = self.state.modules

        def grown(item: tuple[str, LowRank]) -> tuple[S, dict[str, float]]:
            return self.grow(kept.get(item[0]), item[1])

        found = dict(zip(adapter, parallel_map(grown, adapter.items(), progress), strict=True))
        numbers: dict[str, float] = {}
        for _, each in found.values():
            for key, number in each.items():
                numbers[key] = numbers.get(key, 0.0) + number
        new = State(kept | {module: s for module, (s, _) in found.items()}, list(self.state.members))
        new.members.append(member)
        member.record = self.record(numbers, new, member.norm)
        self.state, self.like = new, self._shaped(like, new)
        return self

    def remove(self, adapter: Adapter, progress: Progress | None = None) -> Self:
        """Take out an adapter: the state is then as if it had never come, to rounding.

        A module of which nothing is left is dropped, and the dtype is the widest of what is left; what the history
        said of sums that held the adapter is left out, and the last row is of what there is now. What the first adapter
        said of its base model and configuration holds, and full tensors stay; a warning says so of them.

        Raises
        ------
        ValueError
            If this stream cannot forget, no adapter with these very factors was added, or it is the only one.
        """
        shrink = self.shrink
        self.refuse_removal(adapter)
        at = next((i for i, m in enumerate(self.state.members) if m.id == adapter.id), None)
        if at is None:
            raise ValueError(
                f"cannot remove {adapter.source}: its factors are not those of an adapter in the state"
                f" ({', '.join(self.state.names)})"
            )
        if shrink is None or len(self.state.members) == 1:
            raise ValueError(f"cannot remove {adapter.source}: it is the only adapter of the state")
        if self.like is not None:
            _, adapter = matched([self.like, adapter], disjoint=True)
        kept = self.state.modules
        held = [module for module in adapter if module in kept]  # one that is zero may be gone
        left = parallel_map(lambda module: shrink(kept[module], adapter[module]), held, progress)
        new = {k: s for k, s in (kept | dict(zip(held, left, strict=True))).items() if s is not None}
        before, after = self.state.members[:at], self.state.members[at + 1 :]
        # What was said when later ones came, such as a rank, was said of sums that held it.
        self.state = State(new, before + [msgspec.structs.replace(m, record={}) for m in after])
        self.state.members[-1].record = self.record({}, self.state, self.state.norms[-1])
        if self.like is not None:
            if adapter.saved and self.like.saved:
                full = f"full tensors ({min(adapter.saved)}, …)"
                warnings.warn(f"{adapter.source}: its {full} are no part of the sum and stay", stacklevel=2)
            left = [FLOATS.get(m.dtype, self.like.dtype) for m in self.state.members]
            self.like = replace(self._shaped(self.like, self.state), dtype=widest(left))
        return self

    def adapter(
        self,
        rank: int | None = None,
        energy: float | None = None,
        ragged: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Adapter:
        """The merged adapter, scaled, truncated if asked; `ragged`, `dtype`, `dropped`, `factor` are as in `merge`.

        Raises
        ------
        ValueError
            If nothing was added yet, for a wrong rank or energy, or as `scaled`.
        """
        if self.like is None:
            raise ValueError("nothing was added yet: add an adapter first")
        updates = {module: self.export(kept) for module, kept in self.state.modules.items()}
        cut = parallel_map(lambda u: u.truncate(rank, energy), updates.values())
        dropped = {name: share for name, (_, share) in zip(updates, cut, strict=True)}
        short = {name: update for name, (update, _) in zip(updates, cut, strict=True)}
        by = self._factor(short if self.options.get("scale") == AUTO else updates)
        merged = scaled(replace(self.like, dtype=dtype or self.like.dtype), short, by)
        merged = replace(merged, dropped=dropped, factor=by, metadata=lasting(self.like.metadata, self.state.names))
        return merged if ragged else level(merged)

    def _factor(self, updates: Mapping[str, LowRank]) -> float:
        size = sum(u.norm() ** 2 for u in updates.values()) ** 0.5
        return factor(self.options.get("scale", 1.0), size, self.state.norms)

    def _shaped(self, like: Adapter, state: State[S]) -> Adapter:
        """The metadata with updates of rank 0: their names and shapes."""
        shapes = {name: self.shape(kept) for name, kept in state.modules.items()}
        none = {name: LowRank(torch.zeros(m, 0), torch.zeros(0, n)) for name, (m, n) in shapes.items()}
        return like.with_modules(none)

    # -- state files ------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> Path:
        """Write the state to one .safetensors file; what was there stays whole until the new one is.

        Raises
        ------
        ValueError
            If there is no adapter yet.
        """
        if self.like is None:
            raise ValueError("nothing was added yet: there is no state to save")
        packed = {module: self.pack(kept) for module, kept in self.state.modules.items()}
        tensors = {f"{part}/{module}": x for module, parts in packed.items() for part, x in parts.items()}
        content = Content(self.options, self.state.members, list(self.state.modules))
        return save_bundle(path, self.kind, self.like, content, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """The stream that `save` wrote; going on from it gives the same bytes as never having stopped.

        Raises
        ------
        AdapterError
            If the file is not a state of this kind, or is damaged.
        """
        content, tensors, like = load_bundle(path, cls.kind, Content)
        try:
            stream = cls(**content.options)
            if not (content.modules and content.members):
                raise ValueError("expected modules, and a name, a norm and a hash for every adapter")
            parts: dict[str, dict[str, Tensor]] = {module: {} for module in content.modules}
            for key, tensor in tensors.items():
                part, _, module = key.partition("/")
                parts.get(module, {})[part] = tensor
            stream.state = State({m: stream.unpack(found) for m, found in parts.items()}, content.members)
            stream.like = stream._shaped(like, stream.state)
        except DamagedError as error:
            raise damaged(path, error) from None
        return stream
