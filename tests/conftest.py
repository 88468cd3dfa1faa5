import os
from collections import Counter

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GEOMSTATS_BACKEND", "numpy")

if "PYTEST_XDIST_WORKER" in os.environ:  # two workers on two cores are in each other's way
    torch.set_num_threads(1)

SITE_TALLY = pytest.StashKey()  # Counter of what test_site.py looked at, in this process


def pytest_configure(config):
    config.stash[SITE_TALLY] = Counter()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[SITE_TALLY].update(getattr(node, "workeroutput", {}).get("site", {}))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["site"] = dict(session.config.stash[SITE_TALLY])


def pytest_terminal_summary(terminalreporter, config):
    if tally := config.stash[SITE_TALLY]:
        terminalreporter.write_line("site: " + ", ".join(f"{n} {what}" for what, n in sorted(tally.items())))


@pytest.fixture(params=[torch.float32, torch.float64], ids=["f32", "f64"])
def dtype(request):
    return request.param


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
