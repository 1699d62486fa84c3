"""Checkpoints on disk: written completely or not at all, found by batch number, pruned to the newest.

A checkpoint is a folder such as `ep1-ba200` with the files that Composer writes (one per rank, or one) and a
`checkpoint.json`, written last, that lists them with their sizes and SHA-256. A folder without it, or in which a file
is missing or short, is incomplete and never read; one in which a file holds something else is damaged and refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankllm_composer.errors import CheckpointError
from rankllm_composer.storage.atomic import publish_folder, write_atomic
from rankllm_composer.storage.content import differing_files

MANIFEST = "checkpoint.json"
FORMAT = 2
_NAME = re.compile(r"ep(\d{1,18})-ba(\d{1,18})", re.ASCII)
_STAGE = ".partial"


@dataclass(frozen=True)
class Manifest:
    """Content of `checkpoint.json`."""

    batch: int  # finished optimizer steps
    epoch: int  # finished epochs
    num_ranks: int
    is_sharded: bool  # one file per rank (FSDP2) instead of one file
    weights: Mapping[str, list[int]]  # name → shape
    callbacks: list[str]  # Composer callbacks with a state in the checkpoint
    files: Mapping[str, int]  # name → bytes
    sha256: Mapping[str, str]  # name → SHA-256 of the content
    format: int = FORMAT

    @property
    def name(self) -> str:
        return f"ep{self.epoch}-ba{self.batch}"

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "checksum": self.checksum()}, indent=1) + "\n"

    def checksum(self) -> str:
        """SHA-256 of the manifest itself."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def parse_manifest(text: str | bytes) -> Manifest | None:
    """Parse a `checkpoint.json`; None if it is damaged or of another format."""
    try:
        values = json.loads(text)
        checksum = values.pop("checksum", None)
        manifest = Manifest(**values)
        if manifest.checksum() != checksum:
            return None
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    is_valid = (
        _NAME.fullmatch(manifest.name) is not None
        and all(_is_count(number) for number in (manifest.batch, manifest.epoch, manifest.num_ranks, manifest.format))
        and isinstance(manifest.is_sharded, bool)
        and all(isinstance(table, dict) for table in (manifest.weights, manifest.files, manifest.sha256))
        and manifest.files.keys() == manifest.sha256.keys()
        and isinstance(manifest.callbacks, list)
        and all(isinstance(name, str) for name in manifest.callbacks)
        and all(_is_count(size) and _is_file_name(name) for name, size in manifest.files.items())
    )
    return manifest if is_valid and manifest.format == FORMAT and manifest.files else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_file_name(name: str) -> bool:
    return name not in ("", ".", "..", MANIFEST) and not any(char in name for char in "/\\:\0")


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a checkpoint on disk; None if the checkpoint is incomplete."""
    try:
        manifest = parse_manifest((folder / MANIFEST).read_bytes())
        if manifest is None or manifest.name != folder.name:
            return None
        sizes = {name: (folder / name).stat().st_size for name in manifest.files}
    except OSError:
        return None
    return manifest if sizes == manifest.files else None


def complete_checkpoints(folder: Path) -> list[tuple[Path, Manifest]]:
    """List the complete checkpoints in a folder, oldest first."""
    found = [(path, manifest) for path in _checkpoint_folders(folder) if (manifest := read_manifest(path)) is not None]
    return sorted(found, key=lambda pair: (pair[1].batch, pair[1].epoch))


def damaged_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints with a manifest that were complete once, but are not what it says, oldest first."""
    found = [path for path in _checkpoint_folders(folder) if (path / MANIFEST).exists() and read_manifest(path) is None]
    return sorted(found, key=lambda path: batch_of(path.name))


def damage_in(checkpoint: Path, manifest: Manifest, names: Iterable[str] | None = None) -> str | None:
    """Describe the damage in files of a checkpoint, by default in all; None if all are as they were written."""
    names = manifest.files if names is None else names
    differing = differing_files(checkpoint, {name: manifest.sha256[name] for name in names})
    if not differing:
        return None
    return (
        f"{checkpoint} is damaged (the SHA-256 of {', '.join(differing[:3])} is not that in {MANIFEST}). Remove "
        f"{checkpoint} to resume from the checkpoint before it."
    )


def stage_folder(folder: Path) -> Path:
    """Return the folder in which the ranks write a checkpoint of `folder` until it is complete."""
    return folder / _STAGE


def clear_stage(folder: Path) -> None:
    """Remove what a killed run left of an unfinished checkpoint. Call it in one process."""
    with suppress(FileNotFoundError):
        shutil.rmtree(stage_folder(folder))
    stage_folder(folder).mkdir(parents=True)


def publish(folder: Path, manifest: Manifest) -> Path:
    """Add the manifest to the staged checkpoint and move it into `folder`, atomically. Call it in one process."""
    staged, target = stage_folder(folder) / manifest.name, folder / manifest.name
    if target.exists():
        remove(target)
    write_atomic(staged / MANIFEST, manifest.to_json())
    publish_folder(staged, target)
    return target


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, its manifest first, so that what a killed process leaves is never read."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def prune(folder: Path, keep: int) -> list[str]:
    """Keep the newest `keep` complete checkpoints (-1 = all); remove everything older and return the names."""
    complete = complete_checkpoints(folder)
    if keep < 0 or len(complete) < keep:
        return []
    kept = {path for path, _ in complete[-keep:]}
    oldest = complete[-keep][1].batch
    removed = [path for path in _checkpoint_folders(folder) if path not in kept and batch_of(path.name) <= oldest]
    for path in removed:
        remove(path)
    return [path.name for path in removed]


def check_same_model(manifest: Manifest, weights: Mapping[str, list[int]], is_sharded: bool, place: object) -> None:
    """Raise CheckpointError if a checkpoint, at `place`, differs from this run's model in names, shapes or layout."""
    remedy = "Resume with the model that wrote it, or choose another run.name, run.folder or checkpoint.folder."
    for name in sorted(manifest.weights.keys() | weights.keys()):
        saved, expected = (shapes.get(name, "absent") for shapes in (manifest.weights, weights))
        if saved != expected:
            raise CheckpointError(
                f"{place} is a checkpoint of another model ({name} is {saved}; expected {expected}). {remedy}"
            )
    if manifest.is_sharded != is_sharded:
        layouts = {True: "sharded over ranks", False: "a single file"}
        raise CheckpointError(
            f"{place} is {layouts[manifest.is_sharded]}; expected {layouts[is_sharded]} (parallelism.fsdp). {remedy}"
        )


def weight_shapes(model: Any) -> dict[str, list[int]]:
    """Return the shape of each weight, by its name without the prefixes of DDP, checkpointing and compiling."""
    wrappers = re.compile(r"(^|\.)(module|_checkpoint_wrapped_module|_orig_mod)(?=\.)")
    return {wrappers.sub("", name).lstrip("."): list(weight.shape) for name, weight in model.named_parameters()}


def _checkpoint_folders(folder: Path) -> Iterator[Path]:
    with suppress(FileNotFoundError):
        yield from (path for path in sorted(folder.iterdir()) if _NAME.fullmatch(path.name) and path.is_dir())


def batch_of(name: str) -> int:
    """Return the batch number in a checkpoint's name; -1 for any other name."""
    match = _NAME.fullmatch(name)
    return -1 if match is None else int(match[2])
