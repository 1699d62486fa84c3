"""Processes that belong together: the launcher of this one, those of a machine, and workers that end with their parent.

Imports no library at the top: it records the launcher before the slow imports of a rank.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import select
import signal
import socket
import threading
import uuid
from contextlib import suppress
from pathlib import Path

LAUNCHER_VARIABLE = "RANKLLM_COMPOSER_LAUNCHER"
"""Environment variable with the process id of our launcher."""

_PR_SET_PDEATHSIG = 1
_SET_BY_COMPOSER = {"LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "TORCH_NCCL_ASYNC_ERROR_HANDLING"}
# Recorded as early as possible: a launcher may be killed while its ranks are still importing.
_PARENT = os.getppid()
_HAS_LAUNCHER = "LOCAL_RANK" in os.environ


def start_of(process: int) -> float | None:
    """Return when a process started, in ticks since boot on Linux, whatever the clock does; None if it has ended."""
    if not Path("/proc/self/stat").exists():
        import psutil

        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(process)
            return None if found.status() == psutil.STATUS_ZOMBIE else float(found.create_time())
        return None
    try:
        fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else float(fields[19])


def machine() -> str:
    """Name the set of process ids that this process sees; containers of one host differ, and hosts of one name do."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def has_launcher() -> bool:
    """Whether a launcher such as `composer` or torchrun started this process."""
    return _HAS_LAUNCHER


def launcher_is_gone() -> bool:
    """Whether a launcher started this process and has ended since, or before it could be seen."""
    if not _HAS_LAUNCHER:
        return False
    if os.getppid() != _PARENT:
        return True
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is not None:
        return int(launcher) != _PARENT and start_of(int(launcher)) is None
    # Composer starts its ranks in its own process group. A rank whose parent is in another group, and that does not
    # lead a group itself, was adopted by another process.
    return (
        os.environ.keys() >= _SET_BY_COMPOSER
        and "TORCHELASTIC_RUN_ID" not in os.environ
        and os.getpgrp() != os.getpid()
        and os.getpgid(_PARENT) != os.getpgrp()
    )


def drop_closed_outputs() -> None:
    """Send standard output and error to nowhere if the terminal or the program that reads them is gone."""
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        with suppress(OSError):
            if any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


def end_with_parent() -> None:
    """End this worker of `multiprocessing` when its parent ends, however that happens. Call it first in the worker."""
    with suppress(AttributeError, OSError):  # Linux: at once, even in the middle of a system call
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    threading.Thread(target=_end_after_parent, name="parent watch", daemon=True).start()


def _end_after_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # the end of a pipe that only the parent keeps open
    os._exit(1)
