"""The public Python API: what `import rankllm_composer` offers, and training twice in one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support.fruit_lists import fruit_run

import rankllm_composer as rc


@pytest.fixture
def overrides(tmp_path) -> list[str]:
    return fruit_run(tmp_path)


def load(*overrides: str) -> rc.Recipe:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rc.load_recipe("demo", overrides)


def test_every_public_name_exists_and_is_documented():
    assert sorted(rc._MODULE_OF) == sorted(rc.__all__)
    for name in rc.__all__:
        assert name in dir(rc)
        assert name == "LOSSES" or getattr(rc, name).__doc__
    assert {f"{name}_loss" for name in rc.LOSSES} <= set(rc.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        rc.nothing  # noqa: B018


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def test_public_names_are_typed_for_editors():
    """The names imported under TYPE_CHECKING, which editors read, are the public ones."""
    import ast

    tree = ast.parse(Path(rc.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == set(rc.__all__)


def test_training_twice_in_one_process_leaves_nothing_behind(overrides, tmp_path, capsys, monkeypatch):
    environment, handlers = dict(os.environ), [signal.getsignal(number) for number in STOPS]
    first = rc.train(load(*overrides))
    assert first.folder == tmp_path / "run" and [path.name for path in first.exports] == ["epoch_0"]
    assert first.best == first.exports[-1]
    with pytest.raises(rc.RankLLMComposerError, match="holds a run of another recipe"):
        rc.train(load(*overrides, "run.seed=7"))
    capsys.readouterr()
    assert rc.train(load(*overrides)).exports == first.exports
    assert "is complete, at batch 3, where run.max_duration=1ep is reached" in capsys.readouterr().out
    changes = ["optimizer.lr=1e-9", "schedule.warmup=50ba", "run.accept_changes=[optimizer.lr,schedule]"]
    changes += [f"run.folder={shutil.copytree(first.folder, tmp_path / 'longer')}", "run.max_duration=2ep"]
    with pytest.warns(UserWarning, match="warmup is 50ba, 50 updates, but the run has 6 .* ends at 10% of optimizer"):
        longer = rc.train(load(*overrides, *changes))
    batches = [json.loads(line) for line in (longer.folder / "metrics.jsonl").read_text().splitlines()]
    assert max(line["lr"] for line in batches if line["epoch"] == 1) <= 1e-9 < batches[1]["lr"]
    record = f"after batch 3: optimizer.lr was {load(*overrides).optimizer.lr}, is now 1e-09"
    assert f"# changed {record}\n" in (longer.folder / "recipe.yaml").read_text()
    assert f"| changed | {record} |" in (longer.exports[-1] / "README.md").read_text()
    second = rc.train(load(*overrides, f"run.folder={tmp_path / 'second'}"))
    weights = [(run.exports[0] / "model.safetensors").read_bytes() for run in (first, second)]
    assert weights[0] == weights[1]
    assert not torch.distributed.is_initialized() and dict(os.environ) == environment
    assert [signal.getsignal(number) for number in STOPS] == handlers
    assert "exported:" in capsys.readouterr().out

    # A machine with a GPU, which is shared out by CUDA_VISIBLE_DEVICES: Composer would take it under FSDP2.
    visible = lambda: int(os.environ.get("CUDA_VISIBLE_DEVICES") != "")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", visible)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert torch.cuda.is_available()
    on_cpu = ["parallelism.device=cpu", "parallelism.fsdp=true", f"run.folder={tmp_path / 'third'}"]
    third = rc.train(load(*overrides, *on_cpu))
    assert (third.exports[0] / "model.safetensors").read_bytes() == weights[0]
    assert torch.cuda.is_available() and "CUDA_VISIBLE_DEVICES" not in os.environ
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: 1)  # as if CUDA had counted them before
    with pytest.raises(rc.RankLLMComposerError, match="this process has looked for GPUs before"):
        rc.train(load(*overrides, *on_cpu))
    monkeypatch.undo()

    reranker = rc.Reranker.from_pretrained(first.best, rc.RerankOptions(top_k=2))
    ranked = reranker.rerank("plum", ["apple", "plum", "mango"])
    assert sorted(passage.index for passage in ranked) == [0, 1, 2] and ranked[2].text == "mango"
    assert [passage.score for passage in ranked] == [3, 2, 1]
    assert all(passage.text == ["apple", "plum", "mango"][passage.index] for passage in ranked)
    assert ranked[2].log_probability is None and ranked[0].log_probability >= ranked[1].log_probability
    run = reranker.rerank_run({"q": ["a", "b"]}, {"q": "plum"}, {"a": "apple", "b": "plum"}, tmp_path / "out.trec")
    assert [ranked[i].index for i in range(2)] == [["a", "b"].index(docid) for docid in run[0].docids]


def test_train_is_callable_after_its_module_was_imported():
    """`rankllm_composer.train` is also the script that launchers start."""
    code = "import rankllm_composer.train, rankllm_composer as rc; print(callable(rc.train), rc.train.main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True 2"


def test_looking_up_a_name_keeps_the_signal_handlers():
    """Composer replaces them when it is imported."""
    code = (
        "import signal; before = signal.getsignal(signal.SIGTERM)\n"
        "import rankllm_composer as rc; rc.train; print(signal.getsignal(signal.SIGTERM) == before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
