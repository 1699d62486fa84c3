"""The build manifest of a set of shards (`build.json`): what it was built from, how, and what was counted."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from rankllm_composer import __version__
from rankllm_composer.errors import ShardError, StoreError
from rankllm_composer.prompts.permutations import identifier_style
from rankllm_composer.prompts.record import Record
from rankllm_composer.prompts.relevance import count_pairs
from rankllm_composer.screen import get_logger
from rankllm_composer.shards.index import (
    INDEX_NAME,
    REMEDY,
    Shard,
    index_digest,
    missing_index,
    parse_index,
    parse_json,
)
from rankllm_composer.storage.object_store import Folder, LocalFolder

log = get_logger(__name__)

MANIFEST_NAME = "build.json"
QUARANTINE_NAME = "quarantine.jsonl"
IDS_NAME = "ids.bin"  # of a part: 64-bit hashes of its record ids, so that a merge can count duplicates
_BUCKET_CHARS = 1000
_KEYS = {
    "num_records": "records",
    "num_quarantined": "quarantined",
    "num_duplicates": "duplicate_ids",
    "num_nonstandard_prompts": "other_wordings",
}
"""Names of counts in `build.json`."""


@dataclass
class BuildStats:
    """Counts of a build, or of a piece of it.

    Records with a duplicate id and nonstandard prompts (which the inference client would write differently) are kept.
    `dropped` counts lists and queries by the reason why the source leaves them out, `noted` those that are kept by what
    there is to know about them, `candidates` lists by their number of candidates, `numbered` those of them whose
    identifiers are numbers (None in sets of versions that did not count them), `prompt_chars` lists by the length of
    their user turn, rounded up to 1,000 characters, and `pairs` their pairs of candidates, see `count_pairs` (none in
    sets of versions that did not count them).
    """

    num_records: int = 0
    num_quarantined: int = 0
    num_duplicates: int = 0
    num_nonstandard_prompts: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    candidates: Counter[int] = field(default_factory=Counter)
    numbered: Counter[int] | None = field(default_factory=Counter)
    prompt_chars: Counter[int] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)

    def count_record(self, record: Record) -> None:
        """Count one list."""
        self.num_records += 1
        self.num_nonstandard_prompts += not (record.has_standard_prompt or record.turn.has_several_readings)
        self.candidates[len(record.turn.passages)] += 1
        if self.numbered is not None and identifier_style(record.response) == "numbers":
            self.numbered[len(record.turn.passages)] += 1
        self.prompt_chars[-(-len(record.user) // _BUCKET_CHARS) * _BUCKET_CHARS] += 1
        self.pairs += count_pairs(record)

    def add(self, other: BuildStats) -> None:
        """Add the counts of another piece."""
        for item in fields(self):
            ours, theirs = getattr(self, item.name), getattr(other, item.name)
            setattr(self, item.name, None if ours is None or theirs is None else ours + theirs)

    def to_json(self) -> dict[str, Any]:
        """The counts as `build.json` contains them."""
        counts: dict[str, Any] = {key: getattr(self, name) for name, key in _KEYS.items()}
        for name in ("dropped", "noted", "candidates", "numbered", "prompt_chars", "pairs"):
            if getattr(self, name) is not None:
                counts[name] = {str(key): number for key, number in sorted(getattr(self, name).items())}
        return counts

    @classmethod
    def from_json(cls, counts: Any, where: str) -> BuildStats:
        """Inverse of `to_json`; raise ShardError if a count is missing or not a number."""
        counts = {"other_wordings": 0, "numbered": None, "noted": {}, "pairs": {}, **counts}  # older sets lack them

        def by_size(key: str) -> Counter[int]:
            return Counter({int(size): int(number) for size, number in counts[key].items()})

        try:
            return cls(
                **{name: int(counts[key]) for name, key in _KEYS.items()},
                dropped=Counter({str(reason): int(number) for reason, number in counts["dropped"].items()}),
                noted=Counter({str(what): int(number) for what, number in counts["noted"].items()}),
                candidates=by_size("candidates"),
                numbered=None if counts["numbered"] is None else by_size("numbered"),
                prompt_chars=by_size("prompt_chars"),
                pairs=Counter({str(kind): int(number) for kind, number in counts["pairs"].items()}),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ShardError(f"{where}: damaged, its counts cannot be read ({error!r}). {REMEDY}") from error


@dataclass(frozen=True)
class Manifest:
    """Content of a `build.json`.

    `part` is "I/N" for one of N parts, and None for a complete set; `num_parts` is the number of parts that the set was
    merged from, 0 if it was built at once.
    """

    source: dict[str, Any]
    options: dict[str, Any]
    part: str | None = None
    num_parts: int = 0
    stats: BuildStats = field(default_factory=BuildStats)
    index_sha256: str = ""
    version: str = __version__

    def same_build(self, other: Manifest) -> bool:
        """True if both describe the same source and options, whatever was counted."""
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
            "counts": self.stats.to_json(),
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def parse_manifest(text: bytes | str, where: str) -> Manifest:
    """Inverse of `Manifest.to_text`; raise ShardError if the text is damaged."""
    content = parse_json(text, where)
    types = {
        "source": dict,
        "options": dict,
        "part": (str, type(None)),
        "num_parts": int,
        "index_sha256": str,
        "version": str,
        "counts": dict,
    }
    if not isinstance(content, dict):
        raise ShardError(f"{where}: damaged, it is not an object. {REMEDY}")
    for name, kind in types.items():
        if not isinstance(content.get(name), kind):  # type: ignore[arg-type]
            raise ShardError(f"{where}: damaged, {name!r} is {content.get(name)!r:.60}. {REMEDY}")
    known: dict[str, Any] = {name: content.get(name) for name in types if name != "counts"}
    return Manifest(**known, stats=BuildStats.from_json(content["counts"], where))


def read_set(folder: Folder) -> tuple[tuple[Shard, ...], Manifest | None]:
    """Read index and manifest of a set, and check that they belong together; a store is asked a second time.

    Returns:
        The shards, and the manifest if there is one.
    Raises:
        ShardError: there is no index, a file is damaged, or the manifest belongs to another index.
        StoreError: the files cannot be read.
    """
    for is_last in (False, True):
        index_text = folder.read(INDEX_NAME)
        if index_text is None:
            raise missing_index(f"{folder.name}/{INDEX_NAME}")
        text = _read_manifest(folder)
        try:
            shards = parse_index(index_text, f"{folder.name}/{INDEX_NAME}")
            manifest = None if text is None else parse_manifest(text, f"{folder.name}/{MANIFEST_NAME}")
            if manifest is not None and manifest.index_sha256 != index_digest(index_text):
                found = f"belongs to another {INDEX_NAME} than the one beside it"
                raise ShardError(f"{folder.name}/{MANIFEST_NAME}: {found}. {REMEDY}")
        except ShardError as error:
            if isinstance(folder, LocalFolder) or is_last:
                raise
            log.warning("%s; fetching it again", error)
        else:
            return shards, manifest
    raise AssertionError("unreachable")


def _read_manifest(folder: Folder) -> bytes | None:
    try:
        return folder.read(MANIFEST_NAME)
    except StoreError as error:  # S3 refuses a missing file if its folder may not be listed
        log.warning("%s", error)
        return None


@dataclass(frozen=True)
class BuildReport:
    """Outcome of a build or merge.

    Attributes:
        output: path or URL of the set, without credentials.
        num_bytes: bytes of the stored shard files.
        stats: counts of records, bad records, duplicates, nonstandard prompts, dropped lists, candidates.
        existed: True if the same set existed and nothing was done.
    """

    output: str
    num_shards: int
    num_bytes: int
    seconds: float
    stats: BuildStats
    existed: bool = False

    @classmethod
    def of(
        cls, output: str, shards: tuple[Shard, ...], stats: BuildStats, seconds: float, existed: bool = False
    ) -> BuildReport:
        """Report on a set by its index."""
        num_bytes = sum(shard.published.num_bytes for shard in shards)
        return cls(output, len(shards), num_bytes, seconds, stats, existed)
