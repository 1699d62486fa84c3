"""Streams are checked before training: every error names the folder, the shard and a fix."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
from support.list_shards import damage, write_shards
from support.s3_server import s3_server

from rankllm_composer.data.streams import Stream, check_stream, check_streams
from rankllm_composer.errors import ShardError, StoreError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A set of 10 lists in 3 compressed shards; tests copy it."""
    return write_shards(tmp_path_factory.mktemp("written") / "set", range(10))


@pytest.fixture()
def shards(written, tmp_path):
    return shutil.copytree(written, tmp_path / "set")


def packed(folder, part):
    return folder / f"{part:02}" / "shard.00000.mds.zstd"


def test_contents_of_a_complete_set(shards, tmp_path):
    contents = check_stream(Stream(local=str(shards)))
    largest = max(
        entry["raw_data"]["bytes"] + entry["zip_data"]["bytes"]
        for entry in json.loads((shards / "index.json").read_text())["shards"]
    )
    assert (contents.num_samples, contents.largest_shard_bytes, contents.hash_algorithm) == (10, largest, "xxh64")
    same = check_stream(Stream(local=str(tmp_path / "cache"), remote=str(shards)))
    assert same == contents
    other = write_shards(tmp_path / "other", range(1, 11))
    assert check_stream(Stream(local=str(other))).fingerprint != contents.fingerprint


FAULTS = {
    "no index": (lambda s: (s / "index.json").unlink(), r"index", r"rankllm-composer shards build"),
    "damaged index": (lambda s: (s / "index.json").write_text('{"ver'), r"damaged, invalid JSON", "Fetch it again"),
    "missing shard": (
        lambda s: packed(s, 1).unlink(),
        r"1 of 3 shards .* 01/shard\.00000\.mds\.zstd is missing",
        "verify",
    ),
    "short shard": (lambda s: packed(s, 2).write_bytes(b"abc"), r"02/shard\.00000\.mds\.zstd has 3 bytes of", "verify"),
    "path outside": (
        lambda s: (s / "index.json").write_text((s / "index.json").read_text().replace("02/shard", "../shard")),
        r"the path '\.\./shard\.00000\.mds",
        "Do not use this index",
    ),
    "no shards": (lambda s: (s / "index.json").write_text('{"version": 2, "shards": []}'), "lists no shards", "build"),
}


@pytest.mark.parametrize("cached", [False, True], ids=["in place", "cached"])
@pytest.mark.parametrize("fault", FAULTS)
def test_incomplete_sets_are_errors(fault, cached, shards, tmp_path):
    cause, found, remedy = FAULTS[fault]
    cause(shards)
    stream = Stream(local=str(tmp_path / "cache"), remote=str(shards)) if cached else Stream(local=str(shards))
    with pytest.raises(ShardError, match=found) as error:
        check_stream(stream, store_patience_seconds=0)
    assert str(shards) in str(error.value) and remedy in str(error.value)


def test_missing_hashes_are_logged(tmp_path, caplog):
    shards = write_shards(tmp_path / "set", range(3), hashes=())
    with caplog.at_level(logging.WARNING):
        assert check_stream(Stream(local=str(shards))).hash_algorithm is None
    assert "damage inside a shard cannot be detected" in caplog.text


@pytest.fixture()
def cache(shards, tmp_path):
    """A cache with the complete set."""
    return shutil.copytree(shards, tmp_path / "cache")


def test_broken_files_are_removed_from_the_cache(shards, cache):
    packed(cache, 0).write_bytes(b"abc")
    partial = packed(cache, 1).with_name("shard.00000.mds.tmp")
    partial.write_bytes(b"abc")
    (cache / "index.json.tmp").write_text("{")
    check_stream(Stream(local=str(cache), remote=str(shards)))
    assert not packed(cache, 0).exists() and packed(cache, 1).exists() and packed(cache, 2).exists()
    assert not partial.exists() and not (cache / "index.json.tmp").exists()


