"""Killed runs resume exactly: losses, order, learning rate, random numbers and weights are equal bit for bit."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from support.killing import Run, checkpoint_content, comparable_metrics, differences, kill
from support.small_run import BATCHES_PER_EPOCH, RECIPE, small_run

from rankllm_composer.checkpoints.folder import complete_checkpoints
from rankllm_composer.prompts.relevance import tied_share
from rankllm_composer.shards.read import SplitRecords

LORA = "model.lora={rank: 4, dropout: 0.3, target_modules: [q_proj, v_proj]}"


@pytest.fixture(scope="module")
def overlay(tmp_path_factory, mistral_v3_folder) -> list[str]:
    """A run whose lists are mostly tied, so that each epoch's answers are drawn anew."""
    overlay = small_run(tmp_path_factory.mktemp("resume"), mistral_v3_folder, tied=True)
    (shards,) = (setting.partition("=")[2] for setting in overlay if setting.startswith("data.train.local="))
    assert sum(tied_share(record) > 0.3 for record in SplitRecords([(shards, None)])) == 20  # not in lists of two
    return overlay


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, overlay) -> Path:
    """An uninterrupted run under FSDP2 on two ranks."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = Run(RECIPE, overlay, folder)
    assert run.finish() == 0, run.output()
    return folder


def newest(folder: Path) -> Path:
    return complete_checkpoints(folder / "run" / "checkpoints")[-1][0]


def assert_equal_runs(one: Path, other: Path) -> None:
    assert comparable_metrics(one) == comparable_metrics(other)
    assert [line["batch"] for line in comparable_metrics(one)] == list(range(1, 13))
    assert newest(one).name == newest(other).name == "ep2-ba12"
    assert differences(checkpoint_content(newest(one)), checkpoint_content(newest(other))) == []


@pytest.mark.slow
def test_sharded_ranks_killed_during_an_epoch_and_a_checkpoint(tmp_path, overlay, uninterrupted):
    run = Run(RECIPE, overlay, tmp_path)
    run.wait_until(lambda: run.batches() >= 3)
    kill(run.ranks()[1:])
    assert run.finish() != 0
    assert "rank 1 (process" in run.output() and "rerun the same command to resume" in run.output()

    run = Run(RECIPE, overlay, tmp_path)
    run.wait_until(lambda: run.batches() >= 7 and run.is_saving())
    kill(run.ranks())
    assert run.finish() != 0

    run = Run(RECIPE, overlay, tmp_path)
    assert run.finish() == 0, run.output()
    assert_equal_runs(tmp_path, uninterrupted)

    run = Run(RECIPE, overlay, tmp_path)  # a finished run changes nothing
    assert run.finish() == 0, run.output()
    assert_equal_runs(tmp_path, uninterrupted)


@pytest.mark.slow
def test_ddp_ranks_with_dropout_preempted_and_without_launcher(tmp_path, overlay):
    overlay = [*overlay, "parallelism.fsdp=false", LORA]
    reference = Run(RECIPE, overlay, tmp_path / "uninterrupted")
    assert reference.finish() == 0, reference.output()

    run = Run(RECIPE, overlay, tmp_path / "broken")
    run.wait_until(lambda: run.batches() >= 3)
    kill(run.ranks(), signal.SIGTERM)
    assert run.finish() == 0, run.output()
    assert "stop requested" in run.output()
    stopped = comparable_metrics(run.folder)[-1]["batch"]
    assert stopped < 12 and newest(run.folder).name == name_of(stopped)  # although no checkpoint was due

    run = Run(RECIPE, overlay, tmp_path / "broken")
    run.wait_until(lambda: run.batches() > stopped)
    run.process.kill()
    run.finish()  # the ranks exit by themselves, after a checkpoint
    assert newest(run.folder).name == name_of(comparable_metrics(run.folder)[-1]["batch"])

    run = Run(RECIPE, overlay, tmp_path / "broken")
    assert run.finish() == 0, run.output()
    assert_equal_runs(run.folder, reference.folder)


def name_of(batch: int) -> str:
    return f"ep{batch // BATCHES_PER_EPOCH}-ba{batch}"


@pytest.mark.slow
@pytest.mark.parametrize("ranks, seen", [(1, 4), (2, 8)], ids=["two to one", "one to two"])
def test_resuming_on_another_number_of_ranks(tmp_path_factory, request, overlay, uninterrupted, ranks, seen):
    """Lists and learning rates are equal; losses differ only by the order of summation."""
    if ranks == 1:
        source = uninterrupted
    else:
        source = request.config.stash[ON_ONE_RANK]
    folder = tmp_path_factory.mktemp("elastic") / "run"
    shutil.copytree(source, folder)
    for path, manifest in complete_checkpoints(folder / "run" / "checkpoints"):
        if manifest.batch > seen:
            shutil.rmtree(path)
    run = Run(RECIPE, overlay, folder, ranks)
    assert run.finish() == 0, run.output()
    ours, theirs = comparable_metrics(folder), comparable_metrics(uninterrupted)
    for name in ("batch", "epoch", "samples", "tokens", "lr", "data/lists_trained"):
        assert [line[name] for line in ours] == [line[name] for line in theirs]
    for name in ("loss/train/total", "loss/train/ranking"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-3)
    manifests = {manifest.batch: manifest.num_ranks for _, manifest in complete_checkpoints(folder / "run/checkpoints")}
    assert manifests[seen] == 3 - ranks and manifests[12] == ranks
    request.config.stash[ON_ONE_RANK] = folder


ON_ONE_RANK: pytest.StashKey[Path] = pytest.StashKey()
