"""The index of a set of shards (`index.json`), and the columns of a sample.

An index may come from elsewhere (a download, another machine), so every entry is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rankllm_composer.errors import ShardError
from rankllm_composer.prompts.record import Record

INDEX_NAME = "index.json"
MAX_SHARD_BYTES = 1 << 32  # a shard counts its bytes in 32 bits
COLUMNS: dict[str, str] = {
    "id": "str",
    "qid": "str",
    "system": "str",
    "user": "str",
    "response": "str",
    "docids": "json",
    "grades": "json",
    "scores": "json",
    "ordered_by": "str",
}
_OLDER = {"scores": None, "ordered_by": "answer"}  # of sets without these columns
_LAYOUTS = [sorted((name, COLUMNS[name]) for name in names) for names in (COLUMNS, COLUMNS.keys() - _OLDER.keys())]
REMEDY = "Fetch it again, or rebuild the set with rankllm-composer shards build."


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A file as the index describes it: path inside the set, size, hashes by algorithm."""

    basename: str
    num_bytes: int
    hashes: dict[str, str]


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of an index: its uncompressed and, in a compressed set, its compressed file, and its index entry."""

    num_samples: int
    raw: ShardFile
    packed: ShardFile | None
    compression: str | None
    entry: dict[str, Any]

    @property
    def published(self) -> ShardFile:
        """The stored file: the compressed one if there is one."""
        return self.packed or self.raw


def read_index(path: Path) -> tuple[Shard, ...]:
    """Read and check an `index.json`, as `parse_index` does."""
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise missing_index(path) from error
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror}). Check its path and permissions.") from error
    return parse_index(text, str(path))


def missing_index(path: str | Path) -> ShardError:
    """The error for a set without an index."""
    remedy = "Build it with rankllm-composer shards build, or merge its parts with rankllm-composer shards merge."
    return ShardError(f"{path}: there is no index, so the set is incomplete. {remedy}")


def parse_index(text: bytes | str, where: str) -> tuple[Shard, ...]:
    """Check an index and return its shards; raise ShardError, which names `where` it is, if an entry is damaged."""
    index = parse_json(text, where)
    if not isinstance(index, dict) or not isinstance(index.get("shards"), list):
        raise ShardError(f"{where}: damaged, there is no list under 'shards'. {REMEDY}")
    if index.get("version") != 2:
        raise ShardError(f"{where}: version is {index.get('version')!r}; expected 2. {REMEDY}")
    shards = tuple(_shard(entry, f"{where}:shards[{i}]") for i, entry in enumerate(index["shards"]))
    names: set[str] = set()
    for name in (file.basename for shard in shards for file in (shard.raw, shard.packed) if file is not None):
        if name in names:
            raise ShardError(f"{where}: {name!r} is listed twice. {REMEDY}")
        names.add(name)
    return shards


def parse_json(text: bytes | str, where: str) -> Any:
    """Parse a JSON file of a set; raise ShardError if it is damaged."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{where}: damaged, invalid JSON ({error}). {REMEDY}") from error


def dump_index(entries: list[dict[str, Any]]) -> str:
    """Text of the `index.json` of these shard entries."""
    return json.dumps({"version": 2, "shards": entries}, sort_keys=True)


def index_digest(index_text: str | bytes) -> str:
    """SHA-256 of an `index.json`; the set's `build.json` records which index it belongs to."""
    return hashlib.sha256(index_text.encode("utf-8") if isinstance(index_text, str) else index_text).hexdigest()


def sample_from_record(record: Record) -> dict[str, Any]:
    """The columns of a record."""
    values = {name: getattr(record, name) for name in COLUMNS} | {"qid": record.qid or ""}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def record_from_sample(sample: Mapping[str, Any]) -> Record:
    """The record of a sample; raise ShardError if a column is missing or has another type."""
    sample = _OLDER | dict(sample)
    for name, encoding in COLUMNS.items():
        value = sample.get(name)
        is_valid = isinstance(value, str) if encoding == "str" else isinstance(value, (list, type(None)))
        if not is_valid:
            expected = "text" if encoding == "str" else "a list or null"
            raise ShardError(f"sample: column {name!r} is {type(value).__name__}; expected {expected}. {REMEDY}")
    values: dict[str, Any] = {name: sample[name] for name in COLUMNS} | {"qid": sample["qid"] or None}
    values |= {name: tuple(values[name]) for name in ("docids", "grades", "scores") if values[name] is not None}
    return Record(**values)


def _shard(entry: Any, where: str) -> Shard:
    if not isinstance(entry, dict):
        raise ShardError(f"{where}: the entry is {type(entry).__name__}; expected an object. {REMEDY}")
    if entry.get("version") != 2 or entry.get("format") != "mds":
        found = f"version is {entry.get('version')!r} and format {entry.get('format')!r}"
        raise ShardError(f"{where}: {found}; expected version 2 and format 'mds'. {REMEDY}")
    num_samples = _count(entry.get("samples"), f"{where}.samples")
    names, encodings = entry.get("column_names", ()), entry.get("column_encodings", ())
    are_lists = isinstance(names, list) and isinstance(encodings, list)
    columns = [*zip(names, encodings)] if are_lists else []
    if columns not in _LAYOUTS:
        expected = ", ".join(f"{name} ({encoding})" for name, encoding in _LAYOUTS[0])
        raise ShardError(f"{where}: columns are {names!r}, encoded as {encodings!r}; expected {expected}. {REMEDY}")
    if entry.get("column_sizes") != [None] * len(columns):
        raise ShardError(f"{where}: column sizes are {entry.get('column_sizes')!r}; expected nulls. {REMEDY}")
    packed, compression = entry.get("zip_data"), entry.get("compression")
    if (packed is None) != (compression is None) or not isinstance(compression, (str, type(None))):
        raise ShardError(f"{where}: compression {compression!r} does not match its file. {REMEDY}")
    raw_file = _file(entry.get("raw_data"), f"{where}.raw_data")
    if raw_file.num_bytes >= MAX_SHARD_BYTES:
        raise ShardError(f"{where}.raw_data.bytes: is {raw_file.num_bytes:,}; expected less than 4 GiB. {REMEDY}")
    packed_file = None if packed is None else _file(packed, f"{where}.zip_data")
    return Shard(num_samples, raw_file, packed_file, compression, entry)


def _file(info: Any, where: str) -> ShardFile:
    if not isinstance(info, dict) or not isinstance(info.get("hashes"), dict):
        raise ShardError(f"{where}: is {info!r:.80}; expected an object with basename, bytes and hashes. {REMEDY}")
    basename = info.get("basename")
    path = PurePosixPath(basename) if isinstance(basename, str) else PurePosixPath()
    leaves = path.is_absolute() or ".." in path.parts or any(char in str(path) for char in ("\\", ":", "\0"))
    if leaves or not path.parts or str(path) != basename:
        raise ShardError(f"{where}.basename: the path {basename!r} is not inside the set. Do not use this index.")
    for algorithm, value in info["hashes"].items():
        if not isinstance(value, str) or not value:
            raise ShardError(f"{where}.hashes: {algorithm} is {value!r}; expected text. {REMEDY}")
    return ShardFile(str(path), _count(info.get("bytes"), f"{where}.bytes"), dict(info["hashes"]))


def _count(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ShardError(f"{where}: is {value!r}; expected an integer of at least 1. {REMEDY}")
    return value
