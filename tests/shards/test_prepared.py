"""Prepared shards and the source that a recipe names: what differs stops the run, and each remedy works."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from support.list_shards import build_from_file, report_nothing
from support.recipes import PUBLISHED
from support.synthetic_records import conversation

from rankllm_composer.errors import ShardError
from rankllm_composer.options import SourceOptions
from rankllm_composer.recipe.load import load_recipe
from rankllm_composer.shards.build import build_shards
from rankllm_composer.shards.contents import SetContents, read_contents
from rankllm_composer.shards.prepared import NOTE_NAME, find_difference
from rankllm_composer.shards.read import SplitRecords
from rankllm_composer.training.run import prepare_shards

NAMED = ("input", "run", "judgments", "queries", "docs")
OPENED: list[str] = []
sys.addaudithook(lambda event, arguments: OPENED.append(str(arguments[0])) if event == "open" else None)


def write_records(path: Path, numbers: range, **options) -> Path:
    path.write_text("".join(json.dumps(conversation(number, **options)) + "\n" for number in numbers))
    return path


def write_retrieval_files(folder: Path) -> dict[str, str]:
    """Write 12 documents, 3 queries, a run and judgments; return the options of a source."""
    docs = [{"docid": f"d{i}", "title": "", "text": f"passage {i}"} for i in range(12)]
    queries = [{"qid": f"q{i}", "text": f"query {i}"} for i in range(3)]
    files = {
        "docs": "\n".join(map(json.dumps, docs)),
        "queries": "\n".join(map(json.dumps, queries)),
        "run": "\n".join(f"q{q} Q0 d{(q + r) % 12} {r + 1} {12 - r} bm25" for q in range(3) for r in range(12)),
        "judgments": "\n".join(f"q{q} 0 d{d} {d % 3}" for q in range(3) for d in range(12)),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    return {name: str(folder / name) for name in files}


def split(folder: Path, source: SourceOptions | str | None, *overrides: str, key: str = "data.train"):
    """The split of a recipe whose shards are in `folder`; a source as text is that of records."""
    if isinstance(source, str):
        source = SourceOptions(input=source)
    given = {} if source is None else {name: value for name, value in asdict(source).items() if name in NAMED}
    text = "null" if source is None else json.dumps({name: value for name, value in given.items() if value is not None})
    section = [f"{key}.local={folder}", f"{key}.source={text}", *overrides]
    if key == "data.eval":
        section = [f"data.eval={{local: {folder}}}", "evaluation={}", *section]
    recipe = load_recipe(PUBLISHED[0], section)
    return recipe.data.train if key == "data.train" else recipe.data.eval


def ids(folder: Path) -> list[str]:
    return [record.id for record in SplitRecords([(str(folder), None)])]


@pytest.mark.parametrize("key", ["data.train", "data.eval"])
def test_another_source_stops_the_run_and_each_remedy_works(tmp_path, key):
    old, new = (write_records(tmp_path / f"{n}.jsonl", numbers) for n, numbers in (("a", range(6)), ("b", range(3, 9))))
    shards = tmp_path / "shards"
    prepare_shards(split(shards, str(old), key=key), key)
    prepare_shards(split(shards, str(old), key=key), key)  # the same source: nothing to do
    with pytest.raises(ShardError) as stopped:
        prepare_shards(split(shards, str(new), key=key), key)
    message = str(stopped.value)
    for path in (old, new):  # both values
        assert f"{path.name} ({path.stat().st_size} bytes, sha256 " in message
    assert f"Set {key}.rebuild=true to build them again, another {key}.local, or {key}.source=null to use" in message

    prepare_shards(split(shards, None, key=key), key)
    prepare_shards(split(tmp_path / "other", str(new), key=key), key)
    assert (ids(shards), ids(tmp_path / "other")) == ([f"q{i}" for i in range(6)], [f"q{i}" for i in range(3, 9)])
    rebuilding = split(shards, str(new), f"{key}.rebuild=true", key=key)
    prepare_shards(rebuilding, key)
    assert ids(shards) == [f"q{i}" for i in range(3, 9)]
    built = (shards / "index.json").stat().st_mtime_ns
    prepare_shards(rebuilding, key)  # of a resumed run: the key builds once
    assert (shards / "index.json").stat().st_mtime_ns == built


def test_a_source_that_changed_in_place_or_is_gone_stops_the_run(tmp_path):
    path, shards = write_records(tmp_path / "a.jsonl", range(6)), tmp_path / "shards"
    prepare_shards(split(shards, str(path)), "data.train")
    write_records(path, range(1, 7))
    with pytest.raises(
        ShardError, match=r"file 1 was a\.jsonl \(\d+ bytes, sha256 \w{12}\), is now a\.jsonl \(\d+ bytes"
    ):
        prepare_shards(split(shards, str(path)), "data.train")
    with pytest.raises(
        ShardError, match=r"cannot be compared with the shards in .* built from a\.jsonl: .*nowhere\.jsonl"
    ):
        prepare_shards(split(shards, str(tmp_path / "nowhere.jsonl")), "data.train")
    with pytest.raises(
        ShardError, match=r"kind was conversations, is now dataset; .* name was None, is now owner/lists"
    ):
        prepare_shards(split(shards, "owner/lists"), "data.train")


def test_options_of_the_source_count_and_inspection_judges_alike(tmp_path):
    files, shards = write_retrieval_files(tmp_path), tmp_path / "shards"
    first, other = (SourceOptions(**files, window=window, stride=2) for window in (4, 6))
    windows = ["data.train.source.window=4", "data.train.source.stride=2"]
    prepare_shards(split(shards, first, *windows), "data.train")
    with pytest.raises(ShardError, match=r"with other options \(window was 4, is now 6\)"):
        prepare_shards(split(shards, first, *windows, "data.train.source.window=6"), "data.train")
    sets = [(str(shards), None)]
    with pytest.raises(ShardError, match=r"window was 4, is now 6"):
        SplitRecords(sets, other)
    assert {len(record.turn.passages) for record in SplitRecords(sets, first)} == {4}
    assert {len(record.turn.passages) for record in SplitRecords(sets, other, rebuild=True)} == {6}
    with pytest.raises(ShardError, match=r"on_error was stop, is now quarantine"):
        prepare_shards(split(shards, first, *windows, "data.train.source.on_error=quarantine"), "data.train")


def test_a_set_of_unknown_origin_or_a_part_is_not_taken_for_the_source(tmp_path):
    path = write_records(tmp_path / "a.jsonl", range(6))
    build_from_file(tmp_path / "parts", path, part="1/2")
    with pytest.raises(ShardError, match=r"part was 1/2, is now all"):
        prepare_shards(split(tmp_path / "parts" / "part-1-of-2", str(path)), "data.train")
    build_from_file(tmp_path / "set", path)
    (tmp_path / "set" / "build.json").unlink()
    with pytest.raises(ShardError, match=r"have no build\.json that says what they were built from"):
        prepare_shards(split(tmp_path / "set", str(path)), "data.train")
    prepare_shards(split(tmp_path / "set", None), "data.train")
    prepare_shards(split(tmp_path / "set", str(path), "data.train.rebuild=true"), "data.train")
    prepare_shards(split(tmp_path / "set", str(path)), "data.train")


def test_an_unchanged_source_is_read_once(tmp_path):
    path, shards = write_records(tmp_path / "a.jsonl", range(6)), tmp_path / "shards"
    source = SourceOptions(input=path)
    build_shards(shards, source, report=report_nothing)

    def reads() -> int:
        OPENED.clear()
        assert find_difference(shards, source, shards, "data.train") is None
        return OPENED.count(str(path))

    assert (reads(), reads()) == (1, 1)  # a file that has just been written may change within the clock's resolution
    assert not (shards / NOTE_NAME).exists()
    os.utime(path, (1e9, 1e9))
    assert (reads(), reads(), reads()) == (1, 0, 0)
    path.write_bytes(path.read_bytes().replace(b"q5", b"q7"))
    os.utime(path, (1e9, 1e9))  # size and time of the content are what they were
    assert find_difference(shards, source, shards, "data.train") is not None
    assert find_difference(shards, SourceOptions(input=path, on_error="quarantine"), shards, "data.train") is not None


@pytest.mark.parametrize("has_counts", [True, False], ids=["counted by the build", "read from end to end"])
def test_contents_are_those_of_all_lists_of_all_sets(tmp_path, has_counts):
    letters = write_records(tmp_path / "letters.jsonl", range(3), num_candidates=4)
    with letters.open("a") as file:  # the longest list is not the first
        file.write(json.dumps(conversation(3, num_candidates=7)) + "\n")
    numbers = write_records(tmp_path / "numbers.jsonl", range(2), num_candidates=9, style="numbers")
    sets = [(str(tmp_path / name), None) for name in ("one", "two")]
    for (folder, _), source in zip(sets, (letters, numbers)):
        build_from_file(folder, source)
        if not has_counts:
            Path(folder, "build.json").unlink()
    contents = read_contents(sets)
    assert contents.lists == {("letters", 4): 3, ("letters", 7): 1, ("numbers", 9): 2}
    names = ("letters.jsonl", "numbers.jsonl") if has_counts else (str(tmp_path / "one"), str(tmp_path / "two"))
    assert contents.sources == names and contents.strides == set()
    assert contents.renamed("numbers").lists == {("numbers", 4): 3, ("numbers", 7): 1, ("numbers", 9): 2}


def test_contents_of_lists_from_a_run_know_window_stride_and_words(tmp_path):
    source = SourceOptions(**write_retrieval_files(tmp_path), window=4, stride=3, max_passage_words=60)
    build_shards(tmp_path / "set", source, report=report_nothing)
    contents = read_contents([(str(tmp_path / "set"), None)])
    assert contents.lists == {("letters", 4): 3} and contents.strides == {3}
    assert contents.max_passage_words("0.26.0") == 60
    assert contents.max_passage_words("0.25.7") == 12  # 12 * 20 / 4 = 60 in a window of 4
    assert contents.sources == ("run", "queries", "docs", "judgments")


def test_a_manifest_of_another_index_is_an_error(tmp_path):
    path = write_records(tmp_path / "a.jsonl", range(6))
    build_from_file(tmp_path / "set", path)
    index = tmp_path / "set" / "index.json"
    index.write_text(index.read_text().replace('"samples": 6', '"samples": 5'))
    with pytest.raises(ShardError, match=r"build\.json: belongs to another index\.json than the one beside it"):
        read_contents([(str(tmp_path / "set"), None)])


def test_letters_cannot_name_long_lists():
    with pytest.raises(ShardError, match=r"data\.train\.identifiers is letters, but lists have up to 30 candidates"):
        SetContents(Counter({("numbers", 30): 1})).renamed("letters")
