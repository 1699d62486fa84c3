"""Locks: exclusive, of one process, dropped with it although children live on, and replaced where there are none."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading

import pytest
from support.child_process import in_a_child
from support.missing_calls import no_locks

from rankllm_composer.storage.locks import try_lock


def test_a_lock_is_exclusive_until_released(tmp_path):
    path = tmp_path / "lock"
    with try_lock(path) as lock:
        assert lock.is_held and lock.is_certain and try_lock(path) is None
        assert in_a_child(lambda: try_lock(path)) == "None"
    assert path.exists() and not lock.is_held
    again = try_lock(path)
    assert again.is_held
    again.remove()
    again.remove()
    assert not path.exists()


def test_a_forked_child_neither_releases_a_lock_nor_keeps_it(tmp_path):
    lock = try_lock(tmp_path / "lock")
    assert in_a_child(lambda: (lock.remove(), lock.is_held)[1]) == "False"
    assert (tmp_path / "lock").exists() and try_lock(tmp_path / "lock") is None
    ready, is_over = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(ready[1], b"x")
        os.close(is_over[1])
        os.read(is_over[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    lock.release()
    assert try_lock(tmp_path / "lock").is_held  # although the child lives
    os.close(is_over[1])
    assert os.waitpid(child, 0)[1] == 0


def test_a_lock_is_dropped_with_its_process(tmp_path):
    in_a_child(lambda: try_lock(tmp_path / "lock"), then_die=True)
    assert try_lock(tmp_path / "lock").is_held


def test_waiting_for_a_lock(tmp_path):
    lock = try_lock(tmp_path / "lock")
    assert try_lock(tmp_path / "lock", wait_seconds=0.2) is None
    threading.Timer(0.2, lock.remove).start()
    assert try_lock(tmp_path / "lock", wait_seconds=30).is_held


def test_no_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic link"):
        try_lock(tmp_path / "link")
    assert not (tmp_path / "target").exists()


TWO_PROCESSES = """
import os, sys
from pathlib import Path
from rankllm_composer.storage.locks import try_lock
paths = [Path(sys.argv[1], name) for name in ("one", "other")]
locks = [try_lock(path) for path in paths]
child = os.fork()
if child == 0:
    found = try_lock(paths[0])
    print(found and (found.is_held, found.is_certain), flush=True)
    os._exit(0)
os.waitpid(child, 0)
locks[0].remove()
again = try_lock(paths[0])
print(again.is_held, again.is_certain, sorted(path.name for path in paths[0].parent.iterdir()))
"""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_file_system_without_locks(tmp_path, number, everywhere):
    """Another lock stands in for it; where there is none, a warning says so. Both name the path, once."""
    folder, temporary = tmp_path / "shared", tmp_path / "temporary"
    folder.mkdir(), temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", TWO_PROCESSES, folder],
        env={**os.environ, **no_locks(tmp_path, tmp_path if everywhere else folder, number), "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first == ("(True, False)" if everywhere else "None")
    assert second == f"True {not everywhere} ['one', 'other']"
    (warning,) = done.stderr.splitlines()
    assert warning.startswith(f"{folder}/one: this file system has no locks ({os.strerror(number)}), so ")
    assert ("nothing stops two processes" if everywhere else "processes on other machines, or of other") in warning
