"""Ranks note what they do; one that waited in vain says for whom."""

from __future__ import annotations

import time

import pytest
from composer.core import Event
from composer.loggers import Logger

from rankllm_composer.training import stopping as whereabouts
from rankllm_composer.training.stopping import DOING, Whereabouts, read_notes, who_is_behind


class Timestamp:
    """What a note needs of Composer's state."""

    def __init__(self, batch: int) -> None:
        self.timestamp = self
        self.batch = self
        self.value = batch


@pytest.fixture(autouse=True)
def nobody_is_late(monkeypatch):
    monkeypatch.setattr(whereabouts, "NOTICE_SECONDS", 0.0)


def notes(folder, monkeypatch, steps: list[int]) -> list[Whereabouts]:
    """One callback a rank, each gone so many steps of a batch."""
    callbacks = []
    for rank, num_steps in enumerate(steps):
        monkeypatch.setattr(whereabouts.dist, "get_global_rank", lambda rank=rank: rank)
        callback = Whereabouts(folder)
        for event in list(DOING)[:num_steps]:
            callback.run_event(event, Timestamp(2), Logger(Timestamp(2)))
        callbacks.append(callback)
    return callbacks


def test_a_note_tells_the_batch_and_the_step(tmp_path, monkeypatch):
    (callback,) = notes(tmp_path, monkeypatch, [2])
    note = read_notes(tmp_path, 1)[0]
    assert (note.num_steps, note.batch, note.doing) == (1, 3, "forward pass")
    assert abs(note.since - time.time()) < 60
    callback.run_event(Event.BATCH_END, Timestamp(3), Logger(Timestamp(3)))  # a shorter text leaves nothing of a longer
    assert read_notes(tmp_path, 1)[0].batch == 3
    callback.close(Timestamp(3), Logger(Timestamp(3)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("steps", "asks", "behind"),
    [
        ([3, 2], 0, "rank 1 (batch 3: forward pass, for 0 s)"),
        ([2, 2], 0, "rank 1 (batch 3: forward pass, for 0 s)"),  # this one noticed, the other one does not move
        ([3, 2, 3, 2], 0, "rank 1 (batch 3: forward pass, for 0 s) and rank 3 (batch 3: forward pass, for 0 s)"),
        ([1, 2], 0, ""),  # this rank itself is the one behind
        ([3], 0, ""),
        ([], 0, ""),
    ],
)
def test_who_is_behind(tmp_path, monkeypatch, steps, asks, behind):
    notes(tmp_path, monkeypatch, steps)
    assert who_is_behind(tmp_path, asks, len(steps)) == behind


def test_one_that_noticed_too_is_not_blamed(tmp_path, monkeypatch):
    notes(tmp_path, monkeypatch, [2, 2, 2])
    assert who_is_behind(tmp_path, 0, 3).count("rank") == 2
    assert who_is_behind(tmp_path, 1, 3).startswith("rank 2 ")


def test_damaged_notes_are_left_out(tmp_path, monkeypatch):
    notes(tmp_path, monkeypatch, [2, 2])
    (tmp_path / "rank_1").write_bytes(b"\x00" * 20)
    assert list(read_notes(tmp_path, 2)) == [0]
