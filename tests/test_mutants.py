"""A few mutants, other ones every day: the fast tests notice most. `make mutants N=0` tries them all."""

import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_most_of_a_sample_of_mutants_die():
    """Where 9 of 10 die, more than 4 of 12 survive once in 230 days."""
    words = ["tests/mutants.py", "12", "--seed", str(date.today().toordinal()), "--least", "0.6"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
