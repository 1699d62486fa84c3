"""Verification and summary of a set of shards."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rankllm_composer.errors import RecordError, ShardError, counted
from rankllm_composer.prompts.record import id_digest, validate_record
from rankllm_composer.screen import counting, say
from rankllm_composer.shards.index import (
    COLUMNS,
    INDEX_NAME,
    Shard,
    ShardFile,
    index_digest,
    missing_index,
    parse_index,
    record_from_sample,
)
from rankllm_composer.shards.manifest import MANIFEST_NAME, Manifest, parse_manifest
from rankllm_composer.shards.unpack import difference, unpack
from rankllm_composer.storage.object_store import Folder, LocalFolder, open_folder
from rankllm_composer.storage.scratch import scratch_folder

MAX_LISTED = 5
_REFETCH = "Fetch or build it again."
_REBUILD = "Build the set again."


@dataclass
class VerifyReport:
    """Outcome of `verify_shards`; a set without `problems` is intact, even with duplicate ids (a few are listed)."""

    target: str
    problems: list[str] = field(default_factory=list)
    num_shards: int = 0
    num_records: int = 0
    num_duplicates: int = 0
    duplicate_ids: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ShardsInfo:
    """Summary of a set, whose name is without credentials; `manifest` is None if there is no `build.json`."""

    target: str
    shards: tuple[Shard, ...]
    manifest: Manifest | None

    @property
    def num_records(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    def lines(self) -> Iterator[str]:
        """Yield the summary as text."""
        yield self.target
        yield f"records       {self.num_records:,} in {counted(len(self.shards), 'shard')}"
        num_bytes = sum(shard.published.num_bytes for shard in self.shards)
        num_raw_bytes = sum(shard.raw.num_bytes for shard in self.shards)
        yield f"bytes         {num_bytes / 2**20:,.1f} MiB ({num_raw_bytes / 2**20:,.1f} MiB uncompressed)"
        first = self.shards[0] if self.shards else None
        hashes = ", ".join(sorted(first.published.hashes)) if first else ""
        yield f"compression   {(first and first.compression) or 'none'}; hashes {hashes or 'none'}"
        yield "columns       " + ", ".join(f"{name} ({encoding})" for name, encoding in COLUMNS.items())
        if self.manifest is None:
            yield f"source        unknown: there is no {MANIFEST_NAME}"
            return
        source, stats = self.manifest.source, self.manifest.stats
        files = ", ".join(str(file.get("name")) for file in source.get("files", ()) if isinstance(file, dict))
        yield f"source        {source.get('name') or files} ({source.get('kind')})"
        if self.manifest.part or self.manifest.num_parts:
            yield f"parts         {self.manifest.part or f'merged from {self.manifest.num_parts}'}"
        yield f"left out      {stats.num_quarantined:,} bad, {sum(stats.dropped.values()):,} dropped"
        yield f"duplicate ids {stats.num_duplicates:,}"
        nonstandard = f"{stats.num_nonstandard_prompts:,} nonstandard"
        yield f"prompts       {nonstandard}; the inference client would write them differently"
        yield "candidates    " + ", ".join(f"{size}: {stats.candidates[size]:,}" for size in sorted(stats.candidates))
        if total := stats.pairs.total():
            shares = {kind: f"{stats.pairs[kind] / total:.0%}" for kind in ("tied", "as_presented", "reversed")}
            yield (
                f"pairs         {shares['tied']} tied, {shares['as_presented']} presented with the better candidate "
                f"first, {shares['reversed']} last"
            )
        yield "prompt chars  " + ", ".join(f"{share:.0%} ≤ {size:,}" for share, size in _quantiles(stats.prompt_chars))


def _quantiles(counts: Mapping[int, int]) -> Iterator[tuple[float, int]]:
    """(share of lists, largest size among them), by the number of lists of each size."""
    sizes = sorted(counts)
    seen = list(accumulate(counts[size] for size in sizes))
    for share in (0.5, 0.95, 1.0) if sizes else ():
        yield share, sizes[bisect_left(seen, share * seen[-1])]


def shards_info(target: str | Path) -> ShardsInfo:
    """Summarize a set from its index and manifest; the errors are those of `verify_shards`."""
    folder = open_folder(target)
    shards, _ = _index(folder)
    manifest_text = folder.read(MANIFEST_NAME)
    manifest = None if manifest_text is None else parse_manifest(manifest_text, f"{folder.name}/{MANIFEST_NAME}")
    return ShardsInfo(folder.name, shards, manifest)


def verify_shards(target: str | Path, *, records: bool = False, report: Callable[[str], None] = say) -> VerifyReport:
    """Check every shard of a set against its index: presence, size, hashes, layout; with `records`, every record too.

    Args:
        target: folder or object-store URL of the set; shards at a URL are fetched one at a time.
        records: decode and validate every record, and look for duplicate ids.
        report: called with each problem.
    Raises:
        ShardError: there is no index, or it is damaged or names a path outside the set.
        StoreError: the object store cannot be reached.
    """
    folder = open_folder(target)
    shards, index_text = _index(folder)
    outcome = VerifyReport(folder.name)

    def problem(text: str) -> None:
        outcome.problems.append(f"{folder.name}/{text}")
        report(outcome.problems[-1])

    _check_manifest(folder, shards, index_text, problem)
    seen: set[bytes] = set()
    with counting(f"checking {folder.name}", "shards", total=len(shards)) as advance:
        for shard in shards:
            outcome.num_shards += 1
            with scratch_folder() as scratch:
                raw = _unpack(folder, shard, scratch, problem)
            if raw is not None:
                samples = _samples(raw, shard, problem)
                outcome.num_records += len(samples)
                if records:
                    _check_records(samples, shard, problem, seen, outcome)
            advance(1)
    return outcome


def _index(folder: Folder) -> tuple[tuple[Shard, ...], bytes]:
    text = folder.read(INDEX_NAME)
    if text is None:
        raise missing_index(f"{folder.name}/{INDEX_NAME}")
    return parse_index(text, f"{folder.name}/{INDEX_NAME}"), text


def _check_manifest(
    folder: Folder, shards: tuple[Shard, ...], index_text: bytes, problem: Callable[[str], None]
) -> None:
    text = folder.read(MANIFEST_NAME)
    if not shards:
        problem(f"{INDEX_NAME}: lists no shards. {_REBUILD}")
    if text is None:
        return
    try:
        manifest = parse_manifest(text, MANIFEST_NAME)
    except ShardError as error:
        problem(str(error))
        return
    num_records = sum(shard.num_samples for shard in shards)
    if manifest.stats.num_records != num_records:
        found = f"counts {manifest.stats.num_records:,} records, but {INDEX_NAME} {num_records:,}"
        problem(f"{MANIFEST_NAME}: {found}. {_REBUILD}")
    elif manifest.index_sha256 != index_digest(index_text):
        problem(f"{MANIFEST_NAME}: belongs to another {INDEX_NAME}. {_REBUILD}")


def _unpack(folder: Folder, shard: Shard, scratch: Path, problem: Callable[[str], None]) -> bytes | None:
    """Uncompressed content of a shard; None if its files do not match the index."""
    path = folder.fetch(shard.published.basename, scratch)
    if not isinstance(folder, LocalFolder) and _read(path, shard.published, lambda text: None) is None:
        path.unlink(missing_ok=True)  # damaged on the way, perhaps
        path = folder.fetch(shard.published.basename, scratch)
    data = _read(path, shard.published, problem)
    if data is None or shard.packed is None or shard.compression is None:
        return data
    # Streaming unpacks a local set in place, and from then on reads only the uncompressed file.
    unpacked = path.with_name(Path(shard.raw.basename).name)
    if unpacked.exists() and _read(unpacked, shard.raw, problem) is None:
        return None
    try:
        raw = unpack(data, shard.compression, shard.raw.num_bytes)
    except ValueError as error:
        problem(f"{shard.packed.basename}: {error}. {_REFETCH}")
        return None
    return raw if _matches(raw, shard.raw, problem) else None


def _read(path: Path, file: ShardFile, problem: Callable[[str], None]) -> bytes | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        problem(f"{file.basename}: is missing. {_REFETCH}")
        return None
    except OSError as error:
        problem(f"{file.basename}: cannot be read ({error.strerror}). Check its permissions.")
        return None
    return data if _matches(data, file, problem) else None


def _matches(data: bytes, file: ShardFile, problem: Callable[[str], None]) -> bool:
    from streaming.base.hashing import is_hash

    found = difference(data, file)
    if found is not None:
        problem(f"{file.basename}: {found}. {_REFETCH}")
    elif not any(map(is_hash, file.hashes)):
        problem(f"{file.basename}: the index has no hash of it with a known algorithm. {_REBUILD}")
        return False
    return found is None


def _samples(raw: bytes, shard: Shard, problem: Callable[[str], None]) -> list[bytes]:
    """Encoded samples of a shard, by the table at its start: their number, all starts, the last end."""
    name = shard.raw.basename
    num_samples = int(np.frombuffer(raw[:4], np.uint32)[0]) if len(raw) >= 4 else 0
    if num_samples != shard.num_samples or len(raw) < 4 * (shard.num_samples + 2):
        problem(f"{name}: contains {num_samples:,} samples; expected {shard.num_samples:,}. {_REBUILD}")
        return []
    bounds = np.frombuffer(raw, np.uint32, shard.num_samples + 1, offset=4).astype(np.int64)
    if bounds[0] < 4 * (shard.num_samples + 2) or bounds[-1] != len(raw) or (np.diff(bounds) <= 0).any():
        problem(f"{name}: its table of samples is damaged. {_REBUILD}")
        return []
    return [raw[begin:end] for begin, end in pairwise(bounds)]


def _check_records(
    samples: list[bytes], shard: Shard, problem: Callable[[str], None], seen: set[bytes], outcome: VerifyReport
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
            problem(f"{place}: cannot be decoded: {error}. {_REBUILD}")
            continue
        key = id_digest(record.id)
        if key in seen:
            outcome.num_duplicates += 1
            if len(outcome.duplicate_ids) < MAX_LISTED:
                outcome.duplicate_ids.append(record.id)
        seen.add(key)
