"""A few mutants, other ones every day: the fast tests notice most. `make mutants N=0` tries them all."""

import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "least"), [(3, 0.3), pytest.param(24, 0.6, marks=pytest.mark.nightly)], ids=["by day", "by night"]
)
def test_most_of_a_sample_of_mutants_die(number, least):
    """Where 9 of 10 die, all of 3 survive once in 1,000 days, and more than 9 of 24 never."""
    words = ["tests/mutants.py", str(number), "--seed", str(date.today().toordinal()), "--least", str(least)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
