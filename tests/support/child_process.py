"""Shared by tests: child process."""

from __future__ import annotations

import os
import signal
from multiprocessing.shared_memory import SharedMemory

from rankllm_composer.data.shared_memory import private_shared_memory


def in_a_child(action, then_die=False):
    """What `action()` returns in a forked process, as text; the process then ends, or is killed."""
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
    try:
        memory = SharedMemory(name)
    except FileNotFoundError:
        return False
    memory.close()
    return True


def names_of_a_dataset():
    """The names' number of a dataset made now, with one segment of it made."""
    from streaming.base.dataset import get_shm_prefix as streamings
    from streaming.base.shared.prefix import _unpack_locals
    from streaming.base.world import World

    with private_shared_memory():
        from streaming.base.dataset import get_shm_prefix

        assert get_shm_prefix is not streamings
        number, memory = get_shm_prefix(["/data"], [None], World.detect())
    assert _unpack_locals(bytes(memory.buf)) == (["/data"], number)
    return number
