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
from importlib import import_module
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a process with threads cannot be forked safely

import parso
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).resolve().parent.parent
FAST = "not slow and not browser and not nightly"
LIMIT = 120  # seconds for the tests of one mutant
# Which fast tests are there to notice, by what the name of a file of the package begins with.
ROOMS = {
    "rules": {"merging/rules/": "golden references sums opcm methods"},
    "merging": {
        "merging/core": "lowrank golden references scale",
        "merging/merge": "golden methods values_merge scale",
        "merging/method": "methods entry_points references",
        "merging/shards": "scale",
        "merging/plan": "plan_costs plan values_report",
    },
    "streams": {"streams/": "opcm sums values_states entry_points methods"},
    "geometry": {"geometry/": "geometry similarity values references"},
    "gauge": {"gauge": "similarity lowrank values_states methods"},
    "command": {
        "command/app": "values values_merge values_report values_states cli",
        "command/states": "values_states cli",
        "command/recipe": "values_merge cli",
        "command/tables": "values cli",
        "command/report": "values_report cli",
    },
}
# Those that a person could have typed; `a @ b` for `a + b` or `|` for `&` would fall over at once.
COMPARISONS = "Lt_LtE Lt_Gt LtE_Lt Gt_GtE Gt_Lt GtE_Gt Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is".split()
BINARY = "Add_Sub Sub_Add Mul_Div Div_Mul Pow_Mul FloorDiv_Div Mod_Mul".split()
NAMES = [
    *(f"ReplaceComparisonOperator_{x}" for x in COMPARISONS),
    *(f"ReplaceBinaryOperator_{x}" for x in BINARY),
    *(f"ReplaceUnaryOperator_{x}" for x in ("USub_UAdd", "Delete_Not", "Delete_Invert")),
    *("AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "NumberReplacer", "ZeroIterationForLoop"),
]  # fmt: skip


class ReturnNone(Operator):
    """`return x` returns None."""

    def mutation_positions(self, node):
        if node.type == "return_stmt" and node.children[1].get_code().strip() != "None":
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        node.children[1] = parso.parse(" None")
        return node

    @classmethod
    def examples(cls):
        return ()


OPERATORS = [get_operator(f"core/{name}")() for name in NAMES] + [ReturnNone()]


def plain(node) -> bool:
    """Whether a change there is one of what the package does, and not of a type, a message or a picture's looks."""
    inside = node
    while outside := inside.parent:
        if outside.type in ("raise_stmt", "fstring", "tfpdef"):
            return False
        if outside.type == "annassign" and inside is outside.children[1]:
            return False
        if outside.type in ("expr_stmt", "atom_expr", "return_stmt"):
            if outside.get_code().strip().startswith(("menu =", "buttons =", "drawing.finish(", "go.Figure(")):
                return False
        inside = outside
    return not node.get_code().strip().startswith("if TYPE_CHECKING")


def mutants(file: Path) -> list[tuple[Operator, int, int]]:
    """(operator, occurrence, line) of every plain mutation of a file."""
    nodes, found = list(ast_nodes(get_ast(file.read_text()))), []
    for operator in OPERATORS:
        sites = [(node, start[0]) for node in nodes for start, _ in operator.mutation_positions(node)]
        found += [(operator, i, line) for i, (node, line) in enumerate(sites) if plain(node)]
    return found


class Noted:
    """A plugin of pytest: which test failed, or file that cannot be imported."""

    def __init__(self, file: Path):
        self.file = file
        file.unlink(missing_ok=True)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.file.write_text(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport


def tests_pass(copy: Path, tests: list[str], limit: float = LIMIT) -> bool | None:
    """What pytest says in a fork of this process; None if it takes too long."""
    pid = os.fork()
    if not pid:
        os.setsid()
        os.chdir(copy)
        os.dup2(os.open(copy / "log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1)
        os.dup2(1, 2)
        options = ["-x", "-m", FAST, "--basetemp", str(copy / "tmp"), "-p", "no:randomly", "-p", "no:cacheprovider"]
        code = int(pytest.main([*options, *tests], plugins=[Noted(copy / "failed")]))
        if code == 0 and not Path(sys.modules["lora_opcm"].__file__).is_relative_to(copy):
            code = 3  # another package was tested
        sys.stdout.flush()
        os._exit(code)
    end = time.monotonic() + limit
    while not (done := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.02)
    try:
        os.killpg(pid, signal.SIGKILL)  # what it started, too
    except ProcessLookupError:
        pass
    if not done[0]:
        os.waitpid(pid, 0)
        return None
    code = os.waitstatus_to_exitcode(done[1])
    if code in (3, 4, 5):  # pytest could not work; 2 is a test file that cannot be imported
        raise RuntimeError(f"tests {tests} do not run:\n" + (copy / "log").read_text()[-3000:])
    return code == 0


def change(before: str, after: str) -> str:
    pairs = [(a.strip(), b.strip()) for a, b in zip(before.splitlines(), after.splitlines()) if a != b]
    return "  →  ".join(pairs[0]) if pairs else "lines removed"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("number", type=int, nargs="?", default=100, help="0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--room", choices=ROOMS, action="append")
    parser.add_argument("--least", type=float, default=0.0, help="exit code 1 if a smaller share dies")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        for name in ("lora_opcm", "tests", "data"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        sys.path[0] = os.environ["PYTHONPATH"] = str(copy)
        return tried(copy, asked)


def tried(copy: Path, asked) -> int:
    pool = []
    for room in asked.room or ROOMS:
        for begin, tests in ROOMS[room].items():
            for file in sorted((copy / "lora_opcm").rglob("*.py")):
                if str(file.relative_to(copy / "lora_opcm")).startswith(begin):
                    pool += [(room, file, tests, *mutant) for mutant in mutants(file)]
    random.Random(asked.seed).shuffle(pool)
    sample = pool[: asked.number or None]
    print(f"{len(sample)} of {len(pool)} mutants, seed {asked.seed}", flush=True)
    for name in ("torch", "pandas", "scipy.stats", "plotly.io", "typer", "rich.console", "safetensors.torch"):
        import_module(name)
    from hypothesis import Phase, settings

    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None)  # no shrinking
    settings.load_profile("mutants")
    rows, noticed = Counter(), set()
    for room, file, tests, operator, occurrence, line in sample:
        before, start = file.read_text(), time.monotonic()
        after = mutate_code(before, operator, occurrence)
        stamp = file.stat()
        file.write_text(after)
        passed = tests_pass(copy, [f"tests/test_{name}.py" for name in tests.split()])
        file.write_text(before)
        os.utime(file, (stamp.st_atime, stamp.st_mtime))  # or compiled files of the copy would be taken for old
        ended = {True: "survived", False: "killed", None: "timed out"}[passed]
        if passed is False:
            noticed.add((copy / "failed").read_text())
        rows.update([(room, ended), (room, "mutants")])
        place = f"{file.relative_to(copy)}:{line}"
        print(f"{ended:9} {time.monotonic() - start:5.1f} s  {place}  {change(before, after)}", flush=True)
    if noticed and not tests_pass(copy, sorted(noticed), 10 * LIMIT):  # and were not broken before
        raise RuntimeError("tests fail without a mutation:\n" + (copy / "log").read_text()[-3000:])
    heads = ("mutants", "killed", "timed out", "survived")
    print("room".ljust(10), *(head.rjust(10) for head in heads))
    for room in [*(asked.room or ROOMS), "all"]:
        counts = [sum(n for (r, h), n in rows.items() if h == head and room in (r, "all")) for head in heads]
        print(room.ljust(10), *(str(n).rjust(10) for n in counts))
    return int(1 - counts[-1] / max(1, counts[0]) < asked.least)


if __name__ == "__main__":
    sys.exit(main())
