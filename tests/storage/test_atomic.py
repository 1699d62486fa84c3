"""Atomic files and folders: kills at any moment, full disks, and obstacles at the path."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rankllm_composer.errors import StoreError
from rankllm_composer.storage.atomic import staged_folder, write_atomic

MARK = "mark.json"
WRITER = """
import os, sys, time
from pathlib import Path
from rankllm_composer.storage.atomic import staged_folder
target, moment = Path(sys.argv[1]), sys.argv[2]
def stop():
    print("here", flush=True)
    time.sleep(60)
steps = {"rename": 0}
rename = Path.rename
def slow_rename(self, other):
    steps["rename"] += 1
    if moment == f"before rename {steps['rename']}":
        stop()
    return rename(self, other)
Path.rename = slow_rename
with staged_folder(target, mark="mark.json", num_bytes=1) as stage:
    (stage / "first").write_text("new")
    if moment == "writing":
        stop()
    (stage / "mark.json").write_text("new")
"""


def write(target: Path, text: str = "new") -> None:
    with staged_folder(target, mark=MARK, num_bytes=1) as stage:
        (stage / MARK).write_text(text)
        (stage / "sub").mkdir()
        (stage / "sub" / "file").write_text(text)


def kill_at(target: Path, moment: str) -> None:
    """Start a writer and kill it with SIGKILL at a moment of its work."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, target, moment], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "here\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()


def test_a_file_is_replaced_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "größer")
    assert path.read_bytes() == "größer".encode()
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"

    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_atomic(path, "newer")
    assert path.read_bytes() == b"new"


def test_a_folder_appears_complete_and_without_leftovers(tmp_path):
    target = tmp_path / "a" / "b" / "model"
    write(target)
    assert sorted(path.name for path in target.rglob("*")) == ["file", MARK, "sub"]
    assert list(target.parent.iterdir()) == [target]


def test_an_earlier_version_is_replaced_completely(tmp_path):
    target = tmp_path / "model"
    write(target, "old")
    (target / "left over").write_text("old")
    write(target, "new")
    assert sorted(path.name for path in target.iterdir()) == [MARK, "sub"]
    assert (target / MARK).read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failing_block_leaves_the_earlier_version(tmp_path):
    target = tmp_path / "model"
    write(target, "old")
    for failure in (RuntimeError("no"), KeyboardInterrupt()):
        with pytest.raises(type(failure)), staged_folder(target, mark=MARK, num_bytes=1) as stage:
            (stage / MARK).write_text("new")
            raise failure
    assert (target / MARK).read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("moment", ["writing", "before rename 1"])
def test_a_killed_writer_leaves_no_partial_folder_and_the_next_one_cleans_up(tmp_path, moment):
    target = tmp_path / "model"
    kill_at(target, moment)
    assert not target.exists()
    assert len(list(tmp_path.glob(".model.partial-*"))) == 1
    write(target)
    assert list(tmp_path.iterdir()) == [target]


def test_a_kill_between_two_versions_loses_neither(tmp_path):
    target = tmp_path / "model"
    write(target, "old")
    kill_at(target, "before rename 2")  # the old version is aside, the new one not yet in place
    assert not target.exists()
    with pytest.raises(RuntimeError), staged_folder(target, mark=MARK, num_bytes=1):
        assert (target / MARK).read_text() == "old"
        raise RuntimeError
    assert (target / MARK).read_text() == "old"
    write(target, "new")
    assert (target / MARK).read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_two_living_writers_of_one_folder_are_refused(tmp_path):
    target = tmp_path / "model"
    with staged_folder(target, mark=MARK, num_bytes=1) as stage:
        (stage / MARK).write_text("first")
        with pytest.raises(StoreError, match="another process is writing it"):
            write(target, "second")
    assert (target / MARK).read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_leftovers_of_other_folders_stay(tmp_path):
    (tmp_path / ".other.partial-1").mkdir()
    write(tmp_path / "model")
    assert (tmp_path / ".other.partial-1").exists()


def test_only_folders_of_the_same_kind_are_replaced(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("file", "folder", "link"):
        with pytest.raises(StoreError, match="Move it away"):
            write(tmp_path / name)
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")


def test_too_little_space_is_an_error_before_writing(tmp_path):
    target = tmp_path / "model"
    with (
        pytest.raises(StoreError, match=r"no space to write it \([\d.]+ GB free, 1000000000\.00 GB needed\)"),
        staged_folder(target, mark=MARK, num_bytes=10**18),
    ):
        pytest.fail("the block must not run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_while_writing(tmp_path, error):
    with (
        pytest.raises(StoreError, match=r"model: no space to write it .* no partial folder is left behind"),
        staged_folder(tmp_path / "model", mark=MARK, num_bytes=1),
    ):
        raise error
    assert not list(tmp_path.iterdir())


def test_other_write_errors_are_reported(tmp_path):
    with (
        pytest.raises(StoreError, match=r"model: could not be written .*Input/output error"),
        staged_folder(tmp_path / "model", mark=MARK, num_bytes=1),
    ):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="could not be written"):
        write(tmp_path / "file" / "model")
