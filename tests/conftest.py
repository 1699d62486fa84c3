"""What all tests share: a quiet, offline, single-threaded machine, and two real tokenizers."""

from __future__ import annotations

import os

# Before torch, tokenizers and the hub client read them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import hypothesis
import pytest
import torch
from support import real_tokenizers

torch.set_num_threads(1)
# A busy machine is no failure: no deadline for an example.
hypothesis.settings.register_profile(
    "project", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], max_examples=100
)
hypothesis.settings.load_profile("project")

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the files that hold measured values of the published training code."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of data that a developer may have beside the repository; no test relies on it alone."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder shared/ beside the repository, which is not part of it")
    return folder


@pytest.fixture(scope="session")
def mistral_v3_folder(pytestconfig: pytest.Config) -> Path:
    """HF folder of Mistral-7B-Instruct-v0.3's tokenizer, built once and kept between runs."""
    return real_tokenizers.tokenizer_folder("mistral_v3", pytestconfig.cache.mkdir("tokenizers"))


@pytest.fixture(scope="session")
def zephyr_v1_folder(pytestconfig: pytest.Config) -> Path:
    """HF folder of Zephyr's tokenizer, built once and kept between runs."""
    return real_tokenizers.tokenizer_folder("zephyr_v1", pytestconfig.cache.mkdir("tokenizers"))


@pytest.fixture(scope="session")
def mistral_v3_tokenizer(mistral_v3_folder: Path):
    """Mistral-7B-Instruct-v0.3's tokenizer. A test that changes it takes a copy."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(mistral_v3_folder)


@pytest.fixture(scope="session")
def zephyr_v1_tokenizer(zephyr_v1_folder: Path):
    """Zephyr's tokenizer. A test that changes it takes a copy."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(zephyr_v1_folder)
