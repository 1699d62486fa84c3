"""The build manifest of a set of shards (`build.json`): what it was built from, how, and what was counted."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from rankllm_composer import __version__
from rankllm_composer.errors import ShardError
from rankllm_composer.prompts.record import Record
from rankllm_composer.shards.index import REMEDY, Shard, parse_json

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
    `dropped` counts lists and queries by the reason why the source leaves them out, `candidates` lists by their number
    of candidates, `prompt_chars` lists by the length of their user turn, rounded up to 1,000 characters.
    """

    num_records: int = 0
    num_quarantined: int = 0
    num_duplicates: int = 0
    num_nonstandard_prompts: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    candidates: Counter[int] = field(default_factory=Counter)
    prompt_chars: Counter[int] = field(default_factory=Counter)

    def count_record(self, record: Record) -> None:
        """Count one list."""
        self.num_records += 1
        self.num_nonstandard_prompts += not record.has_standard_prompt
        self.candidates[len(record.turn.passages)] += 1
        self.prompt_chars[-(-len(record.user) // _BUCKET_CHARS) * _BUCKET_CHARS] += 1

    def add(self, other: BuildStats) -> None:
        """Add the counts of another piece."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))

    def to_json(self) -> dict[str, Any]:
        """The counts as `build.json` contains them."""
        counts: dict[str, Any] = {key: getattr(self, name) for name, key in _KEYS.items()}
        for name in ("dropped", "candidates", "prompt_chars"):
            counts[name] = {str(key): number for key, number in sorted(getattr(self, name).items())}
        return counts

    @classmethod
    def from_json(cls, counts: Any, where: str) -> BuildStats:
        """Inverse of `to_json`; raise ShardError if a count is missing or not a number."""
        counts = {"other_wordings": 0, **counts}  # older sets lack it
        try:
            return cls(
                **{name: int(counts[key]) for name, key in _KEYS.items()},
                dropped=Counter({str(reason): int(number) for reason, number in counts["dropped"].items()}),
                candidates=Counter({int(size): int(number) for size, number in counts["candidates"].items()}),
                prompt_chars=Counter({int(size): int(number) for size, number in counts["prompt_chars"].items()}),
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
