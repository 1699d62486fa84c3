"""Streams of shards, checked before training: every shard of the index exists and has the right size.

A missing or damaged shard would end an epoch early, in the middle of a long run and without an error. Therefore the
size of every shard is requested before the first batch, from the folder or the object store that holds it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rankllm_composer.data.shared_memory import claim_cache
from rankllm_composer.errors import RankLLMComposerError, ShardError, shell_line
from rankllm_composer.screen import get_logger
from rankllm_composer.shards.index import INDEX_NAME, Shard, ShardFile, dump_index, read_index
from rankllm_composer.shards.manifest import read_set
from rankllm_composer.storage.atomic import write_atomic
from rankllm_composer.storage.object_store import (
    Folder,
    LocalFolder,
    RemoteFolder,
    inside,
    is_remote,
    isolate_client_rng,
    without_credentials,
)
from rankllm_composer.storage.patience import PATIENCE_SECONDS, patiently

log = get_logger(__name__)
_PARALLEL_REQUESTS = 16
_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class Stream:
    """A set of shards.

    Args:
        local: folder that holds the shards, or the cache of `remote`.
        remote: folder or URL that holds the shards; None = they are in `local`.
        proportion: share of the samples of an epoch; None for all streams = every sample of every stream once.
        renew: replace shards of another set in the cache; False = they are an error.
    """

    local: str
    remote: str | None = None
    proportion: float | None = None
    renew: bool = False

    @property
    def is_cache(self) -> bool:
        """True if `local` holds copies that may be removed."""
        return self.remote is not None and os.path.realpath(self.remote) != os.path.realpath(self.local)

    @property
    def place(self) -> str:
        """Folder or URL of the shards, without user name and password; for messages."""
        return without_credentials(self.root)

    @property
    def root(self) -> str:
        """Folder or URL that holds the shards."""
        return self.remote if self.remote is not None and self.is_cache else self.local


@dataclass(frozen=True, slots=True)
class StreamContents:
    """Contents of a stream, by its index.

    Attributes:
        num_samples: lists in all shards.
        largest_shard_bytes: bytes of the largest shard, compressed and decompressed.
        hash_algorithm: a hash that the index has for every file; None = damage inside a file cannot be detected.
        fingerprint: hash of names, sizes and hashes; it differs between sets and between builds of a set.
    """

    num_samples: int
    largest_shard_bytes: int
    hash_algorithm: str | None
    fingerprint: str


def check_streams(
    streams: Sequence[Stream], store_patience_seconds: float = PATIENCE_SECONDS, download_timeout_seconds: float = 60
) -> tuple[StreamContents, ...]:
    """Check all streams once per node; return the result, or raise ShardError, on every rank. A collective."""
    from streaming.base.distributed import all_gather_object, get_local_rank

    if any(is_remote(stream.root) for stream in streams):
        isolate_client_rng()
    found: tuple[StreamContents, ...] = ()
    error = None
    if get_local_rank() == 0:
        try:
            found = tuple(check_stream(stream, store_patience_seconds, download_timeout_seconds) for stream in streams)
        except RankLLMComposerError as raised:
            error = str(raised)
    answers = all_gather_object((found, error))
    for _, error in answers:
        if error is not None:
            raise ShardError(error)
    differing = list(dict.fromkeys(found for found, _ in answers if found))
    if len(differing) > 1:
        places = ", ".join(stream.place for stream in streams)
        raise ShardError(f"{places}: the nodes of this run have different shards. Copy one set to all of them.")
    return differing[0]


def check_stream(
    stream: Stream, store_patience_seconds: float = PATIENCE_SECONDS, download_timeout_seconds: float = 60
) -> StreamContents:
    """Check that a stream is complete: a valid index, paths inside the folder, and every shard of the right size.

    Files of the wrong size are removed from a cache. Contents are not read; hashes are checked when a shard is used.
    The timeout applies to fetching the index.

    Raises:
        ShardError: the index is missing, damaged or of another build than `build.json`, shards are missing or have
            another size, or another run or another set uses the cache.
        StoreError: the store cannot be read, or a path leads out of the set or its cache, also through a link.
    """
    if stream.is_cache:
        if claim_cache(stream.local) is None:
            raise ShardError(
                f"cache folder {stream.local}: another running process uses it. End that run, or set another folder "
                "(data.train.local)."
            )
        if is_remote(stream.root):
            folder: Folder = RemoteFolder(stream.root, "", store_patience_seconds, download_timeout_seconds)
        else:
            folder = LocalFolder(Path(stream.root))
        shards, _ = read_set(folder)
    else:
        shards, _ = read_set(LocalFolder(Path(stream.local)))
    for place in {stream.local, stream.local if is_remote(stream.root) else stream.root}:
        for file in _files(shards):
            inside(Path(place), file.basename)
    if stream.is_cache:
        try:
            _prepare_cache(stream, shards)
        except OSError as error:
            raise ShardError(
                f"cache folder {stream.local}: cannot be written ({error.strerror}). Free space, correct the "
                "permissions, or set another folder (data.train.local)."
            ) from error
    if not shards:
        raise ShardError(f"{stream.place}: the index lists no shards. Build the set (rankllm-composer shards build).")
    _check_sizes(stream, shards, store_patience_seconds)
    algorithm = _hash_algorithm(shards)
    if algorithm is None:
        log.warning("%s: the index has no hashes, so damage inside a shard cannot be detected", stream.place)
    files = [(s.published.basename, s.published.num_bytes, sorted(s.published.hashes.items())) for s in shards]
    return StreamContents(
        num_samples=sum(shard.num_samples for shard in shards),
        largest_shard_bytes=max(s.raw.num_bytes + (s.packed.num_bytes if s.packed else 0) for s in shards),
        hash_algorithm=algorithm,
        fingerprint=hashlib.blake2b(repr(files).encode(), digest_size=8).hexdigest(),
    )


def _prepare_cache(stream: Stream, shards: Sequence[Shard]) -> None:
    """Remove from a cache what is incomplete or damaged; raise ShardError if it holds another set."""
    folder = Path(stream.local)
    cached = folder / INDEX_NAME
    cached_shards: Sequence[Shard] | None = None
    try:
        cached_shards = read_index(cached) if cached.exists() else None
    except ShardError:
        log.warning("%s is damaged; fetching it again", cached)
    if cached_shards is not None and cached_shards != shards:
        if not stream.renew:
            raise ShardError(
                f"cache folder {stream.local}: it holds shards of another set than {stream.place}, or of an earlier "
                "build. Remove the folder, or set another one (data.train.local)."
            )
        for file in _files(cached_shards):
            inside(folder, file.basename).unlink(missing_ok=True)
    paths = {folder / file.basename for file in _files(shards)}
    for path in [path for parent in {path.parent for path in paths} for path in parent.glob("*")]:
        if path not in paths and not paths.isdisjoint({path.with_suffix(""), path.with_suffix("").with_suffix("")}):
            path.unlink()  # of a killed download or decompression
    for file in _files(shards):
        path = folder / file.basename
        if path.is_file() and path.stat().st_size != file.num_bytes:
            log.warning("%s has %d of %d bytes; fetching it again", path, path.stat().st_size, file.num_bytes)
            path.unlink()
    cached.with_name(f"{INDEX_NAME}.tmp").unlink(missing_ok=True)
    if cached_shards != shards:  # streaming would fetch the index without a check
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(cached, dump_index([shard.entry for shard in shards]))


def _files(shards: Sequence[Shard]) -> Iterator[ShardFile]:
    """Every file that a set may have, compressed or not."""
    return (file for shard in shards for file in (shard.raw, shard.packed) if file is not None)


def _check_sizes(stream: Stream, shards: Sequence[Shard], store_patience_seconds: float) -> None:
    files = [shard.published for shard in shards]
    try:
        size_of = _size_reader(stream)
        if size_of is None:
            log.warning("%s: this store does not report sizes; shards are checked as they are fetched", stream.place)
            return
        with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
            what = f"{stream.place}: the sizes of the shards cannot be read"
            names = [file.basename for file in files]
            sizes = [*pool.map(lambda name: patiently(lambda: size_of(name), what, store_patience_seconds), names)]
    except Exception as error:  # each backend raises different errors
        raise ShardError(
            f"{stream.place}: the sizes of the shards cannot be read: {cause(error, stream)}. Check the URL, the "
            "credentials and the network."
        ) from error
    bad = [
        f"{file.basename} is missing" if size is None else f"{file.basename} has {size} bytes of {file.num_bytes}"
        for file, size in zip(files, sizes)
        if size != file.num_bytes
    ]
    if bad:
        named = ", ".join(bad[:_MOST_NAMED]) + (", …" if len(bad) > _MOST_NAMED else "")
        verify = shell_line("rankllm-composer", "shards", "verify", stream.place)
        raise ShardError(
            f"{stream.place}: {len(bad)} of {len(files)} shards do not match the index: {named}. Find the damage "
            f"({verify}), then build or upload these shards again."
        )


def _size_reader(stream: Stream) -> Callable[[str], int | None] | None:
    """Return a function from a path in the set to bytes (None = missing), or None if the store reports no sizes."""
    root = stream.root
    if not is_remote(root):
        return lambda basename: path.stat().st_size if (path := Path(root) / basename).is_file() else None

    from composer.utils import S3ObjectStore, maybe_create_object_store_from_uri, parse_uri

    try:
        store = maybe_create_object_store_from_uri(root)
    except NotImplementedError:
        return None
    _, bucket, prefix = parse_uri(root)

    def size_of_object(basename: str) -> int | None:
        name = f"{prefix.rstrip('/')}/{basename}".lstrip("/")
        if not isinstance(store, S3ObjectStore):
            try:
                return store.get_object_size(name)  # type: ignore[union-attr]
            except FileNotFoundError:
                return None
        from botocore.exceptions import ClientError

        try:  # Composer's method opens the object
            return int(store.client.head_object(Bucket=bucket, Key=name)["ContentLength"])
        except ClientError as error:
            if error.response["Error"]["Code"] in ("404", "NoSuchKey"):
                return None
            raise

    return size_of_object


def _hash_algorithm(shards: Sequence[Shard]) -> str | None:
    from streaming.base.hashing import is_hash

    common = set.intersection(*(set(file.hashes) for file in _files(shards)))
    # The xx family is several times faster, and detecting damage needs no cryptographic hash.
    return next(iter(sorted(filter(is_hash, common), key=lambda name: (not name.startswith("xx"), name))), None)


def cause(error: BaseException, stream: Stream) -> str:
    """Return an error of a library as one line, without the credentials of the stream's URL."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text.replace(stream.root, stream.place)}"
