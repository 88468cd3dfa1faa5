"""Mutation testing: do the fast tests notice when an operator, a number or a return of the package is another one?

    make mutants N=100 SEED=0          python tests/mutants.py 100 --seed 0 --room rules

cosmic-ray makes the mutations. Its runner is not used: it changes the checkout, and starts Python anew for each
mutant, which takes as long as the tests. (mutmut leaves out decorated functions, and every merge rule is one.) Here
a copy is changed, and pytest runs in forks of a process that has imported torch, and nothing of the package.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from importlib import import_module
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a process with threads cannot be forked safely

import parso
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

ROOT, LIMIT = Path(__file__).resolve().parent.parent, 120  # seconds for the tests of one mutant
# What the name of a file of the package begins with → the tests that are there to notice.
TESTS = {
    "merging/rules/": "golden joint references sums opcm methods lowrank starts batch",
    "merging/core": "lowrank golden joint references scale", "merging/sketch": "sketch", "merging/batch": "batch scale",
    "merging/merge": "golden methods values_merge lowrank scale",
    "merging/method": "methods entry_points references lowrank", "merging/shards": "scale",
    "merging/remarks": "starts methods", "merging/plan": "plan_costs plan values_report lowrank",
    "streams/": "opcm sums values_states entry_points methods names",
    "geometry/": "geometry similarity values references",
    "gauge": "similarity lowrank values_states methods",
    "command/app": "values values_merge values_report values_states cli",
    "command/states": "values_states cli", "command/recipe": "values_merge similarity cli",
    "command/tables": "values cli", "command/report": "values_report cli",
}  # fmt: skip
# Those that a person could have typed; `a @ b` for `a + b` would fall over at once.
OPERATORS = """
ReplaceComparisonOperator_ Lt_LtE Lt_Gt LtE_Lt Gt_GtE GtE_Gt Gt_Lt Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is
ReplaceBinaryOperator_ Add_Sub Sub_Add Mul_Div Div_Mul Pow_Mul FloorDiv_Div Mod_Mul
ReplaceUnaryOperator_ USub_UAdd Delete_Not Delete_Invert
Replace TrueWithFalse FalseWithTrue AndWithOr OrWithAnd BreakWithContinue ContinueWithBreak
- AddNot NumberReplacer ZeroIterationForLoop
"""
COSMETIC = ("menu =", "buttons =", "drawing.finish(", "go.Figure(")


class ReturnNone(Operator):
    examples = classmethod(lambda cls: ())

    def mutation_positions(self, node):
        if node.type == "return_stmt" and node.children[1].get_code().strip() != "None":
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        node.children[1] = parso.parse(" None")
        return node


def room_of(begin: str) -> str:
    return "rules" if "rules" in begin else begin.partition("/")[0]


def plain(node) -> bool:
    """Whether a change there is one of what the package does: not of a type, a message or a picture's looks."""
    inside = node
    if node.parent and node.parent.type == "parameters":
        return False  # the star between them
    while outside := inside.parent:
        if outside.type in ("raise_stmt", "fstring", "tfpdef") or outside.get_code().strip().startswith(COSMETIC):
            return False
        if outside.type == "annassign" and inside is outside.children[1]:
            return False
        if outside.type == "argument" and outside.children[0].get_code().strip() == "strict":
            return False  # of a zip, which says that its lengths agree
        inside = outside
    return not node.get_code().strip().startswith("if TYPE_CHECKING")


def mutants(file: Path) -> list[tuple[Operator, int, int]]:
    """(operator, occurrence, line) of every plain mutation of a file."""
    named = [(family.strip("-"), kinds) for family, *kinds in map(str.split, OPERATORS.split("\n")[1:-1])]
    operators = [get_operator(f"core/{family}{kind}")() for family, kinds in named for kind in kinds]
    nodes, found = list(ast_nodes(get_ast(file.read_text()))), []
    for operator in [*operators, ReturnNone()]:
        sites = [(node, start[0]) for node in nodes for start, _ in operator.mutation_positions(node)]
        found += [(operator, i, line) for i, (node, line) in enumerate(sites) if plain(node)]
    return found


