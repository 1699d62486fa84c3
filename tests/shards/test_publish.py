"""Sets of shards in an object store: the index is uploaded last, and an interrupted upload resumes."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from support.list_shards import build_from_file, report_nothing
from support.s3_server import S3Server, s3_server
from support.synthetic_records import conversation, write_jsonl

from rankllm_composer.errors import ShardError, StoreError
from rankllm_composer.shards.build import index_exists
from rankllm_composer.shards.publish import merge_shards
from rankllm_composer.shards.verify import shards_info, verify_shards
from rankllm_composer.storage.object_store import RemoteFolder, is_remote, open_folder, s3_etag, without_credentials

NUM_RECORDS = 40


SMALL = {"shard_bytes": 5_000}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A file of 40 records."""
    layouts = [conversation(i, num_candidates=2 + i % 5) for i in range(NUM_RECORDS)]
    return write_jsonl(tmp_path_factory.mktemp("source") / "train.jsonl", layouts)


@pytest.fixture(scope="module")
def local(source, tmp_path_factory) -> Path:
    """The set of them on disk."""
    folder = tmp_path_factory.mktemp("sets") / "local"
    build_from_file(folder, source, **SMALL)
    return folder


@pytest.fixture(scope="module")
def running_server():
    with s3_server() as server:
        yield server


