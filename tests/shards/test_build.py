"""A set of shards holds what the source holds, the same to the byte however it is built, and appears whole or not."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.list_shards import build_from_file, report_nothing
from support.synthetic_records import conversation, write_jsonl

from rankllm_composer.errors import RecordError, ShardError, SourceError
from rankllm_composer.options import SourceOptions
from rankllm_composer.prompts.record import Record
from rankllm_composer.shards.blocks import Block, BlockWriter, write_blocks
from rankllm_composer.shards.build import build_shards, index_exists
from rankllm_composer.shards.index import COLUMNS, read_index, record_from_sample, sample_from_record
from rankllm_composer.shards.publish import merge_shards, work_folder
from rankllm_composer.shards.verify import shards_info, verify_shards
from rankllm_composer.storage.object_store import LocalFolder

NUM_RECORDS = 60
SMALL = {"shard_bytes": 10_000}  # about 8 records a shard


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A file of 60 records of 2 to 6 candidates."""
    layouts = [conversation(i, num_candidates=2 + i % 5) for i in range(NUM_RECORDS)]
    layouts[3] |= {"qid": "17", "docids": list("abcde"), "grades": [0, 2, 0, 1, 0]}
    return write_jsonl(tmp_path_factory.mktemp("source") / "train.jsonl", layouts)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    """The set built of it in one process."""
    folder = tmp_path_factory.mktemp("sets") / "whole"
    build_from_file(folder, source, **SMALL)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records_of(folder: Path) -> list[Record]:
    """Records of a set in its order, read shard by shard with streaming's own reader."""
    from streaming.base.compression import decompress
    from streaming.base.format import reader_from_json

    records = []
    for shard in read_index(folder / "index.json"):
        raw = (folder / shard.published.basename).read_bytes()
        if shard.compression:
            raw = decompress(shard.compression, raw)
        unpacked = folder.parent / "unpacked.mds"
        unpacked.write_bytes(raw)
        entry = shard.entry | {"raw_data": shard.entry["raw_data"] | {"basename": unpacked.name}}
        records += map(record_from_sample, reader_from_json(str(unpacked.parent), None, entry))
        unpacked.unlink()
    return records


def expected_records(source: Path) -> list[Record]:
    return [Record.from_conversations(json.loads(line)) for line in source.read_text().splitlines()]


def test_streaming_reads_back_what_went_in(source, whole, tmp_path):
    from streaming import StreamingDataset

    folder = shutil.copytree(whole, tmp_path / "set")  # streaming unpacks a local set in place
    dataset = StreamingDataset(local=str(folder), batch_size=1, validate_hash="xxh64")
    assert [record_from_sample(dataset[i]) for i in range(len(dataset))] == expected_records(source)
    assert verify_shards(folder, records=True).problems == []
    next(folder.glob("shard.*.mds")).write_bytes(b"changed")
    assert len(verify_shards(folder, report=report_nothing).problems) == 1


def test_a_set_is_what_its_report_and_manifest_say(source, whole):
    info = shards_info(whole)
    assert (info.num_records, info.compression, info.hashes) == (NUM_RECORDS, "zstd", ("xxh64",))
    assert info.num_shards == len(list(whole.glob("shard.*.mds.zstd"))) > 4
    assert info.columns == COLUMNS
    assert info.manifest.tally.candidates == dict.fromkeys(range(2, 7), NUM_RECORDS // 5)
    assert info.manifest.source["files"][0]["name"] == "train.jsonl"
    lines = "\n".join(info.lines())
    assert "60 in" in lines and "2: 12, 3: 12" in lines and "100% ≤" in lines
    text = (whole / "build.json").read_text()
    assert str(source.parent) not in text and str(whole) not in text


@pytest.mark.parametrize("known", [{}, {"qid": "1"}, {"docids": ("a", "b"), "grades": (2, 0)}])
def test_a_record_survives_its_columns(known):
    record = Record("q", "", "user", "response", **known)
    assert record_from_sample(sample_from_record(record)) == record


@pytest.mark.parametrize("options", [{"compression": None}, {"compression": "gz:1"}, {"hashes": ("sha1", "xxh64")}])
def test_compression_and_hashes_are_a_choice(source, whole, tmp_path, options):
    build_from_file(tmp_path / "set", source, **(SMALL | options))
    assert records_of(tmp_path / "set") == records_of(whole)
    assert verify_shards(tmp_path / "set").problems == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"compression": "rar"}, "compression 'rar'"),
        ({"hashes": ("crc7",)}, "Allowed are zstd, gz"),
        ({"hashes": ()}, "hashes\n"),
        ({"shard_bytes": 0}, "shard_bytes\n"),
        ({"shard_bytes": 1 << 30}, "shard_bytes\n"),
        ({"num_processes": 0}, "num_processes\n"),
        ({"on_error": "ignore"}, "on_error\n"),
        ({"part": "0/2"}, "part\n"),
        ({"part": "3/2"}, "part: found '3/2', allowed is I/N with I from 1 to N"),
        ({"part": "half"}, "part\n"),
    ],
)
def test_settings_that_cannot_be_stop_before_anything_is_written(source, tmp_path, options, told):
    with pytest.raises(ValueError) as caught:
        build_from_file(tmp_path / "set", source, **(SMALL | options))
    assert told in str(caught.value)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"input": None}, "input is null, as is run"),
        ({"run": "a.trec"}, "input is set, and so is run"),
        ({"queries": "a.jsonl"}, "queries is set"),
        ({"input": None, "run": "a.trec", "judgments": "q.trec"}, "docs is null"),
    ],
)
def test_sources_that_contradict_themselves_stop_before_anything_is_written(source, tmp_path, options, told):
    with pytest.raises(SourceError) as caught:
        build_shards(tmp_path / "set", SourceOptions(**({"input": source} | options)))
    assert told in str(caught.value)
    assert not (tmp_path / "set").exists()


