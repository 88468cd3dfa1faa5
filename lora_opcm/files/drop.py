"""Adapters without some of their modules."""

import fnmatch
from collections.abc import Sequence
from dataclasses import replace

from .adapter import Adapter, AdapterError
from .names import canonical


def dropping(adapters: Sequence[Adapter], patterns: Sequence[str] | str) -> list[Adapter]:
    """The adapters without the modules and full tensors whose names match one of the patterns (`fnmatch`).

    A layer that is gone from one of them is gone from those that spell it otherwise, too; of a layer that an adapter
    has under two names, one may be left.

    Raises
    ------
    AdapterError
        If a pattern matches no name at all, or nothing is left of an adapter.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    names = {name for adapter in adapters for name in (*adapter.modules, *adapter.saved)}
    hit: set[str] = set()
    for pattern in patterns:
        if not (found := fnmatch.filter(names, pattern)):
            sources = ", ".join(a.source for a in adapters)
            raise AdapterError(f"--drop {pattern}: no name of {sources} matches, expected one such as {min(names)}")
        hit |= {*found, *(f"{name}.base_layer.weight" for name in found)}  # of the base, and saved by peft unasked
    if not hit:
        return list(adapters)
    gone = set[str]().union(*({*map(canonical, a.keys() & hit)} - {*map(canonical, a.keys() - hit)} for a in adapters))
    return [_without(adapter, hit, gone, patterns) for adapter in adapters]


def _without(adapter: Adapter, hit: set[str], gone: set[str], patterns: Sequence[str]) -> Adapter:
    layers = gone - {*map(canonical, adapter.keys() & hit)}  # those that this adapter spells otherwise
    modules = {name: u for name, u in adapter.items() if name not in hit and canonical(name) not in layers}
    if not modules:
        raise AdapterError(f"{adapter.source}: --drop {' '.join(patterns)} leaves no module of it")
    saved = {name: t for name, t in adapter.saved.items() if name not in hit}
    config = adapter.with_modules(modules).config
    if named := config.get("modules_to_save") if len(saved) < len(adapter.saved) else None:
        left = [module for module in named if any(f".{module}." in f".{name}" for name in saved)]
        config = config | {"modules_to_save": left or None}
    return replace(adapter.with_modules(modules), saved=saved, config=config)
