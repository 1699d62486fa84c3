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
from typing import NamedTuple

from rankllm_composer.redaction import redact

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
