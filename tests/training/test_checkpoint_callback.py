"""Checkpoints of a small Trainer: written, resumed from, refused."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from composer.core import Callback
from support.resumable_runs import Draws, Payload, names, poison, train
from support.s3_server import s3_server
from support.tiny_training import new_hf_model, new_trainer

from rankllm_composer.checkpoints.folder import MANIFEST
from rankllm_composer.errors import CheckpointError, StoreError
from rankllm_composer.training import checkpoint_callback
from rankllm_composer.training.checkpoint_callback import CheckpointFolder
from rankllm_composer.training.dry_run import DryRun, checkpoint_bytes, most_added, times_left


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    draws, weights, _ = train(tmp_path / "whole", "2ep", interval="2ep")
    assert names(tmp_path / "whole") == ["ep2-ba8"]
    first, _, _ = train(tmp_path / "parts", "3ba")
    second, _, resumed = train(tmp_path / "parts", "1ep")
    assert resumed.resumed_from == tmp_path / "parts" / "ep0-ba3"
    assert names(tmp_path / "parts") == ["ep0-ba2", "ep0-ba3", "ep1-ba4"]  # the three newest of both runs
    third, again, _ = train(tmp_path / "parts", "2ep")
    assert first + second + third == draws
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert not (tmp_path / "parts" / ".partial" / "ep2-ba8").exists()


def test_only_adapters_are_saved_and_resumed(tmp_path):
    """Adapters need less than half the space of all weights; a checkpoint without one of them is rejected."""
    train(tmp_path / "all", "1ba")
    _, weights, _ = train(tmp_path / "whole", "1ep", lora=True)
    train(tmp_path / "parts", "2ba", lora=True)
    size, size_of_all = ((tmp_path / name / "ep0-ba1" / "rank0.pt").stat().st_size for name in ("parts", "all"))
    assert size < size_of_all / 2
    _, again, resumed = train(tmp_path / "parts", "1ep", lora=True)
    assert resumed.resumed_from == tmp_path / "parts" / "ep0-ba2"
    assert len(weights) == 2 * 2 * 2 and all(torch.equal(again[name], weights[name]) for name in weights)
    gone = next(iter(weights))
    poison(tmp_path / "whole" / "ep1-ba4", lambda state: state["model"].pop(gone))
    with pytest.raises(CheckpointError, match=f"lacks the weights {gone}. Use an earlier checkpoint"):
        train(tmp_path / "whole", "2ep", lora=True)


def test_an_incomplete_checkpoint_is_skipped(tmp_path):
    train(tmp_path, "3ba")
    (tmp_path / "ep0-ba3" / MANIFEST).unlink()
    _, _, resumed = train(tmp_path, "1ep")
    assert resumed.resumed_from == tmp_path / "ep0-ba2"
    assert names(tmp_path) == ["ep0-ba2", "ep0-ba3", "ep1-ba4"]


def test_refused_checkpoints(tmp_path):
    train(tmp_path, "2ba", keep=1)
    with pytest.raises(CheckpointError, match=r"run\.autoresume is false, but .*ep0-ba2 is a checkpoint of this"):
        train(tmp_path, "1ep", resume=False)
    with pytest.raises(CheckpointError, match=r"ep0-ba2 is a checkpoint of another model \(model\.model\.layers"):
        train(tmp_path, "1ep", family="qwen2")
    damaged = tmp_path / "ep0-ba2" / "rank0.pt"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    with pytest.raises(CheckpointError, match=r"ep0-ba2 is damaged"):
        train(tmp_path, "1ep")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    trap = tmp_path / "was run"
    train(tmp_path / "a", "2ba", keep=1)
    poison(tmp_path / "a" / "ep0-ba2", lambda state: state.update(callbacks={"x": Payload(trap)}))
    with pytest.raises(CheckpointError, match=r"ep0-ba2 contains a pickle that references posix\.mkdir; expected data"):
        train(tmp_path / "a", "1ep")
    # Composer evaluates the text of an algorithm that a checkpoint says it needs.
    train(tmp_path / "b", "2ba", keep=1)
    text = f"BlurPool if __import__('os').mkdir({str(trap)!r}) else None"
    poison(tmp_path / "b" / "ep0-ba2", lambda state: state.update(algorithms=[("BlurPool", {"repr": text})]))
    train(tmp_path / "b", "1ep")
    assert not trap.exists()


def test_a_dry_run_writes_and_reads_a_checkpoint_without_weights(tmp_path):
    """Nothing of it is left, and the training that follows is the same."""
    draws, weights, _ = train(tmp_path / "plain", "1ep")
    seen, checkpoints = Draws(), CheckpointFolder(tmp_path / "tried", interval="1ba")
    trainer = new_trainer(new_hf_model(), "1ep", callbacks=[seen, checkpoints, DryRun(checkpoints)])
    before = checkpoint_bytes(trainer.state)
    trainer.fit()
    assert seen.seen == draws
    assert all(torch.equal(weight, weights[name]) for name, weight in trainer.state.model.model.state_dict().items())
    written = (tmp_path / "tried" / "ep1-ba4" / "rank0.pt").stat().st_size
    assert before < written < before + 100_000  # small parts besides weights and averages
    assert not list((tmp_path / "tried" / ".partial").iterdir())


@pytest.mark.parametrize(
    "interval, duration, before", [("1ba", "1ep", 0), ("3ba", "6ba", 2), ("1ep", "9ba", 4), ("0.5dur", "2ep", 0)]
)
def test_the_dry_run_counts_the_checkpoints_that_will_be_written(tmp_path, interval, duration, before):
    if before:
        train(tmp_path, f"{before}ba", interval=interval, keep=-1)
    counts = []

    class Counts(Callback):
        def fit_start(self, state, logger):
            counts.append(times_left(state, interval))

    checkpoints = CheckpointFolder(tmp_path, interval=interval, keep=-1)
    num_before = len(names(tmp_path))
    new_trainer(new_hf_model(), duration, callbacks=[checkpoints, Counts()]).fit()
    assert counts == [len(names(tmp_path)) - num_before]


def test_as_many_are_added_at_once_as_are_kept_and_written():
    assert [most_added(5, there, 3, 1) for there in (0, 2, 4, 9)] == [4, 2, 0, 0]
    assert most_added(2, 0, 3, 1) == 2  # of a short run
    assert most_added(5, 2, -1, 1) == 5  # all are kept


class Unreadable(Callback):
    """A callback whose state a checkpoint can hold, but not give back as data."""

    def state_dict(self):
        return {"lock": Path("/somewhere")}


def test_a_dry_run_finds_a_state_that_cannot_be_read_back(tmp_path):
    checkpoints = CheckpointFolder(tmp_path, interval="1ep")
    trainer = new_trainer(new_hf_model(), "1ep", callbacks=[Unreadable(), checkpoints, DryRun(checkpoints)])
    with pytest.raises(CheckpointError, match=r"contains a pickle that references pathlib\.PosixPath"):
        trainer.fit()
    assert trainer.state.timestamp.batch.value == 0


def test_what_was_left_after_the_last_checkpoint_is_done_at_the_next_start(tmp_path):
    train(tmp_path, "1ep", keep=-1)
    assert names(tmp_path) == ["ep0-ba1", "ep0-ba2", "ep0-ba3", "ep1-ba4"]
    train(tmp_path, "1ep", keep=2)  # nothing left to train
    assert names(tmp_path) == ["ep0-ba3", "ep1-ba4"]


def test_machines_without_a_shared_disk_are_an_error(tmp_path, monkeypatch):
    elsewhere = {"__9_0.distcp": (5, "ab")}
    monkeypatch.setattr(checkpoint_callback.dist, "all_gather_object", lambda own: [own, elsewhere])
    with pytest.raises(CheckpointError, match=r"ep0-ba1: __9_0\.distcp of another rank is missing.* share"):
        train(tmp_path, "2ba")
    assert names(tmp_path) == []


# --- copies in an object store ----------------------------------------------------------------------------------------


@pytest.fixture()
def server():
    with s3_server() as running:
        for bucket in ("copies", "newest", "refused"):  # servers in one process share their content
            running.client().create_bucket(Bucket=bucket)
        yield running


def copies(server, bucket: str) -> set[str]:
    return {key.split("/")[1] for key in server.keys(bucket) if key.endswith(MANIFEST)}


def test_copies_in_an_object_store(tmp_path, server):
    draws, _, _ = train(tmp_path / "whole", "2ep", interval="2ep")
    refusals = iter([500, 503, 503])
    server.on_put = lambda key: next(refusals, None)
    first, _, _ = train(tmp_path / "a", "3ba", keep=2, url="s3://copies/run")
    assert next(refusals, "used") == "used"
    assert copies(server, "copies") == {"ep0-ba2", "ep0-ba3"}  # the two newest, as on disk
    order = [key for key in server.puts if key.startswith("run/ep0-ba3/")]
    assert order == ["run/ep0-ba3/rank0.pt", f"run/ep0-ba3/{MANIFEST}"]
    server.client().delete_object(Bucket="copies", Key="run/ep0-ba3/rank0.pt")  # lost in the store
    second, _, resumed = train(tmp_path / "another machine", "2ep", keep=2, url="s3://copies/run")
    assert resumed.resumed_from == tmp_path / "another machine" / "ep0-ba2"
    # Python's random state is equal too, although the store's client draws random pauses meanwhile.
    assert first[:2] + second == draws and len(second) == 6
    assert copies(server, "copies") == {"ep1-ba7", "ep2-ba8"}


class Reached(Callback):
    """Set an event when a given batch begins."""

    def __init__(self, batch: int) -> None:
        self.batch, self.event = batch, threading.Event()

    def batch_start(self, state, logger):
        if state.timestamp.batch.value == self.batch:
            self.event.set()


def test_training_continues_during_an_upload(tmp_path, server):
    """The store delays the first file by two batches; a run that waited for the upload would hang."""
    reached, answers = Reached(4), []
    server.on_put = lambda key: answers.append(reached.event.wait(120))
    checkpoints = CheckpointFolder(tmp_path, interval="3ba", url="s3://copies/patient")
    trainer = new_trainer(new_hf_model(), "2ep", callbacks=[reached, checkpoints])
    trainer.fit()
    trainer.close()
    assert answers and all(answers)
    assert {"ep0-ba3", "ep1-ba6", "ep2-ba8"} <= copies(server, "copies")


def test_names_with_non_ascii_characters(tmp_path, server):
    place = "läufe/検索 1"
    train(tmp_path / place, "2ba", keep=2, url=f"s3://copies/{place}")
    assert {key for key in server.keys("copies") if key.endswith(MANIFEST)} >= {f"{place}/ep0-ba2/{MANIFEST}"}
    _, _, resumed = train(tmp_path / "x", "3ba", keep=2, url=f"s3://copies/{place}")
    assert resumed.resumed_from == tmp_path / "x" / "ep0-ba2"
    kept = [key for key in server.keys("copies") if key.startswith(place) and key.endswith(MANIFEST)]
    assert kept == [f"{place}/ep0-ba2/{MANIFEST}", f"{place}/ep0-ba3/{MANIFEST}"]


def test_the_newest_is_chosen_by_batch_not_by_file_times(tmp_path):
    train(tmp_path, "3ba")
    for age, name in enumerate(("ep0-ba3", "ep0-ba2", "ep0-ba1")):  # the newest looks a year older than the oldest
        for path in (tmp_path / name, *(tmp_path / name).iterdir()):
            os.utime(path, (1e9 + 2e7 * age,) * 2)
    _, _, resumed = train(tmp_path, "1ep")
    assert resumed.resumed_from == tmp_path / "ep0-ba3"


def test_the_newest_of_disk_and_store_is_used(tmp_path, server):
    train(tmp_path / "a", "2ba", url="s3://newest/run")
    train(tmp_path / "a", "3ba")
    _, _, resumed = train(tmp_path / "a", "1ep", url="s3://newest/run")
    assert resumed.resumed_from == tmp_path / "a" / "ep0-ba3"


def test_a_store_that_refuses_uploads(tmp_path, server):
    server.on_put = lambda key: 403
    with pytest.raises(StoreError, match=r"checkpoint\.folder: s3://refused/run: ep0-ba1/rank0\.pt cannot"):
        train(tmp_path, "2ba", url="s3://refused/run")
    assert "ep0-ba1" in names(tmp_path) and copies(server, "refused") == set()  # local checkpoints are intact
    server.on_put = lambda key: None
    train(tmp_path, "1ep", url="s3://refused/run")
    assert "ep1-ba4" in copies(server, "refused")
    # A finished run completes copies that are missing, partial or of another content, and leaves whole ones alone.
    kept = ["ep0-ba2", "ep0-ba3", "ep1-ba4"]
    server.client().delete_object(Bucket="refused", Key="run/ep1-ba4/rank0.pt")
    server.client().delete_object(Bucket="refused", Key=f"run/ep0-ba3/{MANIFEST}")
    server.puts.clear()
    train(tmp_path, "1ep", url="s3://refused/run")
    assert copies(server, "refused") == set(kept)
    assert {key.split("/")[1] for key in server.puts if key.count("/") == 2} == {"ep0-ba3", "ep1-ba4"}
    _, _, resumed = train(tmp_path / "another machine", "1ep", url="s3://refused/run")
    assert resumed.resumed_from == tmp_path / "another machine" / "ep1-ba4"
