"""The demo from end to end at a size too small to learn anything."""

from __future__ import annotations

import pytest
import torch
from support.launching import REPOSITORY, metrics

from rankllm_composer.demo import run_demo
from rankllm_composer.errors import RunError
from rankllm_composer.prompts.contract import read_contract

RECIPE = REPOSITORY / "yamls" / "demo.yaml"


@pytest.fixture()
def one_thread():
    """The demo computes on two threads."""
    yield
    torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_demo_runs_end_to_end(tmp_path):
    lines: list[str] = []
    short = ["run.max_duration=4ba", "schedule.warmup=1ba"]
    figures = run_demo(tmp_path, RECIPE, short, num_train_queries=256, report=lines.append)
    assert list(figures) == ["first stage", "untrained", "trained", "oracle"]
    assert all(0.5 < value <= 1.0 for value in figures.values()) and figures["oracle"] == 1.0
    assert figures["first stage"] == pytest.approx(0.8, abs=0.03)  # chance
    assert "nDCG@10 on 200 held-out queries" in lines[-2]
    assert len(metrics(tmp_path / "metrics.jsonl")) == 4
    assert read_contract(tmp_path / "untrained").objective == read_contract(tmp_path / "hf" / "epoch_0").objective

    with pytest.raises(RunError, match="exit code"):
        run_demo(tmp_path, RECIPE, ["optimizer.lr=2"], num_train_queries=256, report=lines.append)
