"""A run's folder: one run at a time writes there, always of the same recipe."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECIPE_NAME = "recipe.yaml"
MAY_CHANGE = (
    "run.folder",
    "run.max_duration",
    "checkpoint.interval",
    "checkpoint.keep",
    "checkpoint.export",
    "logging.",
    "data.num_workers",
    "data.prefetch_factor",
    "data.loader_timeout_seconds",
    "parallelism.dist_timeout_seconds",
)
"""Keys, and sections, that may differ when a run is resumed: they change no weight."""


class RunFolderError(ValueError):
    """A folder cannot take this run; the message says why and what to do."""


@contextlib.contextmanager
def claim_run_folder(folder: Path, recipe_yaml: str, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold a run's folder while it trains, with the resolved recipe in it. For one process a run.

    The lock is the kernel's: it is gone with the process, however that dies.

    Args:
        folder: made if absent.
        recipe_yaml: the resolved recipe; compared with the one that is there, then written.
        wait_seconds: for another process to end, such as what a killed run leaves for a moment.
    Raises:
        RunFolderError: another process trains there, the folder holds a run of another recipe, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _write_error(folder, error) from error
    try:
        if not _try_lock(handle, wait_seconds):
            raise RunFolderError(
                f"run.folder: another process is training in {folder}; wait for it, or give this run its own run.name "
                "or run.folder"
            )
        if (folder / RECIPE_NAME).exists():
            check_same_recipe((folder / RECIPE_NAME).read_text(), recipe_yaml, f"run.folder: {folder}")
        try:
            partial = folder / f".{RECIPE_NAME}.partial"
            partial.write_text(recipe_yaml)
            partial.replace(folder / RECIPE_NAME)
        except OSError as error:
            raise _write_error(folder, error) from error
        yield
    finally:
        os.close(handle)


def _write_error(folder: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"run.folder: {folder} cannot be written ({error.strerror}); free space or correct the rights there, or name "
        "another folder"
    )


def _try_lock(handle: int, wait_seconds: float) -> bool:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.2)


def check_same_recipe(there: str, now: str, place: str) -> None:
    """Refuse to go on with another recipe than a run began with.

    Args:
        there, now: resolved recipes.
        place: key and folder of the first, for messages.
    Raises:
        RunFolderError: they differ in a key that may not change, or the first is damaged.
    """
    from omegaconf import OmegaConf

    remedy = "Go on with the same recipe, or give this run its own run.name, run.folder or checkpoint.folder"
    try:
        before, after = (_flatten(OmegaConf.to_container(OmegaConf.create(text))) for text in (there, now))
    except Exception as error:  # those of YAML and of OmegaConf have no common class
        raise RunFolderError(f"{place} holds a damaged {RECIPE_NAME} ({_first_line(error)}). {remedy}") from error
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    changed = [key for key in changed if not key.startswith(MAY_CHANGE)]
    if changed:
        shown = "; ".join(f"{key} was {before.get(key)!r}, is now {after.get(key)!r}" for key in changed[:5])
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise RunFolderError(f"{place} holds a run of another recipe ({shown}{more}). {remedy}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    if not isinstance(tree, dict) or not tree:
        return {prefix.removesuffix("."): tree}
    return {key: value for name, part in tree.items() for key, value in _flatten(part, f"{prefix}{name}.").items()}