class Noted:
    """A plugin of pytest: `file` names the test that failed, or the file that cannot be imported."""

    def __init__(self, file: Path):
        self.file = file  # whole: a test may fail in another folder

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.file.write_text(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport


def tests_pass(copy: Path, tests: list[str], limit: float = LIMIT) -> bool | None:
    """What pytest says in a fork of this process; None if it takes too long."""
    if not (pid := os.fork()):
        os.setsid()
        os.chdir(copy)
        os.dup2(os.open("log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1)
        os.dup2(1, 2)
        options = ["-m", "not slow and not browser and not nightly", *"-x -p no:randomly -p no:cacheprovider".split()]
        code = int(pytest.main([*options, "--basetemp", "tmp", *tests], plugins=[Noted(copy / "failed")]))
        if code == 0 and not Path(sys.modules["lora_opcm"].__file__).is_relative_to(copy):
            code = 3  # another package was tested
        sys.stdout.flush()
        os._exit(code)
    end = time.monotonic() + limit
    while not (done := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what it started, too
    if not done[0]:
        os.waitpid(pid, 0)
        return None
    code = os.waitstatus_to_exitcode(done[1])
    if code in (3, 4, 5):  # pytest could not work; 2 is a test file that cannot be imported
        raise RuntimeError(f"tests {tests} do not run:\n" + (copy / "log").read_text()[-3000:])
    return code == 0


def tried(copy: Path, number: int, seed: int, rooms: list[str]) -> Counter:
    """Try `number` mutants (0: all) and print what became of them; counts of (room, head)."""
    files = [
        (b, f) for b in TESTS for f in sorted(copy.glob(f"lora_opcm/{b}*")) if room_of(b) in rooms and f.suffix == ".py"
    ]
    pool = [(begin, file, *mutant) for begin, file in files for mutant in mutants(file)]
    random.Random(seed).shuffle(pool)
    sample, rows, noticed = pool[: number or None], Counter(), set()
    print(f"{len(sample)} of {len(pool)} mutants, seed {seed}", flush=True)
    for begin, file, operator, occurrence, line in sample:
        before, stamp, start = file.read_text(), file.stat(), time.monotonic()
        after = mutate_code(before, operator, occurrence)
        file.write_text(after)
        passed = tests_pass(copy, [f"tests/test_{name}.py" for name in TESTS[begin].split()])
        file.write_text(before)
        os.utime(file, (stamp.st_atime, stamp.st_mtime))  # or compiled files of the copy would be taken for old
        noticed |= {(copy / "failed").read_text()} if passed is False else set()
        ended = {True: "survived", False: "killed", None: "timed out"}[passed]
        rows.update([(room_of(begin), ended), (room_of(begin), "mutants")])
        change = next(f"{a.strip()}  →  {b.strip()}" for a, b in zip(before.split("\n"), after.split("\n")) if a != b)
        print(f"{ended:9} {time.monotonic() - start:5.1f} s  {file.relative_to(copy)}:{line}  {change}", flush=True)
    if noticed and not tests_pass(copy, sorted(noticed), 10 * LIMIT):
        raise RuntimeError("these fail without a mutation, too:\n" + (copy / "log").read_text()[-3000:])
    return rows


def main() -> int:
    rooms = list(dict.fromkeys(map(room_of, TESTS)))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("number", type=int, nargs="?", default=100, help="0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--room", choices=rooms, action="append")
    parser.add_argument("--least", type=float, default=0.0, help="exit code 1 if a smaller share dies")
    asked = parser.parse_args()
    for name in ("torch", "pandas", "scipy.stats", "plotly.io", "typer", "rich.console", "safetensors.torch"):
        import_module(name)
    from hypothesis import Phase, settings

    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None)  # no shrinking
    settings.load_profile("mutants")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        for name in ("lora_opcm", "tests", "data", "book/_ext"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        sys.path[0] = os.environ["PYTHONPATH"] = str(copy)
        rows = tried(copy, asked.number, asked.seed, asked.room or rooms)
    heads = ("mutants", "killed", "timed out", "survived")
    print("room".ljust(10), *(head.rjust(10) for head in heads))
    for room in [*(asked.room or rooms), "all"]:
        counts = [sum(n for (r, h), n in rows.items() if h == head and room in (r, "all")) for head in heads]
        print(room.ljust(10), *(str(n).rjust(10) for n in counts))
    return int(1 - counts[-1] / max(1, counts[0]) < asked.least)


if __name__ == "__main__":
    sys.exit(main())
