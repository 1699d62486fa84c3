"""Errors of libraries, each raised by the library itself, become one line with cause and remedy."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.recipes import problems, write_recipe

from rankllm_composer.errors import CheckpointError, RunError
from rankllm_composer.training.failures import explained_failures


def test_a_sharded_checkpoint_that_cannot_be_written(tmp_path):
    """torch raises a CheckpointException, which is no Exception."""
    (tmp_path / "file").touch()
    with (
        pytest.raises(
            CheckpointError, match=r"could not be written or read \(rank 0: \w+: .*\); complete .*Free space"
        ),
        explained_failures(),
    ):
        dcp.save({"weight": torch.ones(1)}, checkpoint_id=tmp_path / "file" / "checkpoint", no_dist=True)


def test_a_logger_with_a_wrong_address():
    import mlflow

    with (
        pytest.raises(RunError, match=r"logging\.loggers\.mlflow: \w+Exception: .*Correct tracking_uri"),
        explained_failures(),
    ):
        mlflow.MlflowClient("nothing://here").get_experiment("0")


def test_too_little_memory_and_unknown_errors():
    with (
        pytest.raises(RunError, match=r"too little memory \(CUDA out of memory.*Lower batch\.microbatch_tokens"),
        explained_failures(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(KeyError), explained_failures():
        raise KeyError("ours to fix")


def test_a_seed_beyond_32_bits(tmp_path):
    path = write_recipe(tmp_path)
    assert not problems(path, "run.seed=2147483647")
    assert "run.seed" in problems(path, "run.seed=4294967296")