# ---- built by several, killed, built again


SLOW_BUILD = """
import sys, time
from rankllm_composer.options import BuildOptions
from rankllm_composer.shards.build import build_from
from rankllm_composer.sources.conversations import JsonLinesSource

class SlowSource(JsonLinesSource):
    def items(self):
        for item in super().items():
            if item.index == {stall}:
                time.sleep(600)
            yield item

if __name__ == "__main__":
    build_from(SlowSource({source!r}), {output!r}, options=BuildOptions(shard_bytes=10_000, num_processes=2))
"""


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


@pytest.mark.slow
def test_a_killed_build_leaves_no_index_and_no_process_and_the_next_one_makes_the_same_bytes(source, whole, tmp_path):
    output = tmp_path / "set"
    script = tmp_path / "slow_build.py"
    script.write_text(SLOW_BUILD.format(stall=40, source=str(source), output=str(output)))
    build = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.DEVNULL)
    wait_until(lambda: len(list((output / ".building").glob("shard.*"))) >= 1)
    workers = children(build.pid)
    assert len(workers) >= 2
    with pytest.raises(ShardError, match="another process builds this set"):
        build_from_file(output, source, **SMALL)
    build.send_signal(signal.SIGKILL)
    build.wait()
    assert not list(output.rglob("index.json"))
    assert not index_exists(output)
    wait_until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers))

    script.write_text(SLOW_BUILD.format(stall=None, source=str(source), output=str(output)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert f"{NUM_RECORDS} records" in done.stdout
    assert content(output) == content(whole)


def test_a_worker_that_is_ended_from_outside_is_an_error_with_a_remedy():
    with pytest.raises(ShardError, match="run the same command again with fewer processes"):
        list(write_blocks([Block(0, []), Block(1, [])], DyingWriter(), num_processes=2))


@pytest.mark.parametrize(("num_blocks", "num_alone", "num_here"), [(4, 4, 4), (1, 1, 1), (0, 1, 0), (5, 3, 2)])
def test_processes_are_started_for_large_sources_only(num_blocks, num_alone, num_here):
    written = list(write_blocks([Block(i, []) for i in range(num_blocks)], NamingWriter(), 2, num_alone))
    assert [number for number, _ in written] == list(range(num_blocks))
    assert sum(pid == os.getpid() for _, pid in written) == num_here


class NamingWriter:
    """A block writer that tells block and process."""

    def write(self, block):
        return block.number, os.getpid()


class DyingWriter:
    """A block writer whose process does not live to see the end."""

    def write(self, block):
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_same_build_again_does_nothing_and_repairs_what_is_missing(source, tmp_path):
    output = tmp_path / "set"
    assert not build_from_file(output, source, **SMALL).was_there
    before = content(output)
    assert build_from_file(output, source, **SMALL).was_there
    next(iter(output.glob("shard.*"))).unlink()
    assert not build_from_file(output, source, **SMALL).was_there
    (output / "index.json").write_text("{")
    assert not build_from_file(output, source, **SMALL).was_there
    assert content(output) == before


def test_another_set_is_not_replaced_unless_told(source, tmp_path):
    output = tmp_path / "set"
    build_from_file(output, source, **SMALL)
    before = content(output)
    with pytest.raises(ShardError, match=r"holds another set.*choose another output, or build with --overwrite"):
        build_from_file(output, source, **(SMALL | {"shard_bytes": 20_000}))
    assert content(output) == before
    build_from_file(output, source, overwrite=True, **(SMALL | {"shard_bytes": 20_000}))
    after = content(output)
    assert not {name for name in before if name.startswith("shard")} & set(after)
    listed = {shard.published.basename for shard in read_index(output / "index.json")}
    assert set(after) == listed | {"index.json", "build.json"}
    assert verify_shards(output, records=True).problems == []


def test_a_full_disk_is_a_readable_error_and_leaves_nothing(source, tmp_path, monkeypatch):
    def fail(self, number, records):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(BlockWriter, "_write_shard", fail)
    with pytest.raises(ShardError, match=r"cannot be written: .*No space left on device"):
        build_from_file(tmp_path / "set", source, **SMALL)
    assert not (tmp_path / "set").exists()


def test_a_build_ended_while_it_is_published_leaves_no_index_and_the_next_one_cleans_up(source, tmp_path, monkeypatch):
    output = tmp_path / "set"

    def end_before_the_index(self, folder, names, report, put=LocalFolder.put):
        if "index.json" in names:
            raise KeyboardInterrupt
        put(self, folder, names, report)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalFolder, "put", end_before_the_index)
        build_from_file(output, source, **SMALL)
    assert list(output.glob("shard.*")) and not index_exists(output)
    build_from_file(output, source, **(SMALL | {"shard_bytes": 20_000}))
    listed = {shard.published.basename for shard in read_index(output / "index.json")}
    assert set(content(output)) == listed | {"index.json", "build.json"}


def test_only_one_build_of_a_set_at_a_time(tmp_path):
    busy = pytest.raises(ShardError, match="another process builds this set")
    with work_folder(tmp_path / "set"), busy, work_folder(tmp_path / "set"):
        pass
    assert not (tmp_path / "set").exists()


# ---- bad records


def with_bad_records(folder: Path) -> Path:
    layouts: list[object] = [conversation(i) for i in range(20)]
    layouts[5] = conversation(5, gpt="[A] > [A]")
    layouts[11] = "{not json"
    layouts[15] = conversation(2)  # id q2 again
    return write_jsonl(folder / "train.jsonl", layouts)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_bad_record_stops_the_build_and_names_the_first(tmp_path, num_processes):
    with pytest.raises(RecordError) as caught:
        build_from_file(tmp_path / "set", with_bad_records(tmp_path), **(SMALL | {"num_processes": num_processes}))
    assert str(caught.value).startswith("train.jsonl:record 5 (line 6): id 'q5': ")
    assert "--on-error quarantine" in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_quarantine_writes_bad_records_aside_and_counts_them(tmp_path):
    output, lines = tmp_path / "set", []
    options = SMALL | {"report": lines.append, "on_error": "quarantine"}
    built = build_from_file(output, with_bad_records(tmp_path), **options)
    assert (built.tally.num_records, built.tally.num_quarantined, built.tally.num_duplicates) == (18, 2, 1)
    refused = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["place"] for entry in refused] == ["train.jsonl:record 5 (line 6)", "train.jsonl:record 11 (line 12)"]
    assert "repeated: 'A'" in refused[0]["reason"]
    assert refused[0]["record"] == conversation(5, gpt="[A] > [A]")
    assert refused[1]["record"] == "{not json"
    assert any("2 bad records, written to quarantine.jsonl" in line for line in lines)
    assert any("1 records whose id came before" in line for line in lines)
    checked = verify_shards(output, records=True)
    assert (checked.problems, checked.num_duplicates, checked.duplicate_ids) == ([], 1, ["q2"])


