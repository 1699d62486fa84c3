"""The content of a shard's files: compared with the index, and decompressed to at most the size that it gives."""

from __future__ import annotations

from rankllm_composer.shards.index import ShardFile

# Codecs of pyarrow by streaming's names. They unpack piece by piece, streaming's own whole files of any size.
_CODECS = {"zstd": "zstd", "gz": "gzip", "br": "brotli", "bz2": "bz2"}


def difference(data: bytes, file: ShardFile) -> str | None:
    """How the content of a file differs from its size and hashes in the index; None if it does not."""
    from streaming.base.hashing import get_hash, is_hash

    if len(data) != file.num_bytes:
        return f"size is {len(data):,} bytes; expected {file.num_bytes:,}"
    for algorithm, expected in file.hashes.items():
        if is_hash(algorithm) and get_hash(algorithm, data) != expected:
            return f"is corrupt, its {algorithm} differs from the index"
    return None


def unpack(data: bytes, compression: str, num_bytes: int) -> bytes:
    """Decompress the file of a shard.

    Args:
        compression: as in the index: zstd, gz, br, bz2 or snappy, possibly with a level.
        num_bytes: size of the result by the index.
    Raises:
        ValueError: the data are damaged, or unpack to another size; no more memory than that is used.
    """
    import pyarrow

    name = compression.partition(":")[0]
    try:
        if name == "snappy":
            if _snappy_size(data) != num_bytes:
                raise ValueError(f"unpacks to {_snappy_size(data):,} bytes; expected {num_bytes:,} by the index")
            return bytes(pyarrow.Codec(name).decompress(data, num_bytes))
        with pyarrow.input_stream(pyarrow.BufferReader(data), compression=_CODECS[name]) as stream:
            unpacked: bytes = stream.read(num_bytes + 1)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"cannot be decompressed: {error}") from error
    except KeyError:
        raise ValueError(f"compression is {compression!r}; expected {', '.join(_CODECS)} or snappy") from None
    if len(unpacked) != num_bytes:
        found = f"more than {num_bytes:,}" if len(unpacked) > num_bytes else f"{len(unpacked):,}"
        raise ValueError(f"unpacks to {found} bytes; expected {num_bytes:,} by the index")
    return unpacked


def _snappy_size(data: bytes) -> int:
    """Size of the result, which is written in front: seven bits a byte, the lowest first."""
    size = 0
    for place, byte in enumerate(data[:5]):
        size |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            break
    return size
