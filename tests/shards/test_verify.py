"""Verification finds every kind of damage, and every index entry is checked before it is used."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.list_shards import build_from_file, report_nothing
from support.synthetic_records import conversation, write_jsonl

from rankllm_composer.errors import ShardError
from rankllm_composer.shards.index import index_digest, parse_index
from rankllm_composer.shards.manifest import parse_manifest
from rankllm_composer.shards.verify import shards_info, verify_shards


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A file of 20 records."""
    layouts = [conversation(i, num_candidates=2 + i % 5) for i in range(20)]
    return write_jsonl(tmp_path_factory.mktemp("source") / "train.jsonl", layouts)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    """A compressed set of them."""
    return build(tmp_path_factory.mktemp("sets") / "whole", source)


def build(folder: Path, source: Path, **options) -> Path:
    build_from_file(folder, source, shard_bytes=5_000, **options)
    return folder


def first_shard(folder: Path) -> Path:
    return min(folder.glob("shard.*"))


def edit_index(folder: Path, edit) -> None:
    """Change the index, and tie the manifest to the changed one."""
    index = json.loads((folder / "index.json").read_text())
    edit(index["shards"])
    (folder / "index.json").write_text(json.dumps(index))
    manifest = json.loads((folder / "build.json").read_text())
    manifest["index_sha256"] = index_digest((folder / "index.json").read_bytes())
    (folder / "build.json").write_text(json.dumps(manifest))


