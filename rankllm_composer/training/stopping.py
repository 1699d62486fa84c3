"""Stop all ranks together: within seconds after a failure, or with a checkpoint on request."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import psutil
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from rankllm_composer.screen import report
from rankllm_composer.training.progress import ends_epoch

POLL_SECONDS = 0.5
GRACE_SECONDS = 5.0
"""How long a rank may take to notice by itself that another one is gone, and to exit after it failed."""

RESUME = "checkpoints are intact; rerun the same command to resume"


class Preempted(Exception):
    """The run stopped on request, after it wrote a checkpoint if there was anything to save."""


class Peer(NamedTuple):
    """Another rank of this run on this machine."""

    rank: int
    process: int
    started: float

    def is_alive(self) -> bool:
        try:
            process = psutil.Process(self.process)
            return process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class PeerWatch:
    """End this rank when another one on its machine has died, even if a collective would wait forever.

    A rank that notices the loss by itself, as an error of a collective, exits normally; any other is ended after
    `GRACE_SECONDS`.

    Args:
        end: ends the process with an exit code, immediately.
    Attributes:
        find_stragglers: called after a collective timed out; returns which ranks it waited for, or "".
    """

    def __init__(self, end: Callable[[int], object] = os._exit) -> None:
        self.rank = 0
        self.peers: list[Peer] = []
        self.find_stragglers: Callable[[], str] = str
        self._end = end
        self._stopped = threading.Event()

    def start(self) -> None:
        """Watch the other ranks on this machine. A collective."""
        process = psutil.Process()
        self.rank, machine = dist.get_global_rank(), socket.gethostname()
        everyone = dist.all_gather_object((machine, Peer(self.rank, process.pid, process.create_time())))
        self.watch([peer for other, peer in everyone if other == machine and peer.rank != self.rank])

    def watch(self, peers: list[Peer]) -> None:
        self.peers = peers
        if peers:
            threading.Thread(target=self._look, name="peer watch", daemon=True).start()

    def stop(self) -> None:
        """Stop watching: from here on, ranks end one by one."""
        self._stopped.set()

    def lost(self, wait_seconds: float = 0.0) -> list[Peer]:
        """Return the peers that have died; wait up to `wait_seconds` for the first."""
        deadline = time.monotonic() + wait_seconds
        while not (gone := [peer for peer in self.peers if not peer.is_alive()]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return gone

    def exit_code(self, failure: BaseException) -> int:
        """Report a failure once, on the right rank, and make sure that this process ends within `GRACE_SECONDS`.

        Rank 0 reports an error that all ranks have. A failure caused by the death of another rank is reported as such.

        Returns:
            Exit code: 130 for an interrupt, 2 for an error that a user can correct, 1 for anything else.
        """
        self.stop()
        if self.peers:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher sends it to the remaining ranks
        code = 130 if isinstance(failure, KeyboardInterrupt) else 2 if isinstance(failure, ValueError) else 1
        patience = GRACE_SECONDS if self.rank else GRACE_SECONDS / 4  # rank 0 reports first, then exits
        gone = self.lost(patience) if code == 1 or (code == 2 and self.rank) else []
        if code == 130:
            if self.rank == 0:
                report(f"error: interrupted; {RESUME}")
        elif any(peer.rank == 0 for peer in gone):
            report(f"rank {self.rank}: stopped because rank 0 failed")
        elif code == 1 and gone:
            report(lost_ranks_message(self.rank, gone))
        elif code == 2:
            report(f"error: rank {self.rank}: {failure}" if self.rank else f"error: {failure}")
        else:
            report("".join(traceback.format_exception(failure)).rstrip())
            stragglers = self.find_stragglers() if "timed out" in str(failure).lower() else ""
            waited = f"; it waited for {stragglers}" if stragglers else ""
            report(f"error: rank {self.rank}: {type(failure).__name__}: {failure}{waited}; {RESUME}")
        return self._end_soon(code)

    def exit_preempted(self, request: Preempted) -> int:
        """Report a stop on request, on rank 0, and end this process within `GRACE_SECONDS`. Returns exit code 0."""
        self.stop()
        if self.rank == 0:
            report(str(request))
        return self._end_soon(0)

    def _end_soon(self, code: int) -> int:
        """End this process after `GRACE_SECONDS`, if it has peers and still runs. Returns the exit code."""

        def end_later() -> None:
            time.sleep(GRACE_SECONDS)
            self._end(code)

        if self.peers:
            threading.Thread(target=end_later, name="end", daemon=True).start()
        return code

    def _look(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            gone = self.lost()
            if gone and not self._stopped.wait(GRACE_SECONDS):
                report(lost_ranks_message(self.rank, gone))
                self._end(1)
                return


def lost_ranks_message(rank: int, gone: list[Peer]) -> str:
    """Explain that a rank stops because others died."""
    ranks = " and ".join(f"rank {peer.rank} (process {peer.process})" for peer in gone)
    return (
        f"error: rank {rank}: {ranks} died. Its own error, if any, is printed above; otherwise it was killed, possibly "
        f"by the OOM killer; {RESUME}"
    )


class Preemption(Callback):
    """Stop all ranks at the next batch boundary after any of them got SIGTERM or lost its launcher.

    Place it after the callbacks that write files. After the last batch of an epoch it stops once the callbacks of the
    end of the epoch have run.

    Args:
        save: collective that writes a checkpoint of a state unless there is one.
    Raises:
        Preempted: on every rank, after the checkpoint.
    """

    def __init__(self, save: Callable[[State], None]) -> None:
        self.save = save
        self._launcher = os.getppid()
        self._is_requested = self._is_agreed = False
        self._handler_before: Any = signal.SIG_DFL

    def fit_start(self, state: State, logger: Logger) -> None:
        self._handler_before = signal.signal(signal.SIGTERM, self._request)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        is_requested = self._is_requested or os.getppid() != self._launcher
        requested = state.device.tensor_to_device(torch.tensor([is_requested], dtype=torch.int32))
        dist.all_reduce(requested, reduce_operation="MAX")
        self._is_agreed = bool(requested.item())
        if self._is_agreed and not ends_epoch(state):
            self._stop(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._is_agreed:
            self._stop(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        signal.signal(signal.SIGTERM, self._handler_before)

    def _request(self, number: int, frame: object) -> None:
        self._is_requested = True

    def _stop(self, state: State) -> None:
        self.save(state)
        raise Preempted(
            f"stop requested (SIGTERM, or the launcher is gone): wrote a checkpoint after batch "
            f"{state.timestamp.batch.value}; rerun the same command to resume"
        )


def raise_preempted(number: int, frame: object) -> None:
    """Handle SIGTERM before and after training, when there is nothing to save."""
    del number, frame
    raise Preempted("stop requested (SIGTERM) outside training, nothing to save; rerun the same command to resume")


def ignore_sigterm(worker: int) -> None:
    """Initialize a loader worker: only the trainer handles a signal to the process group."""
    del worker
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
