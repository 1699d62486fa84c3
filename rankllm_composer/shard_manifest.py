"""`build.json`: what a set of shards was built from, how, and what was counted on the way."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rankllm_composer import __version__
from rankllm_composer.shard_index import Shard, ShardError

MANIFEST_NAME = "build.json"
QUARANTINE_NAME = "quarantine.jsonl"
IDS_NAME = "ids.bin"  # of a part: 64-bit hashes of its record ids, so that a merge can count repeats

_BUCKET_CHARS = 1000
_REMEDY = "fetch it again, or build the set again (rankllm-composer shards build)"


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
            raise ShardError(f"{where}: damaged, its counts cannot be read ({error!r}); {_REMEDY}") from error


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
        raise ShardError(f"{where}: damaged, no valid JSON ({error}); {_REMEDY}") from error
    kinds = {"source": dict, "options": dict, "counts": dict, "num_parts": int, "version": str, "index_sha256": str}
    if not isinstance(content, dict):
        raise ShardError(f"{where}: damaged, it holds no object; {_REMEDY}")
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            raise ShardError(f"{where}: damaged, found {content.get(name)!r:.60} under {name!r}; {_REMEDY}")
    if not isinstance(content.get("part"), (str, type(None))):
        raise ShardError(f"{where}: damaged, found {content['part']!r:.60} under 'part'; {_REMEDY}")
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
