"""Whose the folders of a run are: what a run refuses before it writes there, and `recipes check` before it starts."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankllm_composer.checkpoints.folder import complete_checkpoints
from rankllm_composer.errors import CheckpointError, RunError, StoreError
from rankllm_composer.recipe.load import recipe_to_yaml
from rankllm_composer.recipe.resume import RECIPE_NAME, check_same_recipe
from rankllm_composer.storage.object_store import is_remote

if TYPE_CHECKING:
    from rankllm_composer.recipe.sections import Recipe

EXPORT_NAME = re.compile(r"(epoch|batch)_\d+")


def check_folders(recipe: Recipe) -> None:
    """Check the folders on this machine as they are now, and change nothing.

    Raises:
        RunError, CheckpointError, StoreError: what a run with the recipe would say of them before its first batch.
    """
    text, folder = recipe_to_yaml(recipe), Path(recipe.run_folder)
    check_writable(folder)
    recipe_of_run(folder, text)
    newest = None
    if not is_remote(recipe.checkpoint_folder):
        checkpoints = Path(recipe.checkpoint_folder)
        recipe_of_checkpoints(checkpoints, text)
        newest = next(reversed(complete_checkpoints(checkpoints)), None)
        if newest is not None and not recipe.run.autoresume:
            raise not_resumed(newest[0])
    if newest is None and recipe.export_folder is not None and not is_remote(recipe.checkpoint_folder):
        for path in sorted(Path(recipe.export_folder).glob("*/reranker.json")):
            if EXPORT_NAME.fullmatch(path.parent.name):
                raise export_of_another_run(path.parent)


def check_writable(folder: Path) -> None:
    """Raise RunError if a run's folder neither exists nor can be made, or cannot be written."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise unwritable(folder, os.strerror(errno.ENOTDIR))
    if not os.access(there, os.W_OK | os.X_OK):
        raise unwritable(folder, os.strerror(errno.EACCES))


def unwritable(folder: Path, reason: str | None) -> RunError:
    """The error about a run's folder that cannot be written."""
    return RunError(
        f"run.folder: {folder} cannot be written ({reason}). Free space, correct the permissions, or choose another "
        "folder."
    )


def recipe_of_run(folder: Path, recipe_yaml: str) -> str:
    """The resolved recipe to write into a run's folder, with the changes accepted so far.

    Raises:
        RunError: the folder holds a run of another recipe.
    """

    def trained(recipe: Mapping[str, Any]) -> int | None:
        """Batches of the newest checkpoint of the run in a folder; None if it left neither checkpoint nor export."""
        given = recipe.get("checkpoint.folder")
        checkpoints = complete_checkpoints(folder / "checkpoints" if given is None or is_remote(given) else Path(given))
        if checkpoints:
            return checkpoints[-1][1].batch
        exports = Path(recipe.get("checkpoint.export.folder") or folder / "hf")
        return 0 if any(exports.glob("*/reranker.json")) else None

    return _with_changes(folder, recipe_yaml, "run.folder", trained)


def recipe_of_checkpoints(
    folder: Path, recipe_yaml: str, trained: Callable[[Mapping[str, Any]], int | None] | None = None
) -> str:
    """The resolved recipe to write beside checkpoints on this machine, with the changes accepted so far.

    Args:
        trained: as for `check_same_recipe`; None = the batches of the newest checkpoint there.
    Raises:
        RunError: they are of a run of another recipe.
    """

    def newest(_: Mapping[str, Any]) -> int | None:
        return max((manifest.batch for _, manifest in complete_checkpoints(folder)), default=None)

    return _with_changes(folder, recipe_yaml, "checkpoint.folder", trained or newest)


def _with_changes(folder: Path, recipe_yaml: str, key: str, trained: Callable[[Mapping[str, Any]], int | None]) -> str:
    path = folder / RECIPE_NAME
    if not path.exists():
        return recipe_yaml
    return check_same_recipe(path.read_text(errors="replace"), recipe_yaml, f"{key}: {folder}", trained)


def not_resumed(checkpoint: Path) -> CheckpointError:
    """The error about a checkpoint that a run may not resume from."""
    return CheckpointError(
        f"run.autoresume is false, but {checkpoint} is a checkpoint of this run. Set it to true to resume, or choose "
        "another run.name or run.folder."
    )


def export_of_another_run(folder: Path) -> StoreError:
    """The error about an export that a run would replace."""
    return StoreError(
        f"checkpoint.export.folder: {folder} is the export of another run. Move it away, or choose another "
        "checkpoint.export.folder."
    )
