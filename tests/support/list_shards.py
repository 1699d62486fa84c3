"""Small sets of shards, written with streaming or built from a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from streaming import MDSWriter

from rankllm_composer.options import BuildOptions, SourceOptions
from rankllm_composer.prompts.record import Record
from rankllm_composer.shards.build import build_shards
from rankllm_composer.shards.index import COLUMNS, dump_index, sample_from_record
from rankllm_composer.shards.manifest import BuildReport
from support.synthetic_records import conversation


def new_record(index: int, **options) -> Record:
    """Record `q<index>`, with document ids and grades."""
    layout = conversation(index, **options)
    num_candidates = layout["conversations"][2]["value"].count("[")
    return Record.from_conversations(
        {
            **layout,
            "docids": [f"d{index}-{place}" for place in range(num_candidates)],
            "grades": [place % 3 for place in range(num_candidates)],
        }
    )


def report_nothing(line: str) -> None:
    """Ignore a line of progress."""


def build_from_file(
    output: Path | str,
    source: Path | str,
    *,
    on_error: str = "stop",
    report: Callable[[str], None] = report_nothing,
    **options,
) -> BuildReport:
    """Build a set from a file of records in one process; `options` are those of `BuildOptions`."""
    build = BuildOptions(**({"num_processes": 1} | options))
    return build_shards(output, SourceOptions(input=source, on_error=on_error), build, report)


def write_shards(
    folder: Path | str,
    records: Iterable[int | Record],
    *,
    per_shard: int = 4,
    compression: str | None = "zstd",
    hashes: tuple[str, ...] = ("xxh64",),
    without: tuple[str, ...] = (),
) -> Path:
    """Write records, given as such or by number, to a new folder, `per_shard` records per shard, less some columns."""
    columns = {name: kind for name, kind in COLUMNS.items() if name not in without}
    records = [new_record(item) if isinstance(item, int) else item for item in records]
    for start in range(0, len(records), per_shard):
        part = Path(folder) / f"{start // per_shard:02}"
        with MDSWriter(out=str(part), columns=columns, compression=compression, hashes=list(hashes)) as writer:
            for record in records[start : start + per_shard]:
                sample = sample_from_record(record)
                writer.write({name: sample[name] for name in columns})
    merge_parts(Path(folder))
    return Path(folder)


def merge_parts(folder: Path) -> None:
    """Write one index over the parts of a folder."""
    entries = []
    for index in sorted(folder.glob("*/index.json")):
        for entry in json.loads(index.read_text())["shards"]:
            for file in filter(None, (entry["raw_data"], entry["zip_data"])):
                file["basename"] = f"{index.parent.name}/{file['basename']}"
            entries.append(entry)
        index.unlink()
    (folder / "index.json").write_text(dump_index(entries))


def damage(path: Path) -> None:
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
