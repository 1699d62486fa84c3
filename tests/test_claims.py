"""Names and folders that processes share: the dead lose theirs, the living keep them."""

from __future__ import annotations

import os
import signal
import tempfile
from multiprocessing.shared_memory import SharedMemory

import pytest

from rankllm_composer.claims import claim_cache, clear_dead_claims, private_shared_memory, try_claim


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Claims of this test only, not the machine's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


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


def test_a_claim_is_exclusive_until_released(tmp_path):
    claim = try_claim(tmp_path / "claim")
    assert claim.is_held and try_claim(tmp_path / "claim") is None
    assert in_a_child(lambda: try_claim(tmp_path / "claim")) == "None"
    claim.release()
    claim.release()
    assert not (tmp_path / "claim").exists()
    again = try_claim(tmp_path / "claim")
    assert again.is_held
    again.release()


def test_a_forked_worker_cannot_release(tmp_path):
    claim = try_claim(tmp_path / "claim")
    in_a_child(claim.release)
    assert (tmp_path / "claim").exists() and try_claim(tmp_path / "claim") is None
    claim.release()


def test_the_dead_lose_their_shared_memory(tmp_path):
    number = int(in_a_child(names_of_a_dataset, then_die=True))
    assert exists(f"{number:06}_locals")
    assert len(list(tmp_path.rglob("names-*"))) == 1
    assert clear_dead_claims() == 1
    assert not exists(f"{number:06}_locals")
    assert not list(tmp_path.rglob("names-*"))


def test_the_living_keep_theirs(tmp_path):
    number = names_of_a_dataset()
    other = names_of_a_dataset()
    assert number != other and min(number, other) >= 10**6  # streaming itself counts up from 0
    assert clear_dead_claims() == 0
    assert in_a_child(clear_dead_claims) == "0"
    assert exists(f"{number:06}_locals") and exists(f"{other:06}_locals")


def test_a_cache_folder_has_one_run(tmp_path):
    folder = tmp_path / "cache"
    claim = claim_cache(folder)
    assert claim_cache(f"{folder}/.") is claim  # the same run may open it twice
    assert in_a_child(lambda: claim_cache(folder, wait_seconds=0)) == "None"
    claim.release()
    assert in_a_child(lambda: claim_cache(folder, wait_seconds=0), then_die=True) != "None"
    assert claim_cache(folder, wait_seconds=5) is not None  # its holder is dead
