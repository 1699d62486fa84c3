"""What each rank is doing, so that those that wait for another in vain can say for which one, and where it is."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist

DOING = {
    Event.BEFORE_DATALOADER: "reading the batch",
    Event.BEFORE_FORWARD: "forward pass",
    Event.BEFORE_BACKWARD: "backward pass",
    Event.AFTER_TRAIN_BATCH: "update of the weights",
    Event.BATCH_END: "evaluation, checkpoint or export after the batch",
    Event.EPOCH_END: "evaluation, checkpoint or export after the epoch",
}
_NOTE_BYTES = 120
# How long ranks that wait for the same one may differ in seeing that they wait in vain.
NOTICE_SECONDS = 1.0


class Note(NamedTuple):
    """What a rank does: how many steps of the run it has gone before, the batch, the step, since when (Unix time)."""

    num_steps: int
    batch: int
    doing: str
    since: float


class Whereabouts(Callback):
    """Note in a small file, at each step of a batch, what this rank does.

    Args:
        folder: on a disk that all ranks share.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = _note_path(folder, dist.get_global_rank())
        self._file = self._path.open("w+b", buffering=0)
        self._num_steps = 0

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        doing = DOING.get(event)
        if doing is not None:
            batch = state.timestamp.batch.value + (event not in (Event.BATCH_END, Event.EPOCH_END))
            with suppress(OSError):  # a full disk is told by what has to be written
                self._file.seek(0)
                self._file.write(f"{self._num_steps}\t{batch}\t{doing}\t{time.time()}".ljust(_NOTE_BYTES).encode())
            self._num_steps += 1
        super().run_event(event, state, logger)

    def close(self, state: State, logger: Logger) -> None:
        del state, logger
        self._file.close()
        self._path.unlink(missing_ok=True)


def read_notes(folder: Path, num_ranks: int) -> dict[int, Note]:
    """The notes of the ranks of a run, by rank; ranks that have none are left out."""
    notes = {}
    for rank in range(num_ranks):
        try:
            steps, batch, doing, since = _note_path(folder, rank).read_text().strip().split("\t")
            notes[rank] = Note(int(steps), int(batch), doing, float(since))
        except (OSError, ValueError):
            continue
    return notes


def who_is_behind(folder: Path, rank: int, num_ranks: int) -> str:
    """Whom this rank waited for in vain, as "rank 1 (batch 3: forward pass, for 62 s)"; "" if nobody is behind.

    That is who has gone the fewest steps, and no more than this rank, and has not noticed that it waits in vain itself.
    A rank that asks counts as one that has noticed: its note goes.
    """
    own = read_notes(folder, num_ranks).get(rank)
    _note_path(folder, rank).unlink(missing_ok=True)
    time.sleep(NOTICE_SECONDS)
    notes = read_notes(folder, num_ranks)
    if own is None or not notes:
        return ""
    fewest = min(note.num_steps for note in notes.values())
    now = time.time()
    return " and ".join(
        f"rank {other} (batch {note.batch}: {note.doing}, for {now - note.since:.0f} s)"
        for other, note in notes.items()
        if note.num_steps == fewest <= own.num_steps
    )


def _note_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}"
