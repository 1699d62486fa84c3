"""Operations on a store that fail for the moment or for good, and names of files that lead out of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import zstd
from botocore.exceptions import ClientError, EndpointConnectionError, ReadTimeoutError
from streaming.base.compression import compress

from rankllm_composer.errors import StoreError
from rankllm_composer.shards.unpack import unpack
from rankllm_composer.storage.object_store import LocalFolder, inside
from rankllm_composer.storage.patience import is_absent, is_transient, patiently


def answered(status: int, code: str = "") -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


def wrapped(error: Exception) -> Exception:
    """An error raised while another one was handled, as boto3's upload does."""
    try:
        try:
            raise error
        except Exception:
            raise ValueError("upload failed")  # noqa: B904
    except ValueError as outer:
        return outer


GONE_SOON = [
    answered(503, "SlowDown"),
    answered(500, "InternalError"),
    answered(400, "RequestTimeout"),
    answered(429),
    wrapped(answered(503)),
    EndpointConnectionError(endpoint_url="http://x"),
    ReadTimeoutError(endpoint_url="http://x"),
    ConnectionResetError(),
    TimeoutError(),
]
FOR_GOOD = [
    answered(403, "AccessDenied"),
    answered(404, "NoSuchKey"),
    OSError(28, "full"),
    ValueError("no"),
    KeyError(),
]


@pytest.mark.parametrize("error", [*GONE_SOON, *FOR_GOOD], ids=repr)
def test_only_what_may_be_gone_soon_is_tried_again(error):
    tries = []

    def operation() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise error
        return "done"

    assert is_transient(error) == (error in GONE_SOON)
    assert is_absent(error) == (error is FOR_GOOD[1])
    if error in GONE_SOON:
        assert patiently(operation, "a test", seconds=60) == "done"
        tries.clear()
    with pytest.raises(type(error)):
        patiently(operation, "a test", seconds=0 if error in GONE_SOON else 60)
    assert tries == [1]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "link/x", "loop", "."])
def test_no_file_outside_its_folder_is_touched(tmp_path, name):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "within").symlink_to(folder)
    (tmp_path / "x").write_text("outside")
    (folder / "loop").symlink_to(folder / ".." / "set")
    with pytest.raises(StoreError, match=r"outside the folder\. Do not use it"):
        LocalFolder(folder).read(name)
    with pytest.raises(StoreError, match="outside the folder"):
        LocalFolder(folder).write(name, "new")
    assert (tmp_path / "x").read_text() == "outside"
    assert inside(folder, "within/y") == folder / "within" / "y"  # a link that stays inside
    alias = tmp_path / "alias"
    alias.symlink_to(folder)
    assert inside(alias, "y") == Path(alias, "y")  # the folder itself may be reached by a link


@pytest.mark.parametrize("compression", ["zstd", "zstd:7", "gz", "br", "bz2", "snappy"])
def test_a_shard_unpacks_to_the_size_of_its_index_or_not_at_all(compression):
    data = bytes(range(256)) * 999
    packed = compress(compression, data)
    assert unpack(packed, compression, len(data)) == data
    for num_bytes in (len(data) - 1, len(data) + 1, 10):
        with pytest.raises(ValueError, match=r"unpacks to .* bytes; expected|cannot be decompressed"):
            unpack(packed, compression, num_bytes)
    with pytest.raises(ValueError, match=r"cannot be decompressed|unpacks to"):
        unpack(packed[: len(packed) // 2], compression, len(data))


def test_a_bomb_uses_no_more_memory_than_the_index_tells():
    import pyarrow

    bomb = zstd.compress(bytes(1 << 26), 19)
    assert len(bomb) < 1 << 14
    before = pyarrow.default_memory_pool().max_memory()
    with pytest.raises(ValueError, match=r"unpacks to more than 1,000,000 bytes; expected 1,000,000 by the index"):
        unpack(bomb, "zstd", 1_000_000)
    assert pyarrow.default_memory_pool().max_memory() - before < 1 << 23
