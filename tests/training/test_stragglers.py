"""Status notes of ranks, and the stragglers found from them."""

from __future__ import annotations

import time

import pytest
from composer.core import Event
from composer.loggers import Logger

from rankllm_composer.training import stragglers
from rankllm_composer.training.stragglers import ACTIVITIES, StatusNotes, find_hindmost, find_stragglers, read_notes


class Timestamp:
    """The part of Composer's state that a note reads."""

    def __init__(self, batch: int) -> None:
        self.timestamp = self
        self.batch = self
        self.value = batch


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    monkeypatch.setattr(stragglers, "NOTICE_SECONDS", 0.0)


def notes(folder, monkeypatch, steps: list[int]) -> list[StatusNotes]:
    """One callback per rank, after the given number of steps of a batch."""
    callbacks = []
    for rank, num_steps in enumerate(steps):
        monkeypatch.setattr(stragglers.dist, "get_global_rank", lambda rank=rank: rank)
        callback = StatusNotes(folder)
        for event in list(ACTIVITIES)[:num_steps]:
            callback.run_event(event, Timestamp(2), Logger(Timestamp(2)))
        callbacks.append(callback)
    return callbacks


def test_a_note_holds_the_batch_and_the_activity(tmp_path, monkeypatch):
    (callback,) = notes(tmp_path, monkeypatch, [2])
    note = read_notes(tmp_path, 1)[0]
    assert (note.num_steps, note.batch, note.activity) == (1, 3, "forward pass")
    assert abs(note.since - time.time()) < 60
    callback.run_event(Event.BATCH_END, Timestamp(3), Logger(Timestamp(3)))  # overwrites longer text
    assert read_notes(tmp_path, 1)[0].batch == 3
    callback.close(Timestamp(3), Logger(Timestamp(3)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("steps", "rank", "expected"),
    [
        ([3, 2], 0, "rank 1 (batch 3: forward pass, for 0 s)"),
        ([2, 2], 0, "rank 1 (batch 3: forward pass, for 0 s)"),  # this rank timed out, the other one hangs
        ([3, 2, 3, 2], 0, "rank 1 (batch 3: forward pass, for 0 s) and rank 3 (batch 3: forward pass, for 0 s)"),
        ([1, 2], 0, ""),  # this rank is the straggler
        ([3], 0, ""),
        ([], 0, ""),
    ],
)
def test_stragglers_have_finished_the_fewest_steps(tmp_path, monkeypatch, steps, rank, expected):
    notes(tmp_path, monkeypatch, steps)
    assert find_stragglers(tmp_path, rank, len(steps)) == expected


def test_the_hindmost_are_named_without_a_trace(tmp_path, monkeypatch):
    assert find_hindmost(tmp_path, 2) == ""
    notes(tmp_path, monkeypatch, [3, 2, 2])
    expected = "rank 1 (batch 3: forward pass, for 0 s) and rank 2 (batch 3: forward pass, for 0 s)"
    assert find_hindmost(tmp_path, 3) == find_hindmost(tmp_path, 3) == expected
    notes(tmp_path / "many", monkeypatch, [1] * 10)
    assert find_hindmost(tmp_path / "many", 10).endswith("and 2 more")


def test_a_rank_that_timed_out_itself_is_not_named(tmp_path, monkeypatch):
    notes(tmp_path, monkeypatch, [2, 2, 2])
    assert find_stragglers(tmp_path, 0, 3).count("rank") == 2
    assert find_stragglers(tmp_path, 1, 3).startswith("rank 2 ")


def test_damaged_notes_are_ignored(tmp_path, monkeypatch):
    notes(tmp_path, monkeypatch, [2, 2])
    (tmp_path / "rank_1").write_bytes(b"\x00" * 20)
    assert list(read_notes(tmp_path, 2)) == [0]
