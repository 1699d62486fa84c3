"""What a set of shards says about itself: `index.json`, and the columns of a sample.

An index comes from outside (a download, another machine), so nothing in it is believed before it is checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rankllm_composer.prompts import Record

INDEX_NAME = "index.json"

COLUMNS: dict[str, str] = {
    "id": "str",
    "qid": "str",
    "system": "str",
    "user": "str",
    "response": "str",
    "docids": "json",
    "grades": "json",
}

_REMEDY = "fetch the index again, or build the set again (rankllm-composer shards build)"


class ShardError(ValueError):
    """A set of shards, or a part of one, that cannot be built, published or trusted."""


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A file as the index describes it: path inside the set, size, hashes by algorithm."""

    basename: str
    num_bytes: int
    hashes: dict[str, str]


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of an index.

    Attributes:
        num_samples: records it holds.
        raw: the unpacked file.
        packed: the compressed file; None if the set is not compressed.
        compression: streaming's name of the compression, None if there is none.
        entry: the index entry as it stands.
    """

    num_samples: int
    raw: ShardFile
    packed: ShardFile | None
    compression: str | None
    entry: dict[str, Any]

    @property
    def published(self) -> ShardFile:
        """The file that is stored: the compressed one where there is one."""
        return self.packed or self.raw


def read_index(path: Path) -> tuple[Shard, ...]:
    """Shards of an `index.json`, checked as in `parse_index`.

    Raises:
        ShardError: there is no such file, or it is damaged.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise ShardError(
            f"{path}: there is no index, so the set is not complete; build it (rankllm-composer shards build), "
            "or merge its parts (shards merge)"
        ) from error
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {error.strerror}; check path and rights") from error
    return parse_index(text, str(path))


def parse_index(text: bytes | str, where: str) -> tuple[Shard, ...]:
    """Shards of an index, each entry checked: version, format, columns, sizes, hashes, paths that stay in the set.

    Args:
        text: content of an `index.json`.
        where: its path or URL, for the error.
    Returns:
        The shards in order.
    Raises:
        ShardError: naming the entry, what was found and what to do.
    """
    try:
        index = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{where}: damaged, no valid JSON ({error}); {_REMEDY}") from error
    if not isinstance(index, dict) or not isinstance(index.get("shards"), list):
        raise ShardError(f"{where}: damaged, it holds no list under 'shards'; {_REMEDY}")
    if index.get("version") != 2:
        raise ShardError(f"{where}: version is {index.get('version')!r}, allowed is 2; {_REMEDY}")
    shards = tuple(_shard(entry, f"{where}:shards[{i}]") for i, entry in enumerate(index["shards"]))
    names = [file.basename for shard in shards for file in (shard.raw, shard.packed) if file is not None]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ShardError(f"{where}: {twice!r} is listed twice; {_REMEDY}")
    return shards


def dump_index(entries: list[dict[str, Any]]) -> str:
    """Text of the `index.json` of these shard entries."""
    return json.dumps({"version": 2, "shards": entries}, sort_keys=True)


def check_basename(basename: Any, where: str) -> PurePosixPath:
    """Path of an index entry, which must stay inside the set: no root, no drive, no '..', no backslash.

    Raises:
        ShardError: it does not.
    """
    path = PurePosixPath(basename) if isinstance(basename, str) else PurePosixPath()
    leaves = path.is_absolute() or ".." in path.parts or any(char in str(path) for char in ("\\", ":", "\0"))
    if leaves or not path.parts or str(path) != basename:
        raise ShardError(f"{where}: found the path {basename!r}, allowed is one inside the set; do not use this index")
    return path


def sample_from_record(record: Record) -> dict[str, Any]:
    """The columns of a record."""
    return {
        "id": record.id,
        "qid": record.qid or "",
        "system": record.system,
        "user": record.user,
        "response": record.response,
        "docids": None if record.docids is None else list(record.docids),
        "grades": None if record.grades is None else list(record.grades),
    }


def record_from_sample(sample: Mapping[str, Any]) -> Record:
    """The record of a sample, the inverse of `sample_from_record`.

    Raises:
        ShardError: a column is missing, or holds something else than its type.
    """
    for name, encoding in COLUMNS.items():
        value = sample.get(name)
        fits = isinstance(value, str) if encoding == "str" else isinstance(value, (list, type(None)))
        if not fits:
            allowed = "text" if encoding == "str" else "a list or null"
            raise ShardError(f"sample: column {name!r} holds {type(value).__name__}, allowed is {allowed}; {_REMEDY}")
    docids, grades = sample["docids"], sample["grades"]
    return Record(
        id=sample["id"],
        system=sample["system"],
        user=sample["user"],
        response=sample["response"],
        qid=sample["qid"] or None,
        docids=None if docids is None else tuple(docids),
        grades=None if grades is None else tuple(grades),
    )


def _shard(entry: Any, where: str) -> Shard:
    if not isinstance(entry, dict):
        raise ShardError(f"{where}: found {type(entry).__name__}, allowed is an object; {_REMEDY}")
    if entry.get("version") != 2 or entry.get("format") != "mds":
        found = f"version {entry.get('version')!r}, format {entry.get('format')!r}"
        raise ShardError(f"{where}: found {found}, allowed is version 2, format 'mds'; {_REMEDY}")
    num_samples = _count(entry.get("samples"), f"{where}.samples")
    names, encodings = entry.get("column_names", ()), entry.get("column_encodings", ())
    are_lists = isinstance(names, list) and isinstance(encodings, list)
    if not are_lists or [*zip(names, encodings)] != sorted(COLUMNS.items()):
        told = ", ".join(f"{name} ({encoding})" for name, encoding in sorted(COLUMNS.items()))
        raise ShardError(f"{where}: found the columns {names!r} of {encodings!r}, allowed are {told}; {_REMEDY}")
    if entry.get("column_sizes") != [None] * len(COLUMNS):
        raise ShardError(
            f"{where}: found the column sizes {entry.get('column_sizes')!r}, allowed is null each; {_REMEDY}"
        )
    packed, compression = entry.get("zip_data"), entry.get("compression")
    if (packed is None) != (compression is None) or not isinstance(compression, (str, type(None))):
        raise ShardError(f"{where}: compression {compression!r} and its file do not go together; {_REMEDY}")
    return Shard(
        num_samples=num_samples,
        raw=_file(entry.get("raw_data"), f"{where}.raw_data"),
        packed=None if packed is None else _file(packed, f"{where}.zip_data"),
        compression=compression,
        entry=entry,
    )


def _file(info: Any, where: str) -> ShardFile:
    if not isinstance(info, dict) or not isinstance(info.get("hashes"), dict):
        raise ShardError(
            f"{where}: found {info!r:.80}, allowed is an object with basename, bytes and hashes; {_REMEDY}"
        )
    basename = str(check_basename(info.get("basename"), f"{where}.basename"))
    for algorithm, value in info["hashes"].items():
        if not isinstance(value, str) or not value:
            raise ShardError(f"{where}.hashes: found {value!r} as {algorithm}, allowed is text; {_REMEDY}")
    return ShardFile(basename, _count(info.get("bytes"), f"{where}.bytes"), dict(info["hashes"]))


def _count(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ShardError(f"{where}: found {value!r}, allowed is a whole number of 1 or more; {_REMEDY}")
    return value