def flip_a_byte(folder: Path) -> None:
    data = bytearray(first_shard(folder).read_bytes())
    data[len(data) // 2] ^= 1
    first_shard(folder).write_bytes(data)


def forge_samples(folder: Path) -> None:
    """A shard whose hashes are right but whose first record is not."""
    path = first_shard(folder)
    raw = path.read_bytes().replace(b"[A] ", b"[a] ", 1)
    path.write_bytes(raw)
    from streaming.base.hashing import get_hash

    hashes = {"xxh64": get_hash("xxh64", raw)}
    edit_index(folder, lambda shards: shards[0]["raw_data"].update(hashes=hashes))


DAMAGE = {
    "missing": (lambda folder: first_shard(folder).unlink(), "is missing. Fetch or build it again"),
    "cut off": (lambda folder: os.truncate(first_shard(folder), 100), "size is 100 bytes; expected"),
    "one bit": (flip_a_byte, "is corrupt, its xxh64 differs from the index"),
    "no hash": (lambda folder: edit_index(folder, lambda s: s[0]["raw_data"].update(hashes={})), "no hash of it"),
    "number of samples": (
        lambda folder: edit_index(folder, lambda shards: shards[0].update(samples=3)),
        "; expected 3.",
    ),
    "records": (forge_samples, "sample 0: id 'q0': "),
    "manifest": (lambda folder: (folder / "build.json").write_text("{}"), "build.json: damaged"),
    "other index": (
        lambda folder: (folder / "index.json").write_text((folder / "index.json").read_text() + " "),
        "build.json: belongs to another index.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_reports_the_shard_and_the_problem(source, tmp_path, damage):
    folder, lines = build(tmp_path / "set", source, compression=None), []
    apply, message_part = DAMAGE[damage]
    apply(folder)
    problems = verify_shards(folder, records=True, report=lines.append).problems
    assert problems == lines != []
    assert message_part in "\n".join(problems)
    assert all(problem.startswith(f"{folder}/") for problem in problems)


def test_verify_of_compressed_shards_reports_the_compressed_file(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "set")
    flip_a_byte(folder)
    problems = verify_shards(folder, report=report_nothing).problems
    assert [first_shard(folder).name in problem for problem in problems] == [True]


# Damage → (content, part of the error).
DAMAGED_INDEXES = {
    "empty": ("", "invalid JSON"),
    "cut off": ('{"version": 2, "shards": [{"col', "invalid JSON"),
    "a list": ("[]", "there is no list under 'shards'"),
    "another version": ('{"version": 3, "shards": []}', "version is 3; expected 2"),
    "no object": ('{"version": 2, "shards": [1]}', "shards[0]: the entry is int"),
}
DAMAGED_ENTRIES = {
    "up and out": (("zip_data", "basename"), "../../etc/passwd", "is not inside the set"),
    "from the root": (("zip_data", "basename"), "/etc/passwd", "is not inside the set"),
    "of Windows": (("raw_data", "basename"), "..\\x.mds", "is not inside the set"),
    "a drive": (("raw_data", "basename"), "c:x.mds", "is not inside the set"),
    "hidden steps": (("raw_data", "basename"), "a/../../x", "is not inside the set"),
    "no name": (("raw_data", "basename"), "", "is not inside the set"),
    "no text": (("raw_data", "basename"), 7, "is not inside the set"),
    "negative size": (("raw_data", "bytes"), -1, "raw_data.bytes: is -1"),
    "size as text": (("zip_data", "bytes"), "9", "zip_data.bytes: is '9'"),
    "true samples": (("samples",), True, "samples: is True"),
    "no samples": (("samples",), None, "samples: is None"),
    "pickled columns": (("column_encodings",), ["pkl"] * 9, "columns are"),
    "fixed sizes": (("column_sizes",), [8] * 9, "column sizes"),
    "other columns": (("column_names",), ["x"], "expected docids (json)"),
    "json shards": (("format",), "json", "expected version 2 and format 'mds'"),
    "hashes": (("raw_data", "hashes"), {"xxh64": 1}, "hashes: xxh64 is 1"),
    "compression": (("compression",), None, "does not match its file"),
}


@pytest.mark.parametrize("damage", DAMAGED_INDEXES)
def test_a_damaged_index_is_an_error_with_a_remedy(whole, tmp_path, damage):
    text, message_part = DAMAGED_INDEXES[damage]
    folder = shutil.copytree(whole, tmp_path / "set")
    (folder / "index.json").write_text(text)
    for look in (verify_shards, shards_info):
        with pytest.raises(ShardError) as caught:
            look(folder)
        assert str(caught.value).startswith(f"{folder}/index.json")
        assert message_part in str(caught.value) and "rebuild the set" in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGED_ENTRIES)
def test_an_invalid_index_entry_is_refused(whole, damage):
    keys, value, message_part = DAMAGED_ENTRIES[damage]
    index = json.loads((whole / "index.json").read_text())
    entry = index["shards"][1]
    for key in keys[:-1]:
        entry = entry[key]
    entry[keys[-1]] = value
    with pytest.raises(ShardError) as caught:
        parse_index(json.dumps(index), "somewhere")
    assert str(caught.value).startswith("somewhere:shards[1]")
    assert message_part in str(caught.value)


def test_a_file_listed_twice_is_refused(whole):
    index = json.loads((whole / "index.json").read_text())
    index["shards"].append(index["shards"][0])
    with pytest.raises(ShardError, match="listed twice"):
        parse_index(json.dumps(index), "somewhere")


def test_a_set_without_an_index_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(ShardError, match=r"there is no index.*shards build.*shards merge"):
        verify_shards(tmp_path)


ANYTHING = (
    st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text()) | st.dictionaries(st.text(), st.text())
)


@given(data=st.data(), anything=ANYTHING)
def test_any_index_gives_shards_or_a_shard_error(whole, data, anything):
    index = json.loads((whole / "index.json").read_text())
    node, key = index, "shards"
    for _ in range(data.draw(st.integers(0, 4))):  # walk down to some place and put something else there
        child = node[key]
        keys = list(child) if isinstance(child, dict) else list(range(len(child))) if isinstance(child, list) else []
        if not keys:
            break
        node, key = child, data.draw(st.sampled_from(keys))
    node[key] = anything
    try:
        shards = parse_index(json.dumps(index), "somewhere")
    except ShardError as error:
        assert str(error).startswith("somewhere")
    else:
        assert all(".." not in Path(shard.published.basename).parts for shard in shards)


@given(text=st.text() | st.binary())
def test_any_manifest_gives_a_manifest_or_a_shard_error(text):
    with pytest.raises(ShardError, match="somewhere"):
        parse_manifest(text, "somewhere")
