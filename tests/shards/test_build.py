"""Builds of shard sets: complete, the same to the byte in any number of processes, and atomic."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from support.list_shards import build_from_file, report_nothing
from support.small_disk import fill, small_disk
from support.synthetic_records import conversation, write_jsonl

from rankllm_composer.errors import RecordError, ShardError, SourceError
from rankllm_composer.options import BuildOptions, SourceOptions
from rankllm_composer.prompts import user_turn
from rankllm_composer.prompts.record import Record
from rankllm_composer.shards.blocks import write_blocks
from rankllm_composer.shards.build import build_shards, index_exists
from rankllm_composer.shards.index import read_index, record_from_sample, sample_from_record
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


def test_streaming_reads_the_same_records(source, whole, tmp_path):
    from streaming import StreamingDataset

    folder = shutil.copytree(whole, tmp_path / "set")  # streaming unpacks a local set in place
    dataset = StreamingDataset(local=str(folder), batch_size=1, validate_hash="xxh64")
    assert [record_from_sample(dataset[i]) for i in range(len(dataset))] == expected_records(source)
    assert verify_shards(folder, records=True).problems == []
    next(folder.glob("shard.*.mds")).write_bytes(b"changed")
    assert len(verify_shards(folder, report=report_nothing).problems) == 1


def test_info_and_manifest_describe_the_set(source, whole):
    info = shards_info(whole)
    assert info.num_records == NUM_RECORDS
    assert len(info.shards) == len(list(whole.glob("shard.*.mds.zstd"))) > 4
    assert "compression   zstd; hashes xxh64" in info.lines()
    assert info.manifest.stats.candidates == dict.fromkeys(range(2, 7), NUM_RECORDS // 5)
    assert info.manifest.source["files"][0]["name"] == "train.jsonl"
    lines = "\n".join(info.lines())
    assert "60 in" in lines and "2: 12, 3: 12" in lines and "100% ≤" in lines
    text = (whole / "build.json").read_text()
    assert str(source.parent) not in text and str(whole) not in text


def test_held_out_queries_are_a_second_set(source, whole, tmp_path):
    build_from_file(tmp_path / "set", source, hold_out=0.3, **SMALL)
    train, held_out = (records_of(tmp_path / name) for name in ("set", "set-held-out"))
    assert sorted(record.id for record in train + held_out) == sorted(record.id for record in records_of(whole))
    queries = [{record.turn.query for record in side} for side in (train, held_out)]
    assert queries[0].isdisjoint(queries[1]) and 0.1 < len(queries[1]) / len(queries[0] | queries[1]) < 0.5
    build_from_file(tmp_path / "again", source, hold_out=0.5, **SMALL)
    assert {record.id for record in held_out} <= {record.id for record in records_of(tmp_path / "again-held-out")}


def test_what_is_left_out_counts_on_the_side_of_its_query(tmp_path):
    """Every list of a run is trained, held out or left out, once."""
    qids = [f"q{number}" for number in range(40)]
    lines = {
        "run.trec": [f"{qid} Q0 d{doc} 1 {-(doc % 2)} x" for qid in (*qids, "absent") for doc in range(4)],
        "queries.jsonl": [json.dumps({"id": qid, "text": f"words [{qid[1:]}] of {qid}"}) for qid in qids],
        "docs.jsonl": [json.dumps({"id": f"d{doc}", "text": f"text {doc}"}) for doc in range(4)],
        "qrels.trec": [f"{qid} 0 d{number % 4} {number % 2}" for number, qid in enumerate(qids)],
        "lists.jsonl": [
            json.dumps({"id": qid, "query": f"words of {qid}", "passages": ["a", "b"], "scores": [number % 3, 0]})
            for number, qid in enumerate(qids)
        ],
    }
    lines["lists.jsonl"].append("{}")
    for name, content in lines.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in content))
    made = {role: str(tmp_path / name) for role, name in zip(("run", "queries", "docs", "judgments"), lines)}
    for name, files in (("run", made), ("lists", {"input": str(tmp_path / "lists.jsonl")})):
        source = SourceOptions(**files, on_error="quarantine")
        whole = build_shards(tmp_path / name, source, report=str).stats
        build_shards(tmp_path / f"{name}-split", source, BuildOptions(hold_out=0.4), report=str)
        train, held_out = (shards_info(tmp_path / f"{name}-split{side}").manifest.stats for side in ("", "-held-out"))
        assert train.num_records + held_out.num_records == whole.num_records > 0
        assert train.dropped + held_out.dropped == whole.dropped and train.noted + held_out.noted == whole.noted
        assert (train.num_quarantined, held_out.num_quarantined) == (whole.num_quarantined, 0)
        assert whole.num_quarantined == (name == "lists")
        assert 0 < held_out.dropped.total() < whole.dropped.total()
        assert "queries of the run that the queries file lacks" not in held_out.dropped


SCORED = {"scores": (0.1 + 0.2, None), "ordered_by": "scores"}


@pytest.mark.parametrize("known", [{}, {"qid": "1"}, {"docids": ("a", "b"), "grades": (2, None)}, SCORED])
def test_a_record_equals_itself_after_a_round_trip_through_columns(known):
    record = Record("q", "", "user", "response", **known)
    assert record_from_sample(sample_from_record(record)) == record


@pytest.mark.parametrize("options", [{"compression": None}, {"compression": "gz:1"}, {"hashes": ("sha1", "xxh64")}])
def test_compression_and_hashes_can_be_chosen(source, whole, tmp_path, options):
    build_from_file(tmp_path / "set", source, **(SMALL | options))
    assert records_of(tmp_path / "set") == records_of(whole)
    assert verify_shards(tmp_path / "set").problems == []


@pytest.mark.parametrize(
    ("options", "message_part"),
    [
        ({"compression": "rar"}, "compression is 'rar'"),
        ({"hashes": ("crc7",)}, "Expected zstd, gz"),
        ({"hashes": ()}, "hashes is []; expected "),
        ({"shard_bytes": 0}, "shard_bytes is 0; expected a whole number of at least 1 "),
        ({"shard_bytes": 1 << 30}, "shard_bytes is 1073741824; expected "),
        ({"num_processes": 0}, "num_processes is 0; expected "),
        ({"on_error": "ignore"}, "on_error is 'ignore'; expected "),
        ({"part": "0/2"}, "part is '0/2'; expected "),
        ({"part": "3/2"}, "part is '3/2'; expected I/N with I from 1 to N"),
        ({"part": "half"}, "part is 'half'; expected "),
    ],
)
def test_invalid_build_options_are_errors_before_anything_is_written(source, tmp_path, options, message_part):
    with pytest.raises(ValueError) as caught:
        build_from_file(tmp_path / "set", source, **(SMALL | options))
    assert message_part in str(caught.value)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("options", "message_part"),
    [
        ({"input": None}, "input is null, as is run"),
        ({"run": "a.trec"}, "input is set, and so is run"),
        ({"queries": "a.jsonl"}, "queries is set"),
        ({"input": None, "run": "a.trec"}, "judgments is null, as is teacher_run"),
    ],
)
def test_contradictory_source_options_are_errors_before_anything_is_written(source, tmp_path, options, message_part):
    with pytest.raises(SourceError) as caught:
        build_shards(tmp_path / "set", SourceOptions(**({"input": source} | options)))
    assert message_part in str(caught.value)
    assert not (tmp_path / "set").exists()


# ---- several processes, killed builds, reruns


SLOW_BUILD = """
import sys, time
from rankllm_composer.options import BuildOptions, SourceOptions
from rankllm_composer.shards.build import build_from
from rankllm_composer.sources.conversations import FileSource

