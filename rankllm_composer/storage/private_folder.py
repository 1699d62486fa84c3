"""The folder of this user in the temporary directory, for locks and names that no other user may touch."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from rankllm_composer.errors import StoreError
from rankllm_composer.screen import get_logger

log = get_logger(__name__)
SCRATCH_PREFIX = "scratch-"
_PREFIX = "rankllm_composer-"
_NUM_NAMES = 100
_reported: set[Path] = set()


def private_folder() -> Path:
    """Return the private folder of this user, created if absent; the same one in every process of the user.

    A folder of this name that belongs to another user, is a link or lets others in is not used; the next name is.

    Raises:
        StoreError: the temporary directory takes no such folder.
    """
    parent = Path(tempfile.gettempdir())
    if parent.name.startswith(SCRATCH_PREFIX) and parent.parent.name.startswith(_PREFIX) and is_private(parent.parent):
        return parent.parent  # the temporary directory of this process is a scratch folder in it
    name = f"{_PREFIX}{os.geteuid()}"
    for number in range(_NUM_NAMES):
        folder = parent / (f"{name}-{number}" if number else name)
        try:
            folder.mkdir(mode=0o700)
            is_new = True
        except FileExistsError:
            is_new = False
        except OSError as error:
            raise StoreError(
                f"{folder}: a folder for locks could not be created ({error.strerror}). Free space or correct the "
                "permissions there, or set TMPDIR to another folder."
            ) from error
        if is_private(folder):
            return folder
        if is_new:
            folder.rmdir()
            raise StoreError(f"{parent} does not keep permissions. Set TMPDIR to a folder on a local disk.")
        if folder not in _reported:
            _reported.add(folder)
            log.warning("%s belongs to another user or is open to others; it is not used", folder)
    raise StoreError(f"{parent}/{name} and {_NUM_NAMES - 1} more belong to another user. Set TMPDIR to another folder.")


def is_private(folder: Path) -> bool:
    """Whether a path is a folder, not a link, that belongs to this user and is closed to all others."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
