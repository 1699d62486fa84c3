"""A file system of a few megabytes that can be filled, or made read-only."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Mount a tmpfs of this size at a new folder; skip the test where mounting is not allowed."""
    folder.mkdir()
    mounted = _run("mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder))
    if mounted.returncode != 0:
        pytest.skip(f"this machine does not allow to mount a small disk: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        _run("umount", "--lazy", str(folder))


def fill(disk: Path, free: int = 0) -> Path:
    """Fill a disk except for `free` bytes; returns the file that takes the space."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
        file.truncate(max(0, filler.stat().st_size - free))
    return filler


def make_read_only(disk: Path) -> None:
    done = _run("mount", "-o", "remount,ro", str(disk))
    assert done.returncode == 0, done.stderr


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
