"""Locks: exclusive, dropped with their process, kept out of the hands of forked children."""

from __future__ import annotations

import errno
import fcntl
import os
import threading

from support.child_process import in_a_child

from rankllm_composer.storage import locks
from rankllm_composer.storage.locks import try_lock


def test_a_lock_is_exclusive_until_released(tmp_path):
    path = tmp_path / "lock"
    with try_lock(path) as lock:
        assert lock.is_held and try_lock(path) is None
        assert in_a_child(lambda: try_lock(path)) == "None"
    assert path.exists() and not lock.is_held
    again = try_lock(path)
    assert again.is_held
    again.remove()
    again.remove()
    assert not path.exists()


def test_a_forked_child_cannot_release_a_lock(tmp_path):
    lock = try_lock(tmp_path / "lock")
    in_a_child(lock.remove)
    assert (tmp_path / "lock").exists() and try_lock(tmp_path / "lock") is None
    lock.remove()


def test_a_lock_is_dropped_with_its_process(tmp_path):
    in_a_child(lambda: try_lock(tmp_path / "lock"), then_die=True)
    assert try_lock(tmp_path / "lock").is_held


def test_waiting_for_a_lock(tmp_path):
    lock = try_lock(tmp_path / "lock")
    assert try_lock(tmp_path / "lock", wait_seconds=0.2) is None
    threading.Timer(0.2, lock.remove).start()
    assert try_lock(tmp_path / "lock", wait_seconds=30).is_held


def test_a_file_system_without_locks_is_named_once(tmp_path, monkeypatch, caplog):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(locks, "_devices_without_locks", set())
    for name in ("one", "one", "other"):
        assert try_lock(tmp_path / name).is_held
    (message,) = caplog.messages
    assert message == (
        f"{tmp_path / 'one'}: this file system has no locks (No locks available), so nothing stops two processes from "
        "writing here; run only one at a time"
    )
