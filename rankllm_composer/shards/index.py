"""What a set of shards says about itself: `index.json`, and the columns of a sample.

An index comes from outside (a download, another machine), so nothing in it is believed before it is checked.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from rankllm_composer import __version__
from rankllm_composer.errors import ShardError
from rankllm_composer.prompts.record import Record

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


MANIFEST_NAME = "build.json"


QUARANTINE_NAME = "quarantine.jsonl"


IDS_NAME = "ids.bin"  # of a part: 64-bit hashes of its record ids, so that a merge can count repeats


_BUCKET_CHARS = 1000


_MANIFEST_REMEDY = "fetch it again, or build the set again (rankllm-composer shards build)"


@dataclass
class Tally:
    """What was counted while a set, or a piece of it, was built.

    Attributes:
        num_records: lists in the shards.
        num_quarantined: bad records written aside.
        num_duplicates: records whose id came before; they are kept.
        num_other_wordings: lists whose user turn only `read_user_turn` reads, not `parse_user_turn`; they are kept.
        dropped: lists and queries left out by the rules of the source, by reason.
        candidates: number of lists by their number of candidates.
        prompt_chars: number of lists by the length of their user turn, in steps of 1,000 characters, rounded up.
    """

    num_records: int = 0
    num_quarantined: int = 0
    num_duplicates: int = 0
    num_other_wordings: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    candidates: Counter[int] = field(default_factory=Counter)
    prompt_chars: Counter[int] = field(default_factory=Counter)

    def count_record(self, num_candidates: int, num_chars: int, *, other_wording: bool) -> None:
        """Count one list."""
        self.num_records += 1
        self.num_other_wordings += other_wording
        self.candidates[num_candidates] += 1
        self.prompt_chars[-(-num_chars // _BUCKET_CHARS) * _BUCKET_CHARS] += 1

    def add(self, other: Tally) -> None:
        """Take in the counts of another piece."""
        self.num_records += other.num_records
        self.num_quarantined += other.num_quarantined
        self.num_duplicates += other.num_duplicates
        self.num_other_wordings += other.num_other_wordings
        self.dropped.update(other.dropped)
        self.candidates.update(other.candidates)
        self.prompt_chars.update(other.prompt_chars)

    def to_json(self) -> dict[str, Any]:
        """As `build.json` holds it."""
        return {
            "records": self.num_records,
            "quarantined": self.num_quarantined,
            "duplicate_ids": self.num_duplicates,
            "other_wordings": self.num_other_wordings,
            "dropped": dict(sorted(self.dropped.items())),
            "candidates": {str(number): self.candidates[number] for number in sorted(self.candidates)},
            "prompt_chars": {str(number): self.prompt_chars[number] for number in sorted(self.prompt_chars)},
        }

    @classmethod
    def from_json(cls, counts: Any, where: str) -> Tally:
        """Inverse of `to_json`.

        Raises:
            ShardError: something is missing or no number.
        """
        try:
            return cls(
                num_records=int(counts["records"]),
                num_quarantined=int(counts["quarantined"]),
                num_duplicates=int(counts["duplicate_ids"]),
                num_other_wordings=int(counts.get("other_wordings", 0)),  # an older set took none
                dropped=Counter({str(reason): int(number) for reason, number in counts["dropped"].items()}),
                candidates=Counter({int(size): int(number) for size, number in counts["candidates"].items()}),
                prompt_chars=Counter({int(size): int(number) for size, number in counts["prompt_chars"].items()}),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ShardError(f"{where}: damaged, its counts cannot be read ({error!r}); {_MANIFEST_REMEDY}") from error


@dataclass(frozen=True)
class Manifest:
    """Content of a `build.json`.

    Attributes:
        source: what the source says of itself: names, sizes, hashes, options.
        options: how the shards were written.
        part: "I/N" if this is one of N parts; None for a whole set.
        num_parts: parts this set was merged from, 0 if it was built whole.
        tally: what was counted.
        index_sha256: of the `index.json` it belongs to.
        version: of this package.
    """

    source: dict[str, Any]
    options: dict[str, Any]
    part: str | None = None
    num_parts: int = 0
    tally: Tally = field(default_factory=Tally)
    index_sha256: str = ""
    version: str = __version__

    def is_of(self, other: Manifest) -> bool:
        """True if both describe the same build, whatever came out of it."""
        return (self.source, self.options, self.part) == (other.source, other.options, other.part)

    def to_text(self) -> str:
        """Text of the file."""
        content = {
            "package": "rankllm-composer",
            "version": self.version,
            "source": self.source,
            "options": self.options,
            "part": self.part,
            "num_parts": self.num_parts,
            "index_sha256": self.index_sha256,
            "counts": self.tally.to_json(),
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def parse_manifest(text: bytes | str, where: str) -> Manifest:
    """Inverse of `Manifest.to_text`.

    Raises:
        ShardError: the text is damaged.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{where}: damaged, no valid JSON ({error}); {_MANIFEST_REMEDY}") from error
    kinds = {"source": dict, "options": dict, "counts": dict, "num_parts": int, "version": str, "index_sha256": str}
    if not isinstance(content, dict):
        raise ShardError(f"{where}: damaged, it holds no object; {_MANIFEST_REMEDY}")
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            raise ShardError(f"{where}: damaged, found {content.get(name)!r:.60} under {name!r}; {_MANIFEST_REMEDY}")
    if not isinstance(content.get("part"), (str, type(None))):
        raise ShardError(f"{where}: damaged, found {content['part']!r:.60} under 'part'; {_MANIFEST_REMEDY}")
    return Manifest(
        source=content["source"],
        options=content["options"],
        part=content.get("part"),
        num_parts=content["num_parts"],
        tally=Tally.from_json(content["counts"], where),
        index_sha256=content["index_sha256"],
        version=content["version"],
    )


def digest(index_text: str | bytes) -> str:
    """SHA-256 of an `index.json`, which ties a `build.json` to it."""
    return hashlib.sha256(index_text.encode("utf-8") if isinstance(index_text, str) else index_text).hexdigest()


@dataclass(frozen=True)
class BuildReport:
    """What a build or merge left behind.

    Attributes:
        output: where the set is, without credentials.
        num_shards: shards in the index.
        num_bytes: bytes of the stored shard files.
        seconds: time it took.
        tally: records, bad ones, duplicates, other wordings, lists dropped, lists by number of candidates.
        was_there: True if the same set was there already and nothing was done.
    """

    output: str
    num_shards: int
    num_bytes: int
    seconds: float
    tally: Tally
    was_there: bool = False

    @classmethod
    def of(
        cls, output: str, shards: tuple[Shard, ...], tally: Tally, seconds: float, was_there: bool = False
    ) -> BuildReport:
        """Report on a set by its index."""
        num_bytes = sum(shard.published.num_bytes for shard in shards)
        return cls(output, len(shards), num_bytes, seconds, tally, was_there)
