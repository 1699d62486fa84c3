"""Settings and fixtures of all tests: offline, single-threaded, with two real tokenizers."""

from __future__ import annotations

import os

# Set before torch, tokenizers and huggingface_hub read them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the expected values are those of a CPU

import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from support import real_tokenizers
from support.process_state import ProcessState

torch.set_num_threads(1)
# `make test` hands its own variables to the make commands that tests run; a shell may export the others.
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "STACK", "TORCH", "COLUMNS", "NO_COLOR", "FORCE_COLOR"):
    os.environ.pop(name, None)
os.environ["TERM"] = "xterm"  # of the terminals that tests open; that of a job may be dumb
# Under nohup, this process and the runs that it starts would ignore SIGHUP.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# A slow machine must not fail a test: no deadline per example.
hypothesis.settings.register_profile(
    "project", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], max_examples=100
)
hypothesis.settings.load_profile("project")

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fail a test that leaves the process in another state than it found, which later tests would depend on."""
    before = ProcessState()
    yield
    changes = before.restore()
    if changes:
        pytest.fail("the test leaves behind: " + "; ".join(changes))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with slow tests first: one that ran last would leave the other processes of `make test` idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of values that were measured with the published training code."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Optional folder of data beside the repository. Tests that use it repeat checks that others make without it."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder shared/ beside the repository")
    return folder


@pytest.fixture(scope="session")
def mistral_v3_folder(pytestconfig: pytest.Config) -> Path:
    """Hugging Face folder with the tokenizer of Mistral-7B-Instruct-v0.3, cached between runs."""
    return real_tokenizers.tokenizer_folder("mistral_v3", pytestconfig.cache.mkdir("tokenizers"))


@pytest.fixture(scope="session")
def zephyr_v1_folder(pytestconfig: pytest.Config) -> Path:
    """Hugging Face folder with the tokenizer of Zephyr, cached between runs."""
    return real_tokenizers.tokenizer_folder("zephyr_v1", pytestconfig.cache.mkdir("tokenizers"))


@pytest.fixture(scope="session")
def mistral_v3_tokenizer(mistral_v3_folder: Path):
    """Tokenizer of Mistral-7B-Instruct-v0.3. Copy it before changing it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(mistral_v3_folder)


@pytest.fixture(scope="session")
def zephyr_v1_tokenizer(zephyr_v1_folder: Path):
    """Tokenizer of Zephyr. Copy it before changing it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(zephyr_v1_folder)
