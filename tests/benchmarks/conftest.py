"""Import benchmarks as when they are run as scripts."""

from __future__ import annotations

import importlib
import signal
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture()
def benchmark(monkeypatch):
    """Import a benchmark by name, with its folder on the path, as when it is run as a script."""
    monkeypatch.syspath_prepend(str(FOLDER))
    handler, num_threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    yield importlib.import_module
    signal.signal(signal.SIGTERM, handler)  # some run as programs do, which end with their process
    torch.set_num_threads(num_threads)
    for name, module in list(sys.modules.items()):  # reading an attribute of a lazy module imports others
        if str(FOLDER) in str(vars(module).get("__file__", "")):
            del sys.modules[name]
