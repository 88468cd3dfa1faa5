import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GEOMSTATS_BACKEND", "numpy")

SITE_TALLY = pytest.StashKey()  # what test_site.py looked at


def pytest_terminal_summary(terminalreporter, config):
    if tally := config.stash.get(SITE_TALLY, None):
        terminalreporter.write_line("site: " + ", ".join(f"{n} {what}" for what, n in tally.items()))


@pytest.fixture(params=[torch.float32, torch.float64], ids=["f32", "f64"])
def dtype(request):
    return request.param


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