class SlowSource(FileSource):
    def items(self):
        for item in super().items():
            if item.index == {stall}:
                time.sleep(600)
            yield item

if __name__ == "__main__":
    source = SlowSource(SourceOptions(input={source!r}))
    build_from(source, {output!r}, options=BuildOptions(shard_bytes=10_000, num_processes=2))
"""


def wait_until(condition, seconds=600.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


@pytest.mark.slow
def test_a_killed_build_leaves_no_index_and_no_process_and_a_rerun_gives_the_same_bytes(source, whole, tmp_path):
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


def test_a_killed_worker_is_an_error_with_a_remedy():
    with pytest.raises(ShardError, match="Rerun the same command with fewer processes"):
        list(write_blocks([(0, []), (1, [])], DyingWriter(), num_processes=2))


@pytest.mark.parametrize(("num_blocks", "num_alone", "num_here"), [(4, 4, 4), (1, 1, 1), (0, 1, 0), (5, 3, 2)])
def test_processes_are_started_for_large_sources_only(num_blocks, num_alone, num_here):
    written = list(write_blocks([(i, []) for i in range(num_blocks)], NamingWriter(), 2, num_alone))
    assert [number for number, _ in written] == list(range(num_blocks))
    assert sum(pid == os.getpid() for _, pid in written) == num_here


class NamingWriter:
    """A block writer that returns block number and process id."""

    def write(self, block):
        return block[0], os.getpid()


class DyingWriter:
    """A block writer that kills its process."""

    def write(self, block):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_rerun_does_nothing_if_the_set_is_complete_and_repairs_it_if_not(source, tmp_path):
    output = tmp_path / "set"
    assert not build_from_file(output, source, **SMALL).existed
    before = content(output)
    assert build_from_file(output, source, **SMALL).existed
    next(iter(output.glob("shard.*"))).unlink()
    assert not build_from_file(output, source, **SMALL).existed
    (output / "index.json").write_text("{")
    assert not build_from_file(output, source, **SMALL).existed
    assert content(output) == before


def test_a_rerun_over_a_complete_set_removes_what_killed_builds_left(source, tmp_path):
    output = tmp_path / "set"
    build_from_file(output, source, **SMALL)
    before = content(output)
    (output / ".building").mkdir()
    (output / ".building" / "block.00000").write_text("x")
    unpacking = output / "shard.00000.0123456789abcdef.mds.0123456789abcdef"
    for name in ("shard.00000.feed.mds.zstd", ".index.json.partial", "index.json.tmp", unpacking.name):
        (output / name).write_text("x")
    assert build_from_file(output, source, **SMALL).existed
    assert set(content(output)) == {*before, unpacking.name}  # which another run may be writing
    os.utime(unpacking, (0, 0))
    assert build_from_file(output, source, **SMALL).existed
    assert content(output) == before
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    (output / ".building").symlink_to(elsewhere)
    with pytest.raises(ShardError, match=r"\.building is a link; expected a folder of a build or nothing"):
        build_from_file(output, source, overwrite=True, **(SMALL | {"shard_bytes": 20_000}))
    assert build_from_file(output, source, **SMALL).existed and (elsewhere / "precious").exists()


def test_another_set_is_replaced_only_with_overwrite(source, tmp_path):
    output = tmp_path / "set"
    build_from_file(output, source, **SMALL)
    before = content(output)
    with pytest.raises(ShardError, match=r"contains another set.*Choose another output, or build with --overwrite"):
        build_from_file(output, source, **(SMALL | {"shard_bytes": 20_000}))
    assert content(output) == before
    build_from_file(output, source, overwrite=True, **(SMALL | {"shard_bytes": 20_000}))
    after = content(output)
    assert not {name for name in before if name.startswith("shard")} & set(after)
    listed = {shard.published.basename for shard in read_index(output / "index.json")}
    assert set(after) == listed | {"index.json", "build.json"}
    assert verify_shards(output, records=True).problems == []


def test_a_full_disk_is_a_readable_error_and_leaves_nothing(source, tmp_path):
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        fill(disk, free=20_000)
        with pytest.raises(ShardError, match=r"cannot be written: .*No space left on device"):
            build_from_file(disk / "set", source, **SMALL)
        assert not (disk / "set").exists()


def test_a_build_interrupted_during_publication_leaves_no_index_and_a_rerun_cleans_up(source, tmp_path, monkeypatch):
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


def test_bad_records_are_quarantined_and_counted(tmp_path):
    output, lines = tmp_path / "set", []
    options = SMALL | {"report": lines.append, "on_error": "quarantine"}
    built = build_from_file(output, with_bad_records(tmp_path), **options)
    assert (built.stats.num_records, built.stats.num_quarantined, built.stats.num_duplicates) == (18, 2, 1)
    refused = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["place"] for entry in refused] == ["train.jsonl:record 5 (line 6)", "train.jsonl:record 11 (line 12)"]
    assert "repeated: 'A'" in refused[0]["reason"]
    assert refused[0]["record"] == conversation(5, gpt="[A] > [A]")
    assert refused[1]["record"] == "{not json"
    assert any("2 bad records, written to quarantine.jsonl" in line for line in lines)
    assert any("1 record with a duplicate id" in line for line in lines)
    checked = verify_shards(output, records=True)
    assert (checked.problems, checked.num_duplicates, checked.duplicate_ids) == ([], 1, ["q2"])


def test_nonstandard_prompts_are_kept_unchanged_and_counted(tmp_path):
    layouts = [conversation(i) for i in range(8)]
    for i in (2, 5, 6):
        layouts[i]["conversations"][1]["value"] = layouts[i]["conversations"][1]["value"].replace("\n", "\n\n")
    path, output, lines = write_jsonl(tmp_path / "train.jsonl", layouts), tmp_path / "set", []
    built = build_from_file(output, path, **(SMALL | {"report": lines.append}))
    assert records_of(output) == expected_records(path)
    assert (built.stats.num_records, built.stats.num_nonstandard_prompts, built.stats.num_quarantined) == (8, 3, 0)
    assert any("3 nonstandard prompts" in line for line in lines)
    assert json.loads((output / "build.json").read_text())["counts"]["other_wordings"] == 3
    assert any("3 nonstandard" in line for line in shards_info(output).lines())
    assert verify_shards(output, records=True).problems == []
    build_parts(tmp_path / "parts", path, 2)
    assert merge_shards(tmp_path / "parts", report=report_nothing).stats == built.stats


def test_each_user_turn_is_parsed_once(tmp_path, monkeypatch):
    parsed = Counter()

    def count(text, parse=user_turn.parse_user_turn):
        parsed[text] += 1
        return parse(text)

    monkeypatch.setattr(user_turn, "parse_user_turn", count)
    layouts = [conversation(i) for i in range(8)]
    human = layouts[5]["conversations"][1]
    human["value"] = human["value"].replace("\n", "\n\n")
    build_from_file(tmp_path / "set", write_jsonl(tmp_path / "train.jsonl", layouts), **SMALL)
    assert parsed == {layout["conversations"][1]["value"]: 1 for layout in layouts}


def test_an_older_manifest_without_nonstandard_prompts_can_be_read(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "set")
    manifest = json.loads((folder / "build.json").read_text())
    assert manifest["counts"].pop("other_wordings") == 0
    (folder / "build.json").write_text(json.dumps(manifest))
    assert shards_info(folder).manifest.stats == shards_info(whole).manifest.stats


@pytest.mark.parametrize(("layouts", "message_part"), [([], "0 bad"), (["{", "{"], "2 bad")])
def test_a_source_without_valid_records_is_an_error(tmp_path, layouts, message_part):
    path = write_jsonl(tmp_path / "train.jsonl", layouts)
    with pytest.raises(ShardError, match=f"no record is left to build from .{message_part}"):
        build_from_file(tmp_path / "set", path, **(SMALL | {"on_error": "quarantine"}))
    assert not (tmp_path / "set").exists()


# ---- parts


def build_parts(output: Path, source: Path, num_parts: int, **options) -> None:
    for i in random.Random(0).sample(range(1, num_parts + 1), num_parts):
        build_from_file(output, source, part=f"{i}/{num_parts}", **(SMALL | options))


def test_merged_parts_equal_a_set_built_at_once(source, whole, tmp_path):
    output = tmp_path / "set"
    build_parts(output, source, 3)
    assert not index_exists(output)
    merged = merge_shards(output, report=report_nothing)
    assert (merged.stats, merged.stats.num_records) == (shards_info(whole).manifest.stats, NUM_RECORDS)
    assert sorted(records_of(output), key=repr) == sorted(records_of(whole), key=repr)
    assert [record.id for record in records_of(output)][:2] == ["q0", "q3"]  # every third, from the first on
    assert verify_shards(output, records=True).problems == []
    assert merge_shards(output, report=report_nothing).num_shards == merged.num_shards
    from streaming import StreamingDataset

    assert len(StreamingDataset(local=str(output), batch_size=1)) == NUM_RECORDS


def test_duplicate_ids_are_counted_across_parts(tmp_path):
    source = write_jsonl(tmp_path / "train.jsonl", [conversation(i % 5) for i in range(10)])
    build_parts(tmp_path / "set", source, 2)
    assert shards_info(tmp_path / "set" / "part-1-of-2").manifest.stats.num_duplicates == 0
    assert merge_shards(tmp_path / "set", report=report_nothing).stats.num_duplicates == 5


def test_more_parts_than_records_leave_some_empty(tmp_path):
    source = write_jsonl(tmp_path / "train.jsonl", [conversation(0), conversation(1)])
    build_parts(tmp_path / "set", source, 3)
    assert merge_shards(tmp_path / "set", report=report_nothing).stats.num_records == 2


def lose_a_part(output: Path, source: Path) -> None:
    (output / "part-2-of-3" / "index.json").unlink()


def lose_a_shard(output: Path, source: Path) -> None:
    next((output / "part-2-of-3").glob("shard.*")).unlink()


def build_a_part_with_other_options(output: Path, source: Path) -> None:
    build_from_file(output, source, part="2/3", overwrite=True, **(SMALL | {"shard_bytes": 5_000}))


def build_a_part_of_another_file(output: Path, source: Path) -> None:
    other = write_jsonl(output.parent / "train.jsonl", [conversation(i) for i in range(9)])
    build_from_file(output, other, part="2/3", overwrite=True, **SMALL)


def add_a_part_of_another_split(output: Path, source: Path) -> None:
    build_from_file(output, source, part="1/2", **SMALL)


def swap_an_index(output: Path, source: Path) -> None:
    (output / "part-2-of-3" / "index.json").write_bytes((output / "part-1-of-3" / "index.json").read_bytes())


@pytest.mark.parametrize(
    ("damage", "message_part"),
    [
        (lose_a_part, r"part-2-of-3: this part is missing or incomplete. Build it with --part 2/3"),
        (lose_a_shard, r"part-2-of-3: shard.* is missing or incomplete"),
        (build_a_part_with_other_options, r"part-2-of-3: options is"),
        (build_a_part_of_another_file, r"part-2-of-3: source is"),
        (add_a_part_of_another_split, r"contains part-1-of-2, part-1-of-3"),
        (swap_an_index, r"part-2-of-3: its files belong to different builds"),
    ],
)
def test_parts_that_do_not_make_a_set_are_not_merged(source, tmp_path, damage, message_part):
    output = tmp_path / "set"
    build_parts(output, source, 3)
    damage(output, source)
    with pytest.raises(ShardError, match=message_part):
        merge_shards(output)
    assert not (output / "index.json").exists()


def test_a_merge_without_parts_is_an_error(source, whole, tmp_path):
    with pytest.raises(ShardError, match="contains no part"):
        merge_shards(whole)
    with pytest.raises(ShardError, match="contains no part"):
        merge_shards(tmp_path / "absent")
