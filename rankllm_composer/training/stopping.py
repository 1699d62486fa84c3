"""One rank fails, all ranks end: within seconds, with one readable error, leaving nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist

from rankllm_composer.redaction import redact

if TYPE_CHECKING:
    from composer.core import State
    from composer.loggers import Logger

POLL_SECONDS = 0.5


# How long a rank may take to see by itself that another one is gone, and to end once it has failed.
GRACE_SECONDS = 5.0


GO_ON = "nothing saved is lost: start again with the same command to go on from the last checkpoint"


class Preempted(Exception):
    """The run was asked to stop, and has: a checkpoint of where every rank stands, or nothing to save."""


class Peer(NamedTuple):
    """Another rank of this run on this machine."""

    rank: int
    process: int
    started: float

    def is_alive(self) -> bool:
        import psutil

        try:
            process = psutil.Process(self.process)
            return process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class PeerWatch:
    """Ends this rank when another one on its machine has died, also where a collective would wait for it for ever.

    A rank that sees the loss by itself, as an error of a collective, ends as its program says; one that does not is
    ended after `GRACE_SECONDS`.

    Args:
        end: ends the process with an exit code, at once.
    Attributes:
        who_is_behind: asked when this rank's waiting for others timed out: whom it waited for, or "".
    """

    def __init__(self, end: Callable[[int], object] = os._exit) -> None:
        self.rank = 0
        self.peers: list[Peer] = []
        self.who_is_behind: Callable[[], str] = str
        self._end = end
        self._stopped = threading.Event()

    def start(self) -> None:
        """Watch the other ranks on this machine. A collective."""
        import psutil
        from composer.utils import dist

        process = psutil.Process()
        self.rank, machine = dist.get_global_rank(), socket.gethostname()
        everyone = dist.all_gather_object((machine, Peer(self.rank, process.pid, process.create_time())))
        self.watch([peer for other, peer in everyone if other == machine and peer.rank != self.rank])

    def watch(self, peers: list[Peer]) -> None:
        """Watch these."""
        self.peers = peers
        if peers:
            threading.Thread(target=self._look, name="peer watch", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer: from here on ranks end one by one."""
        self._stopped.set()

    def lost(self, wait_seconds: float = 0.0) -> list[Peer]:
        """Peers that have died; waits for one."""
        deadline = time.monotonic() + wait_seconds
        while not (gone := [peer for peer in self.peers if not peer.is_alive()]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return gone

    def exit_code(self, failure: BaseException) -> int:
        """Say once, on the right rank, what ended this one; it then ends within `GRACE_SECONDS`.

        An error that all ranks have is rank 0's to tell; what follows from the death of another is told as that.

        Returns:
            130 for an interrupt, 2 for what a user can correct, 1 for anything else.
        """
        self.stop()
        if self.peers:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, to those that are left: heard already
        code = 130 if isinstance(failure, KeyboardInterrupt) else 2 if isinstance(failure, ValueError) else 1
        patience = GRACE_SECONDS if self.rank else GRACE_SECONDS / 4  # rank 0 speaks first, and is then gone
        gone = self.lost(patience) if code == 1 or (code == 2 and self.rank) else []
        if code == 130:
            if self.rank == 0:
                say(f"error: interrupted; {GO_ON}")
        elif any(peer.rank == 0 for peer in gone):
            say(f"rank {self.rank}: ends with rank 0")
        elif code == 1 and gone:
            say(loss_of_peers(self.rank, gone))
        elif code == 2:
            say(f"error: rank {self.rank}: {failure}" if self.rank else f"error: {failure}")
        else:
            say("".join(traceback.format_exception(failure)).rstrip())
            behind = self.who_is_behind() if "timed out" in str(failure).lower() else ""
            stalled = f"; it waited for {behind}" if behind else ""
            say(f"error: rank {self.rank}: {type(failure).__name__}: {failure}{stalled}; {GO_ON}")
        if self.peers:
            threading.Thread(target=self._end_later, args=(code,), name="end", daemon=True).start()
        return code

    def exit_as_asked(self, request: Preempted) -> int:
        """End because somebody asked for it, within `GRACE_SECONDS`; rank 0 says so. Returns the exit code 0."""
        self.stop()
        if self.rank == 0:
            say(str(request))
        if self.peers:
            threading.Thread(target=self._end_later, args=(0,), name="end", daemon=True).start()
        return 0

    def _end_later(self, code: int) -> None:
        time.sleep(GRACE_SECONDS)
        self._end(code)

    def _look(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            gone = self.lost()
            if gone and not self._stopped.wait(GRACE_SECONDS):
                say(loss_of_peers(self.rank, gone))
                self._end(1)
                return


def loss_of_peers(rank: int, gone: list[Peer]) -> str:
    """What a rank says that ends because others did."""
    who = " and ".join(f"rank {peer.rank} (process {peer.process})" for peer in gone)
    return (
        f"error: rank {rank}: {who} ended before the run did; if it said why, that is printed here too; if not, it was "
        f"killed, perhaps for want of memory; {GO_ON}"
    )


def say(text: str) -> None:
    """Print to standard error at once, without secrets: errors of a store's client may hold a signed URL."""
    print(redact(text), file=sys.stderr, flush=True)


class Preemption(Callback):
    """Stops all ranks at the next batch boundary once any of them got SIGTERM, or lost the launcher that started it.

    Stands behind the callbacks that write. At the last batch of an epoch the stop waits for what the end of the epoch
    does.

    Args:
        save: writes a checkpoint of a state, where there is none; a collective.
        ends_epoch: whether the batch just trained is the last of its epoch.
    Raises:
        Preempted: on every rank, after the checkpoint.
    """

    def __init__(self, save: Callable[[State], None], ends_epoch: Callable[[State], bool]) -> None:
        self.save = save
        self.ends_epoch = ends_epoch
        self._launcher = os.getppid()
        self._is_asked = self._is_agreed = False
        self._handler_before: Any = signal.SIG_DFL

    def fit_start(self, state: State, logger: Logger) -> None:
        del state, logger
        self._handler_before = signal.signal(signal.SIGTERM, self._ask)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        del logger
        asked = torch.tensor([self._is_asked or os.getppid() != self._launcher], dtype=torch.int32)
        asked = state.device.tensor_to_device(asked)
        dist.all_reduce(asked, reduce_operation="MAX")
        self._is_agreed = bool(asked.item())
        if self._is_agreed and not self.ends_epoch(state):
            self._stop(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        del logger
        if self._is_agreed:
            self._stop(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        del state, logger
        signal.signal(signal.SIGTERM, self._handler_before)

    def _ask(self, number: int, frame: object) -> None:
        del number, frame
        self._is_asked = True

    def _stop(self, state: State) -> None:
        self.save(state)
        raise Preempted(
            f"asked to stop (SIGTERM, or the launcher is gone): stopped after batch {state.timestamp.batch.value} "
            "with a checkpoint of it; start again with the same command to go on from there"
        )


def stop_where_nothing_is_lost(number: int, frame: object) -> None:
    """Answer to SIGTERM before and after training.

    Raises:
        Preempted: at once.
    """
    del number, frame
    raise Preempted(
        "asked to stop (SIGTERM) where there is nothing to save; start again with the same command to go on from there"
    )


def ignore_sigterm(worker: int) -> None:
    """What a loader worker does first: a signal to the whole process group is the trainer's to answer."""
    del worker
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


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