@pytest.fixture
def server(running_server, request, tmp_path, monkeypatch) -> S3Server:
    """The server with an empty bucket, which stores whatever comes; the temporary folder is the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    running_server.puts.clear()
    running_server.on_put = lambda key: None
    running_server.bucket = f"bucket-{abs(hash(request.node.name))}"
    running_server.client().create_bucket(Bucket=running_server.bucket)
    return running_server


def names_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def test_a_set_in_the_store_is_the_set_on_disk(server, source, local, tmp_path):
    url = f"s3://{server.bucket}/deep/set/"
    built = build_from_file(url, source, **SMALL)
    assert {key.removeprefix("deep/set/"): size for key, size in server.keys(server.bucket).items()} == names_of(local)
    assert server.puts[-1] == "deep/set/index.json"
    assert built.stats.num_records == NUM_RECORDS
    assert index_exists(url)
    assert not list(tmp_path.rglob("shard*"))  # what was built before the upload is gone
    assert verify_shards(url, records=True).problems == []
    assert shards_info(url).num_records == NUM_RECORDS
    num_puts = len(server.puts)
    assert build_from_file(url, source, **SMALL).existed
    assert len(server.puts) == num_puts


def test_streaming_reads_a_set_from_the_store(server, source, tmp_path):
    from streaming import StreamingDataset

    build_from_file(f"s3://{server.bucket}/set", source, **SMALL)
    dataset = StreamingDataset(remote=f"s3://{server.bucket}/set", local=str(tmp_path / "cache"), batch_size=1)
    assert [dataset[i]["id"] for i in range(len(dataset))] == [f"q{i}" for i in range(NUM_RECORDS)]


BUILD = """
from rankllm_composer.options import BuildOptions, SourceOptions
from rankllm_composer.shards.build import build_shards
build_shards({url!r}, SourceOptions(input={source!r}), BuildOptions(shard_bytes=5_000, num_processes=1))
"""


def test_a_killed_upload_leaves_no_index_and_resumes(server, source, local):
    url = f"s3://{server.bucket}/set"
    stalled = threading.Event()
    release = threading.Event()

    def stall_later_shards(key: str) -> int | None:
        if len(server.puts) > 5:
            stalled.set()
            release.wait(60)
            return 503
        return None

    server.on_put = stall_later_shards
    upload = subprocess.Popen([sys.executable, "-c", BUILD.format(url=url, source=str(source))])
    assert stalled.wait(120)
    upload.send_signal(signal.SIGKILL)
    upload.wait()
    release.set()
    stored = set(server.keys(server.bucket))
    assert stored and "set/index.json" not in stored
    assert not index_exists(url)

    server.on_put = lambda key: None
    server.puts.clear()
    lines: list[str] = []
    build_from_file(url, source, **(SMALL | {"report": lines.append}))
    assert not stored & set(server.puts)  # nothing twice
    assert server.puts[-1] == "set/index.json"
    assert any(f"{len(stored)} of" in line and "stored already" in line for line in lines)
    assert not any("records/s" in line for line in lines)  # nor built twice
    assert {key.removeprefix("set/"): size for key, size in server.keys(server.bucket).items()} == names_of(local)


def test_a_store_that_refuses_is_an_error_that_says_how_to_go_on(server, source, local):
    url = f"s3://{server.bucket}/set"
    victim = max(path.name for path in local.glob("shard.*"))
    server.on_put = lambda key: 403 if key.endswith(victim) else None
    with pytest.raises(StoreError, match=r"cannot be uploaded: .*403.*rerun the same command"):
        build_from_file(url, source, **SMALL)
    assert "set/index.json" not in server.keys(server.bucket)
    server.on_put = lambda key: None
    build_from_file(url, source, **SMALL)
    assert verify_shards(url).problems == []


def test_a_shard_spoilt_in_the_store_is_found_and_uploaded_again(server, source, local):
    url, client = f"s3://{server.bucket}/set", server.client()
    build_from_file(url, source, **SMALL)
    first, second, *_ = sorted(path.name for path in local.glob("shard.*"))
    spoilt = (local / first).read_bytes()[::-1]  # the same size
    client.put_object(Bucket=server.bucket, Key=f"set/{first}", Body=spoilt)
    client.delete_object(Bucket=server.bucket, Key=f"set/{second}")
    problems = verify_shards(url, report=report_nothing).problems
    assert [first in problems[0] and "corrupt" in problems[0], second in problems[1] and "missing" in problems[1]]
    server.puts.clear()
    build_from_file(url, source, **SMALL)  # a missing shard makes the set incomplete
    assert {f"set/{first}", f"set/{second}"} <= set(server.puts)
    assert verify_shards(url, records=True).problems == []


def test_another_set_in_the_store_is_replaced_only_with_overwrite(server, source):
    url = f"s3://{server.bucket}/set"
    build_from_file(url, source, **SMALL)
    before = set(server.keys(server.bucket))
    with pytest.raises(ShardError, match="contains another set"):
        build_from_file(url, source, **(SMALL | {"shard_bytes": 9_000}))
    lines: list[str] = []
    build_from_file(url, source, overwrite=True, **(SMALL | {"shard_bytes": 9_000, "report": lines.append}))
    assert verify_shards(url).problems == []
    assert shards_info(url).manifest.options["shard_bytes"] == 9_000
    shards = {name for name in before if "shard." in name}
    left = set(server.keys(server.bucket))  # a set of its own, without the shards that were replaced
    assert not shards & left and {f"set/{name}" for name in ("index.json", "build.json")} < left
    assert lines[-1].startswith(
        f"{url}: removed {len(shards)} shards of the set that was replaced, such as shard.00000"
    )


def test_parts_in_the_store_are_merged_there(server, source):
    url = f"s3://{server.bucket}/set"
    build_from_file(url, source, part="1/2", **SMALL)
    with pytest.raises(ShardError, match="part-2-of-2: this part is missing"):
        merge_shards(url)
    build_from_file(url, source, part="2/2", **SMALL)
    assert not index_exists(url)
    assert merge_shards(url, report=report_nothing).stats.num_records == NUM_RECORDS
    assert server.puts[-1] == "set/index.json"
    assert verify_shards(url, records=True).problems == []


@pytest.mark.parametrize("look", [verify_shards, shards_info, index_exists, merge_shards])
def test_a_bucket_that_is_not_there_says_what_to_check(server, look):
    with pytest.raises(StoreError, match=r"s3://no-such-bucket/set: cannot be reached: .*S3_ENDPOINT_URL"):
        look("s3://no-such-bucket/set")


def test_a_scheme_nobody_knows_is_an_error():
    with pytest.raises(StoreError, match="cannot be reached"):
        index_exists("gopher://host/set")


def test_files_are_listed_read_and_fetched_by_name(server, tmp_path):
    folder = open_folder(f"s3://{server.bucket}", "a", "b")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y.txt").write_bytes(b"text")
    assert folder.files() == {}
    folder.put(tmp_path, ["x/y.txt"], report_nothing)
    (name, stored), *_ = folder.files().items()
    assert (name, stored.num_bytes) == ("x/y.txt", 4)
    assert stored.etag == s3_etag(tmp_path / "x" / "y.txt")
    assert folder.read("x/y.txt") == b"text"
    assert folder.read("x/z.txt") is None
    assert folder.fetch("x/y.txt", tmp_path / "scratch").read_bytes() == b"text"
    assert not folder.fetch("x/z.txt", tmp_path / "scratch").exists()


@pytest.mark.parametrize("num_bytes", [0, 1, (8 << 20) - 1, 8 << 20, (16 << 20) + 5])
def test_the_entity_tag_of_an_upload_is_foreseen(server, tmp_path, num_bytes):
    (tmp_path / "file").write_bytes(b"x" * num_bytes)
    folder = RemoteFolder(f"s3://{server.bucket}/set")
    folder.put(tmp_path, ["file"], report_nothing)
    assert folder.files()["file"].etag == s3_etag(tmp_path / "file")
    server.puts.clear()
    folder.put(tmp_path, ["file"], report_nothing)
    assert server.puts == []


@pytest.mark.parametrize(
    ("target", "remote"),
    [
        ("s3://b/x", True),
        ("gs://b", True),
        ("dbfs:/Volumes/x", True),
        ("out", False),
        ("/out", False),
        ("a/b:c", False),
    ],
)
def test_a_url_is_message_part_from_a_path(target, remote):
    assert is_remote(target) is remote
    assert not is_remote(Path(target))


def test_credentials_never_show():
    url = "s3://key:secret@host/set?X-Amz-Signature=abc#frag"
    assert without_credentials(url) == "s3://host/set"
    assert open_folder(url).name == "s3://host/set"
