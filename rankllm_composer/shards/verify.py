"""Looking at a set of shards: is every file there and what the index says it is, and what does the set hold."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rankllm_composer.errors import RecordError, ShardError
from rankllm_composer.prompts.record import validate_record
from rankllm_composer.shards.index import (
    COLUMNS,
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    Shard,
    ShardFile,
    digest,
    parse_index,
    parse_manifest,
    read_index,
    record_from_sample,
)
from rankllm_composer.storage.object_store import Folder, open_folder

MAX_NAMED = 5


@dataclass
class VerifyReport:
    """Outcome of `verify_shards`.

    Attributes:
        target: the set, without credentials.
        problems: what is wrong, one a line; empty = all is well.
        num_shards, num_records: what was looked at.
        num_duplicates: records whose id came before (counted with `records` only; no problem by itself).
        duplicate_ids: the first few of them.
    """

    target: str
    problems: list[str] = field(default_factory=list)
    num_shards: int = 0
    num_records: int = 0
    num_duplicates: int = 0
    duplicate_ids: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ShardsInfo:
    """What a set says about itself, without reading its shards.

    Attributes:
        target: the set, without credentials.
        num_records, num_shards: counts of the index.
        num_bytes, num_raw_bytes: bytes stored, and unpacked.
        columns: encoding of each column.
        compression, hashes: how the shards were written.
        manifest: content of `build.json`; None if there is none.
    """

    target: str
    num_records: int
    num_shards: int
    num_bytes: int
    num_raw_bytes: int
    columns: dict[str, str]
    compression: str | None
    hashes: tuple[str, ...]
    manifest: Manifest | None

    def lines(self) -> Iterator[str]:
        """The same for people."""
        yield f"{self.target}"
        yield f"records       {self.num_records:,} in {self.num_shards:,} shards"
        unpacked = f" ({self.num_raw_bytes / 2**20:,.1f} MiB unpacked)"
        yield f"bytes         {self.num_bytes / 2**20:,.1f} MiB{unpacked}"
        yield f"compression   {self.compression or 'none'}; hashes {', '.join(self.hashes) or 'none'}"
        yield "columns       " + ", ".join(f"{name} ({encoding})" for name, encoding in self.columns.items())
        if self.manifest is None:
            yield f"source        not known: there is no {MANIFEST_NAME}"
            return
        source, tally = self.manifest.source, self.manifest.tally
        files = ", ".join(str(file.get("name")) for file in source.get("files", ()) if isinstance(file, dict))
        yield f"source        {source.get('name') or files} ({source.get('kind')})"
        if self.manifest.part or self.manifest.num_parts:
            yield f"parts         {self.manifest.part or f'merged from {self.manifest.num_parts}'}"
        yield f"left out      {tally.num_quarantined:,} bad, {sum(tally.dropped.values()):,} dropped"
        yield f"repeated ids  {tally.num_duplicates:,}"
        yield f"wording       {tally.num_other_wordings:,} prompts in another wording than the client's"
        yield "candidates    " + ", ".join(f"{size}: {tally.candidates[size]:,}" for size in sorted(tally.candidates))
        told = ", ".join(f"{share:.0%} ≤ {size:,}" for share, size in self.prompt_quantiles())
        yield f"prompt chars  {told}"

    def prompt_quantiles(self) -> list[tuple[float, int]]:
        """(share of lists, characters that their user turns stay within), to 1,000 characters."""
        counts = self.manifest.tally.prompt_chars if self.manifest else Counter[int]()
        total, quantiles = sum(counts.values()), []
        for share in (0.5, 0.95, 1.0):
            seen = 0
            for size in sorted(counts):
                seen += counts[size]
                if seen >= share * total:
                    quantiles.append((share, size))
                    break
        return quantiles


def shards_info(target: str | Path) -> ShardsInfo:
    """What a set says about itself: counts, bytes, columns, source, histograms.

    Args:
        target: folder or object-store URL of the set.
    Raises:
        ShardError: there is no index, or it is damaged.
        StoreError: the object store cannot be reached.
    """
    folder = open_folder(target)
    shards, _ = _index(folder)
    manifest_text = folder.read(MANIFEST_NAME)
    manifest = None if manifest_text is None else parse_manifest(manifest_text, f"{folder.name}/{MANIFEST_NAME}")
    return ShardsInfo(
        target=folder.name,
        num_records=sum(shard.num_samples for shard in shards),
        num_shards=len(shards),
        num_bytes=sum(shard.published.num_bytes for shard in shards),
        num_raw_bytes=sum(shard.raw.num_bytes for shard in shards),
        columns=dict(COLUMNS),
        compression=shards[0].compression if shards else None,
        hashes=tuple(sorted(shards[0].published.hashes)) if shards else (),
        manifest=manifest,
    )


def verify_shards(target: str | Path, *, records: bool = False, report: Callable[[str], None] = print) -> VerifyReport:
    """Check every shard of a set against its index: presence, size, hashes, layout; with `records`, every record too.

    Args:
        target: folder or object-store URL of the set; of a URL one shard at a time is fetched.
        records: decode and validate every record, and look for repeated ids.
        report: takes a line for every problem.
    Returns:
        VerifyReport; its `problems` are empty if all is well.
    Raises:
        ShardError: there is no index, or it is damaged or points out of the set.
        StoreError: the object store cannot be reached.
    """
    folder = open_folder(target)
    shards, index_text = _index(folder)
    outcome = VerifyReport(folder.name)

    def problem(text: str) -> None:
        outcome.problems.append(f"{folder.name}/{text}")
        report(outcome.problems[-1])

    _check_manifest(folder, shards, index_text, problem)
    seen: set[int] = set()
    for shard in shards:
        outcome.num_shards += 1
        with tempfile.TemporaryDirectory() as scratch:
            raw = _unpack(folder, shard, Path(scratch), problem)
        if raw is None:
            continue
        samples = _samples(raw, shard, problem)
        outcome.num_records += len(samples)
        if records:
            _check_records(samples, shard, problem, seen, outcome)
    return outcome


def _index(folder: Folder) -> tuple[tuple[Shard, ...], bytes]:
    text = folder.read(INDEX_NAME)
    if text is None:
        return read_index(Path(folder.name, INDEX_NAME)), b""  # raises: says what a missing index means
    return parse_index(text, f"{folder.name}/{INDEX_NAME}"), text


def _check_manifest(
    folder: Folder, shards: tuple[Shard, ...], index_text: bytes, problem: Callable[[str], None]
) -> None:
    text = folder.read(MANIFEST_NAME)
    if not shards:
        problem(f"{INDEX_NAME}: lists no shard; build the set again")
    if text is None:
        return
    try:
        manifest = parse_manifest(text, MANIFEST_NAME)
    except ShardError as error:
        problem(str(error))
        return
    num_records = sum(shard.num_samples for shard in shards)
    if manifest.tally.num_records != num_records:
        told = f"says {manifest.tally.num_records:,} records, {INDEX_NAME} says {num_records:,}"
        problem(f"{MANIFEST_NAME}: {told}; build the set again")
    elif manifest.index_sha256 != digest(index_text):
        problem(f"{MANIFEST_NAME}: belongs to another {INDEX_NAME}; build the set again")


def _unpack(folder: Folder, shard: Shard, scratch: Path, problem: Callable[[str], None]) -> bytes | None:
    """Unpacked content of a shard whose files are what the index says; None if they are not."""
    from streaming.base.compression import decompress

    path = folder.fetch(shard.published.basename, scratch)
    data = _checked(path, shard.published, problem)
    if data is None:
        return None
    if shard.packed is None:
        return data
    # Streaming unpacks a local set in place, and from then on reads the unpacked file and no other.
    unpacked = path.with_name(Path(shard.raw.basename).name)
    if unpacked.exists() and _checked(unpacked, shard.raw, problem) is None:
        return None
    try:
        raw = decompress(shard.compression, data)
    except Exception as error:  # every codec has its own errors
        problem(f"{shard.packed.basename}: cannot be unpacked: {error}; fetch or build it again")
        return None
    return raw if _matches(raw, shard.raw, problem) else None


def _checked(path: Path, file: ShardFile, problem: Callable[[str], None]) -> bytes | None:
    try:
        size = path.stat().st_size
        if size != file.num_bytes:
            problem(f"{file.basename}: has {size:,} bytes, the index says {file.num_bytes:,}; fetch or build it again")
            return None
        data = path.read_bytes()
    except FileNotFoundError:
        problem(f"{file.basename}: is missing; fetch or build it again")
        return None
    except OSError as error:
        problem(f"{file.basename}: cannot be read: {error.strerror}; check the rights")
        return None
    return data if _matches(data, file, problem) else None


def _matches(data: bytes, file: ShardFile, problem: Callable[[str], None]) -> bool:
    from streaming.base.hashing import get_hash, is_hash

    if len(data) != file.num_bytes:
        problem(f"{file.basename}: has {len(data):,} bytes, the index says {file.num_bytes:,}; fetch or build it again")
        return False
    known = [algorithm for algorithm in file.hashes if is_hash(algorithm)]
    if not known:
        problem(f"{file.basename}: the index has no hash of it that is known here; build the set again")
        return False
    for algorithm in known:
        if get_hash(algorithm, data) != file.hashes[algorithm]:
            problem(f"{file.basename}: is corrupt, its {algorithm} is not that of the index; fetch or build it again")
            return False
    return True


def _samples(raw: bytes, shard: Shard, problem: Callable[[str], None]) -> list[bytes]:
    """Encoded samples of a shard, by the table at its head: how many, then where each begins and the last ends."""
    name = shard.raw.basename
    found = int(np.frombuffer(raw[:4], np.uint32)[0]) if len(raw) >= 4 else 0
    if found != shard.num_samples or len(raw) < 4 * (shard.num_samples + 2):
        problem(f"{name}: holds {found:,} samples, the index says {shard.num_samples:,}; build the set again")
        return []
    bounds = np.frombuffer(raw, np.uint32, shard.num_samples + 1, offset=4).astype(np.int64)
    if bounds[0] < 4 * (shard.num_samples + 2) or bounds[-1] != len(raw) or (np.diff(bounds) <= 0).any():
        problem(f"{name}: its table of samples is damaged; build the set again")
        return []
    return [raw[begin:end] for begin, end in pairwise(bounds)]


def _check_records(
    samples: list[bytes], shard: Shard, problem: Callable[[str], None], seen: set[int], outcome: VerifyReport
) -> None:
    from streaming.base.format import reader_from_json

    reader: Any = reader_from_json("", None, shard.entry)
    for number, data in enumerate(samples):
        place = f"{shard.raw.basename}:sample {number}"
        try:
            record = record_from_sample(reader.decode_sample(data))
            validate_record(record, place)
        except (RecordError, ShardError) as error:
            problem(str(error) if isinstance(error, RecordError) else f"{place}: {error}")
            continue
        except (ValueError, IndexError, KeyError, RecursionError) as error:
            problem(f"{place}: cannot be decoded: {error}; build the set again")
            continue
        key = int.from_bytes(hashlib.blake2b(record.id.encode("utf-8"), digest_size=8).digest(), "little")
        if key in seen:
            outcome.num_duplicates += 1
            if len(outcome.duplicate_ids) < MAX_NAMED:
                outcome.duplicate_ids.append(record.id)
        seen.add(key)
