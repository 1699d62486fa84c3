"""Per-rank status notes, so that a timeout can name the straggler."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist

from rankllm_composer.distributed import note_progress

STATUS_FOLDER = ".ranks"
"""Folder of the notes, in the folder of the run."""

ACTIVITIES = {
    Event.BEFORE_DATALOADER: "reading the batch",
    Event.BEFORE_FORWARD: "forward pass",
    Event.BEFORE_BACKWARD: "backward pass",
    Event.AFTER_TRAIN_BATCH: "optimizer step",
    Event.BATCH_END: "evaluation, checkpoint or export after the batch",
    Event.EPOCH_END: "evaluation, checkpoint or export after the epoch",
}
MAX_SHOWN = 8
"""Ranks that a message names."""

NOTICE_SECONDS = 1.0
"""How far apart the timeouts of ranks that wait for the same one may be."""


class StatusNote(NamedTuple):
    """What a rank is doing."""

    num_steps: int  # of the run, finished by the rank
    batch: int  # 1 = the first
    activity: str  # a value of `ACTIVITIES`
    since: float  # Unix time


class StatusNotes(Callback):
    """Write to a small file in a folder that all ranks share, at each step of a batch, what this rank is doing."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = _note_path(folder, dist.get_global_rank())
        self._file = self._path.open("w+b", buffering=0)
        self._num_steps = 0

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        activity = ACTIVITIES.get(event)
        if activity is not None:
            batch = state.timestamp.batch.value + (event not in (Event.BATCH_END, Event.EPOCH_END))
            with suppress(OSError):  # a full disk is reported by whatever must be written
                self._file.seek(0)
                self._file.write(f"{self._num_steps}\t{batch}\t{activity}\t{time.time()}".ljust(120).encode())
            self._num_steps += 1
            note_progress()
        super().run_event(event, state, logger)

    def close(self, state: State, logger: Logger) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


def read_notes(folder: Path, num_ranks: int) -> dict[int, StatusNote]:
    """Read the notes of the ranks of a run, by rank; a rank without a readable note is left out."""
    notes = {}
    for rank in range(num_ranks):
        try:
            steps, batch, activity, since = _note_path(folder, rank).read_text().strip().split("\t")
            notes[rank] = StatusNote(int(steps), int(batch), activity, float(since))
        except (OSError, ValueError):
            continue
    return notes


def find_stragglers(folder: Path, rank: int, num_ranks: int) -> str:
    """Name the ranks that this one waited for, as "rank 1 (batch 3: forward pass, for 62 s)"; "" if there are none.

    Stragglers have finished the fewest steps, at most as many as this rank, and have not timed out themselves: a rank
    that times out removes its note here.
    """
    own_note = read_notes(folder, num_ranks).get(rank)
    _note_path(folder, rank).unlink(missing_ok=True)
    time.sleep(NOTICE_SECONDS)
    notes = read_notes(folder, num_ranks)
    if own_note is None or not notes:
        return ""
    fewest = min(note.num_steps for note in notes.values())
    return _described({other: note for other, note in notes.items() if note.num_steps == fewest <= own_note.num_steps})


def find_hindmost(folder: Path, num_ranks: int) -> str:
    """Name the ranks that have finished the fewest steps, in the same words; "" before the first batch."""
    notes = read_notes(folder, num_ranks)
    fewest = min((note.num_steps for note in notes.values()), default=0)
    return _described({rank: note for rank, note in notes.items() if note.num_steps == fewest})


def _described(notes: dict[int, StatusNote]) -> str:
    now = time.time()
    shown = [
        f"rank {rank} (batch {note.batch}: {note.activity}, for {max(0.0, now - note.since):.0f} s)"
        for rank, note in list(notes.items())[:MAX_SHOWN]
    ]
    more = [f"{len(notes) - MAX_SHOWN} more"] if len(notes) > MAX_SHOWN else []
    return " and ".join(shown + more)


def _note_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}"
