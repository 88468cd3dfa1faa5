"""Nine puzzles of reasoning-gym: a question that says how to answer, and the one right answer.

The package's wheel is taken alone: its other puzzles need libraries that these nine do not.
"""

import gzip
import hashlib
import importlib
import json
import sys
import types
from dataclasses import dataclass
from functools import cache

from ...files.disk import replacing
from ..assets import PUZZLES, cache_dir, fetch

SEED = 0
SIZES = {"test": 400, "validation": 200, "train": 4000}
Rows = list[tuple[str, str]]  # question, answer


@dataclass(frozen=True)
class Recipe:
    """Where a puzzle is in reasoning-gym, how the answer is asked for, and how hard it is."""

    module: str
    ask: str
    options: dict


RECIPES = {
    "word_sorting": Recipe(
        "algorithmic.word_sorting",
        "Answer with the sorted list alone.",
        {"min_words": 3, "max_words": 6, "max_word_length": 8},
    ),
    "number_filtering": Recipe(
        "algorithmic.number_filtering",
        "Answer with the list alone, such as ['1.5', '-2'], or [] if it is empty.",
        {"min_numbers": 3, "max_numbers": 5, "max_decimals": 2},
    ),
    "letter_counting": Recipe(
        "algorithmic.letter_counting",
        "Answer with the number alone.",
        {"min_words": 4, "max_words": 10},
    ),
    "word_sequence_reversal": Recipe(
        "algorithmic.word_sequence_reversal",
        "Answer with the reversed list alone.",
        {"min_words": 3, "max_words": 7},
    ),
    "chain_sum": Recipe(
        "arithmetic.chain_sum",
        "Answer with the number alone.",
        {"min_terms": 2, "max_terms": 4, "max_digits": 3},
    ),
    "family_relationships": Recipe(
        "graphs.family_relationships",
        "Answer with the one word alone, such as sister or father-in-law.",
        {"max_family_size": 6},
    ),
    # Its 270 sentences come from one story: those of the test are in training too, in another disorder.
    "sentence_reordering": Recipe(
        "algorithmic.sentence_reordering",
        "Answer with the sentence alone.",
        {"max_words_in_sentence": 12},
    ),
    "syllogism": Recipe("logic.syllogisms", "Answer with the one word alone.", {}),
    "spell_backward": Recipe("algorithmic.spell_backward", "Answer with the reversed word alone.", {}),
}


def puzzles() -> tuple[str, ...]:
    """Names of the nine puzzles."""
    return tuple(RECIPES)


@cache
def load_puzzle(name: str) -> dict[str, Rows]:
    """Split → (question, answer) of each example; made once and kept in the cache.

    No question is in two splits or twice in one.

    Raises
    ------
    ValueError
        For an unknown name, with the names that exist.
    AssetError
        If reasoning-gym cannot be fetched.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown puzzle {name!r}; the puzzles are {', '.join(RECIPES)}")
    file = puzzle_file(name)
    if not file.exists():
        text = json.dumps(_make(name), ensure_ascii=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as scratch:
            scratch.write_bytes(gzip.compress(text.encode(), mtime=0))
    rows = json.loads(gzip.decompress(file.read_bytes()))
    return {split: [(question, answer) for question, answer in rows[split]] for split in rows}


def puzzle_file(name: str):
    """Where the examples of a puzzle are kept: the name changes with all that they depend on."""
    recipe = RECIPES[name]
    told = json.dumps([recipe.ask, recipe.options, SEED, SIZES, PUZZLES.pin])
    return cache_dir() / "puzzles" / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}.json.gz"


def _make(name: str) -> dict[str, Rows]:
    recipe = RECIPES[name]
    _importable(recipe.module)
    importlib.import_module(f"reasoning_gym.{recipe.module}")  # registers the puzzle
    factory = importlib.import_module("reasoning_gym.factory")
    wanted = sum(SIZES.values())
    source = factory.create_dataset(name, size=10 * wanted, seed=SEED, **recipe.options)
    rows: dict[str, str] = {}
    for i in range(10 * wanted):
        item = source[i]
        rows.setdefault(f"{item['question'].strip()}\n{recipe.ask}", str(item["answer"]))
        if len(rows) == wanted:
            break
    else:
        raise ValueError(f"{name}: only {len(rows)} different questions, expected {wanted}")
    left = iter(rows.items())
    return {split: [next(left) for _ in range(size)] for split, size in SIZES.items()}


def _importable(module: str) -> None:
    """Bare packages in place of those of reasoning-gym, which import every puzzle and its libraries."""
    root = fetch(PUZZLES) / "reasoning_gym"
    for name in ("reasoning_gym", f"reasoning_gym.{module.split('.')[0]}"):
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = package