def test_leftovers_of_killed_downloads_are_removed_from_the_cache(shards, cache):
    ends = (".0123456789abcdef", ".0123456789abcdef.tmp", ".zstd.1a2B3c4D", ".zstd.tmp")
    for end in ends:
        (cache / "01" / f"shard.00000.mds{end}").write_text("x")
    (cache / "01" / "notes.txt").write_text("x")
    before = {path for path in cache.rglob("*") if not path.name.endswith(ends)}
    check_stream(Stream(local=str(cache), remote=str(shards)))
    assert set(cache.rglob("*")) == before


def test_a_link_out_of_a_cache_is_not_followed(shards, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "shard.00000.mds.zstd").write_text("precious")
    cache = tmp_path / "links"
    cache.mkdir()
    (cache / "01").symlink_to(outside)
    with pytest.raises(StoreError, match=r"links: the file '01/shard.* is .*outside/shard.*, outside the folder"):
        check_stream(Stream(local=str(cache), remote=str(shards)))
    assert (outside / "shard.00000.mds.zstd").read_text() == "precious"


def test_a_damaged_cached_index_is_fetched_again(shards, cache):
    (cache / "index.json").write_text("{")
    check_stream(Stream(local=str(cache), remote=str(shards)))
    assert (cache / "index.json").read_text() == (shards / "index.json").read_text()


def test_a_cache_of_another_set_is_an_error(cache, tmp_path):
    other = write_shards(tmp_path / "other", range(5))
    with pytest.raises(ShardError, match=r"cache folder .*cache: it holds shards of another set than .*other"):
        check_stream(Stream(local=str(cache), remote=str(other)))
    check_stream(Stream(local=str(cache), remote=str(other), renew=True))  # data.train.rebuild
    assert (cache / "index.json").read_text() == (other / "index.json").read_text()
    assert not list(cache.rglob("shard*"))


def test_files_in_place_are_never_removed(shards):
    packed(shards, 0).write_bytes(b"abc")
    with pytest.raises(ShardError):
        check_stream(Stream(local=str(shards), remote=f"{shards}/."))  # the remote is the folder itself
    assert packed(shards, 0).read_bytes() == b"abc"


def test_credentials_are_not_shown():
    stream = Stream(local="cache", remote="sftp://me:secret@host/set")
    assert stream.place == "sftp://host/set"
    with pytest.raises(StoreError) as error:
        check_stream(stream, store_patience_seconds=0, download_timeout_seconds=1)
    assert "secret" not in str(error.value) and "sftp://host/set" in str(error.value)


def test_object_store(shards, tmp_path):
    with s3_server() as server:
        client = server.client()
        client.create_bucket(Bucket="lists")
        for path in sorted(p for p in shards.rglob("*") if p.is_file()):
            client.upload_file(str(path), "lists", f"deep/set/{path.relative_to(shards)}")
        stream = Stream(local=str(tmp_path / "cache"), remote="s3://lists/deep/set")
        assert check_streams([stream])[0] == check_stream(Stream(local=str(shards)))

        client.put_object(Bucket="lists", Key="deep/set/01/shard.00000.mds.zstd", Body=b"abc")
        client.delete_object(Bucket="lists", Key="deep/set/02/shard.00000.mds.zstd")
        expected = r"s3://lists/deep/set: 2 of 3 shards .*01/.* has 3 bytes of \d+, 02/.* is missing"
        with pytest.raises(ShardError, match=expected):
            check_streams([stream])

        nowhere = Stream(local=str(tmp_path / "cache2"), remote="s3://lists/nowhere")
        with pytest.raises(ShardError, match=r"s3://lists/nowhere/index\.json: there is no index, so the set"):
            check_streams([nowhere], store_patience_seconds=0)


def test_damage_that_keeps_the_size_is_not_detected_yet(shards):
    damage(packed(shards, 1))
    check_stream(Stream(local=str(shards)))
