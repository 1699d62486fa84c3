"""Checkpoints of a run: whole or not there, the newest whole one found again, the older ones removed.

A checkpoint is a folder `ep1-ba200` with what Composer writes (a file a rank, or one file) and a `checkpoint.json` that
is written last and lists the files with their sizes. A folder without it, or in which a file is missing or short, is
what a kill left: it is never read.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rankllm_composer.errors import CheckpointError
from rankllm_composer.storage.atomic import publish_folder, write_atomic

log = logging.getLogger(__name__)


MANIFEST = "checkpoint.json"


FORMAT = 1


_NAME = re.compile(r"ep(\d{1,18})-ba(\d{1,18})", re.ASCII)


_STAGE = ".partial"


@dataclass(frozen=True)
class Manifest:
    """What `checkpoint.json` holds.

    Args:
        batch: optimizer updates behind it.
        epoch: epochs behind it.
        num_ranks: ranks that wrote it.
        is_sharded: a file a rank (FSDP2), or one file.
        weights: shape of each weight, by name.
        callbacks: names of the Composer callbacks whose state is in it.
        files: bytes of each file, by name.
    """

    batch: int
    epoch: int
    num_ranks: int
    is_sharded: bool
    weights: Mapping[str, list[int]]
    callbacks: list[str]
    files: Mapping[str, int]
    format: int = field(default=FORMAT)

    @property
    def name(self) -> str:
        return f"ep{self.epoch}-ba{self.batch}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def parse_manifest(text: str | bytes) -> Manifest | None:
    """The manifest in a `checkpoint.json`; None if it is torn, or of another format."""
    try:
        manifest = Manifest(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    whole = (
        _NAME.fullmatch(manifest.name) is not None
        and all(_is_count(number) for number in (manifest.batch, manifest.epoch, manifest.num_ranks, manifest.format))
        and isinstance(manifest.is_sharded, bool)
        and all(isinstance(table, dict) for table in (manifest.weights, manifest.files))
        and isinstance(manifest.callbacks, list)
        and all(isinstance(name, str) for name in manifest.callbacks)
        and all(_is_count(size) and _is_file_name(name) for name, size in manifest.files.items())
    )
    return manifest if whole and manifest.format == FORMAT and manifest.files else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_file_name(name: str) -> bool:
    """Whether it names a file of the checkpoint's own folder, and nothing outside."""
    return name not in ("", ".", "..", MANIFEST) and not any(char in name for char in "/\\:\0")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint on disk; None if the checkpoint is not whole."""
    try:
        manifest = parse_manifest((folder / MANIFEST).read_bytes())
        if manifest is None or manifest.name != folder.name:
            return None
        sizes = {name: (folder / name).stat().st_size for name in manifest.files}
    except OSError:
        return None
    return manifest if sizes == manifest.files else None


def whole_checkpoints(folder: Path) -> list[tuple[Path, Manifest]]:
    """Every whole checkpoint in a folder, oldest first."""
    found = [(path, manifest) for path in _checkpoint_folders(folder) if (manifest := read_manifest(path)) is not None]
    return sorted(found, key=lambda pair: (pair[1].batch, pair[1].epoch))


def stage_folder(folder: Path) -> Path:
    """Where the ranks write a checkpoint of `folder` until it is whole."""
    return folder / _STAGE


def clear_stage(folder: Path) -> None:
    """Make room for a new checkpoint: what a kill left of one is removed. For one process."""
    shutil.rmtree(stage_folder(folder), ignore_errors=True)
    stage_folder(folder).mkdir(parents=True)


def publish(folder: Path, manifest: Manifest) -> Path:
    """Give the staged checkpoint its manifest and its place, in one step. For one process.

    Args:
        folder: of the checkpoints; the staged files are in `stage_folder(folder) / manifest.name`.
        manifest: what belongs to it.
    Returns:
        The checkpoint.
    """
    staged, target = stage_folder(folder) / manifest.name, folder / manifest.name
    if target.exists():
        remove(target)
    write_atomic(staged / MANIFEST, manifest.to_json())
    publish_folder(staged, target)
    return target


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, the manifest first: a kill leaves what is never read."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def prune(folder: Path, keep: int) -> list[str]:
    """Remove all but the newest `keep` whole checkpoints (-1 = none), and what is older than those and not whole.

    Returns:
        Names of the removed.
    """
    whole = whole_checkpoints(folder)
    if keep < 0 or len(whole) < keep:
        return []
    kept = {path for path, _ in whole[-keep:]}
    oldest = whole[-keep][1].batch
    removed = [path for path in _checkpoint_folders(folder) if path not in kept and batch_of(path.name) <= oldest]
    for path in removed:
        remove(path)
    return [path.name for path in removed]


def check_same_model(manifest: Manifest, weights: Mapping[str, list[int]], is_sharded: bool, place: object) -> None:
    """Refuse a checkpoint of another model.

    Args:
        manifest: of the checkpoint.
        weights: shape of each weight of the model to continue with, by name.
        is_sharded: whether this run shards its checkpoints.
        place: of the checkpoint, for messages.
    Raises:
        CheckpointError: names, shapes or layout differ.
    """
    remedy = "continue with the model that wrote it, or give this run its own run.name, run.folder or checkpoint.folder"
    there = manifest.weights
    for name in sorted(there.keys() | weights.keys()):
        if there.get(name) != weights.get(name):
            found, here = (shapes.get(name, "no such weight") for shapes in (there, weights))
            raise CheckpointError(
                f"{place}: found a checkpoint of another model ({name}: {found} there, {here} in this model); {remedy}"
            )
    if manifest.is_sharded != is_sharded:
        kinds = {True: "sharded over its ranks", False: "in one file"}
        raise CheckpointError(
            f"{place}: found a checkpoint {kinds[manifest.is_sharded]}, this run writes and reads those "
            f"{kinds[is_sharded]} (parallelism.fsdp); {remedy}"
        )


def weight_shapes(model: Any) -> dict[str, list[int]]:
    """Shape of each weight of a model, by its name without what DDP, checkpointing and compiling add to it."""
    wrappers = re.compile(r"(^|\.)(module|_checkpoint_wrapped_module|_orig_mod)(?=\.)")
    return {wrappers.sub("", name).lstrip("."): list(weight.shape) for name, weight in model.named_parameters()}


def _checkpoint_folders(folder: Path) -> Iterator[Path]:
    with suppress(FileNotFoundError):
        yield from (path for path in sorted(folder.iterdir()) if _NAME.fullmatch(path.name) and path.is_dir())


def batch_of(name: str) -> int:
    """The batch in a checkpoint's name; -1 for any other name."""
    match = _NAME.fullmatch(name)
    return -1 if match is None else int(match[2])
