"""Run an action in a forked process, and check which shared memory remains."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from multiprocessing.shared_memory import SharedMemory

from rankllm_composer.data.shared_memory import private_shared_memory

_NEW_MOUNTS = 0x20000  # CLONE_NEWNS


def in_a_child(action, then_die=False):
    """Return `str(action())` from a forked process, which then exits or is killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(action()).encode())
        finally:
            if then_die:
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def exists(name):
    """Whether a shared-memory segment exists."""
    try:
        memory = SharedMemory(name)
    except FileNotFoundError:
        return False
    memory.close()
    return True


def names_of_a_dataset():
    """Create the shared-memory names of a dataset and its first segment; return the number in the names."""
    from streaming.base.dataset import get_shm_prefix as original
    from streaming.base.shared.prefix import _unpack_locals
    from streaming.base.world import World

    with private_shared_memory():
        from streaming.base.dataset import get_shm_prefix

        assert get_shm_prefix is not original
        number, memory = get_shm_prefix(["/data"], [None], World.detect())
    assert _unpack_locals(bytes(memory.buf)) == (["/data"], number)
    return number


def with_small_shared_memory(num_bytes, action):
    """Return the message of the error that `action()` raises where /dev/shm has this size. Needs root."""

    def act():
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(_NEW_MOUNTS) == 0, os.strerror(ctypes.get_errno())
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "none", "/dev/shm"], check=True)
        try:
            return f"no error: {action()}"
        except ValueError as error:
            return error

    return in_a_child(act)