def test_prompts_in_another_wording_are_kept_as_they_are_and_counted(tmp_path):
    layouts = [conversation(i) for i in range(8)]
    for i in (2, 5, 6):
        layouts[i]["conversations"][1]["value"] = layouts[i]["conversations"][1]["value"].replace("\n", "\n\n")
    path, output, lines = write_jsonl(tmp_path / "train.jsonl", layouts), tmp_path / "set", []
    built = build_from_file(output, path, **(SMALL | {"report": lines.append}))
    assert records_of(output) == expected_records(path)
    assert (built.tally.num_records, built.tally.num_other_wordings, built.tally.num_quarantined) == (8, 3, 0)
    assert any("3 prompts in another wording than the client's" in line for line in lines)
    assert json.loads((output / "build.json").read_text())["counts"]["other_wordings"] == 3
    assert any("3 prompts in another wording than the client's" in line for line in shards_info(output).lines())
    assert verify_shards(output, records=True).problems == []
    build_parts(tmp_path / "parts", path, 2)
    assert merge_shards(tmp_path / "parts", report=report_nothing).tally == built.tally


def test_a_set_from_before_wordings_were_counted_has_none(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "set")
    manifest = json.loads((folder / "build.json").read_text())
    assert manifest["counts"].pop("other_wordings") == 0
    (folder / "build.json").write_text(json.dumps(manifest))
    assert shards_info(folder).manifest.tally == shards_info(whole).manifest.tally


@pytest.mark.parametrize(("layouts", "told"), [([], "0 bad"), (["{", "{"], "2 bad")])
def test_a_source_that_leaves_no_record_is_an_error(tmp_path, layouts, told):
    path = write_jsonl(tmp_path / "train.jsonl", layouts)
    with pytest.raises(ShardError, match=f"no record is left to build from .{told}"):
        build_from_file(tmp_path / "set", path, **(SMALL | {"on_error": "quarantine"}))
    assert not (tmp_path / "set").exists()


# ---- parts


def build_parts(output: Path, source: Path, num_parts: int, **options) -> None:
    for i in random.Random(0).sample(range(1, num_parts + 1), num_parts):
        build_from_file(output, source, part=f"{i}/{num_parts}", **(SMALL | options))


def test_parts_merge_into_the_set_that_one_build_makes(source, whole, tmp_path):
    output = tmp_path / "set"
    build_parts(output, source, 3)
    assert not index_exists(output)
    merged = merge_shards(output, report=report_nothing)
    assert (merged.tally, merged.tally.num_records) == (shards_info(whole).manifest.tally, NUM_RECORDS)
    assert sorted(records_of(output), key=repr) == sorted(records_of(whole), key=repr)
    assert [record.id for record in records_of(output)][:2] == ["q0", "q3"]  # every third, from the first on
    assert verify_shards(output, records=True).problems == []
    assert merge_shards(output, report=report_nothing).num_shards == merged.num_shards
    from streaming import StreamingDataset

    assert len(StreamingDataset(local=str(output), batch_size=1)) == NUM_RECORDS


def test_repeated_ids_are_counted_across_parts(tmp_path):
    source = write_jsonl(tmp_path / "train.jsonl", [conversation(i % 5) for i in range(10)])
    build_parts(tmp_path / "set", source, 2)
    assert shards_info(tmp_path / "set" / "part-1-of-2").manifest.tally.num_duplicates == 0
    assert merge_shards(tmp_path / "set", report=report_nothing).tally.num_duplicates == 5


def test_more_parts_than_records_leave_some_empty(tmp_path):
    source = write_jsonl(tmp_path / "train.jsonl", [conversation(0), conversation(1)])
    build_parts(tmp_path / "set", source, 3)
    assert merge_shards(tmp_path / "set", report=report_nothing).tally.num_records == 2


def lose_a_part(output: Path, source: Path) -> None:
    (output / "part-2-of-3" / "index.json").unlink()


def lose_a_shard(output: Path, source: Path) -> None:
    next((output / "part-2-of-3").glob("shard.*")).unlink()


def build_a_part_otherwise(output: Path, source: Path) -> None:
    build_from_file(output, source, part="2/3", overwrite=True, **(SMALL | {"shard_bytes": 5_000}))


def build_a_part_of_another_file(output: Path, source: Path) -> None:
    other = write_jsonl(output.parent / "train.jsonl", [conversation(i) for i in range(9)])
    build_from_file(output, other, part="2/3", overwrite=True, **SMALL)


def add_a_part_of_another_number(output: Path, source: Path) -> None:
    build_from_file(output, source, part="1/2", **SMALL)


def swap_an_index(output: Path, source: Path) -> None:
    (output / "part-2-of-3" / "index.json").write_bytes((output / "part-1-of-3" / "index.json").read_bytes())


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lose_a_part, r"part-2-of-3: this part is missing or not complete; build it with --part 2/3"),
        (lose_a_shard, r"part-2-of-3: shard.* is missing or not whole"),
        (build_a_part_otherwise, r"part-2-of-3: its options is"),
        (build_a_part_of_another_file, r"part-2-of-3: its source is"),
        (add_a_part_of_another_number, r"found part-1-of-2, part-1-of-3"),
        (swap_an_index, r"part-2-of-3: its files are not of one build"),
    ],
)
def test_parts_that_do_not_make_a_set_are_not_merged(source, tmp_path, damage, told):
    output = tmp_path / "set"
    build_parts(output, source, 3)
    damage(output, source)
    with pytest.raises(ShardError, match=told):
        merge_shards(output)
    assert not (output / "index.json").exists()


def test_there_is_nothing_to_merge_in_a_set_or_nowhere(source, whole, tmp_path):
    with pytest.raises(ShardError, match="found no part"):
        merge_shards(whole)
    with pytest.raises(ShardError, match="found no part"):
        merge_shards(tmp_path / "absent")
