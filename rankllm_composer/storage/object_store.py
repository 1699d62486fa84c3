"""Folders on disk or in an object store, behind the same few operations.

Names of files may come from elsewhere, so no operation on disk leaves its folder, also through links. An operation on a
store is repeated for some time (see `patience`).

Transfers use streaming's uploaders and downloaders, so credentials and `S3_ENDPOINT_URL` are those of training. A file
counts as stored if size and checksum agree (S3-compatible stores) or if its name is listed (stores that list names
only); to a store that cannot list, everything is uploaded again.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit, urlunsplit

from rankllm_composer.errors import StoreError
from rankllm_composer.storage.atomic import write_atomic
from rankllm_composer.storage.patience import PATIENCE_SECONDS, is_absent, patiently
from rankllm_composer.storage.scratch import scratch_folder

UPLOAD_THREADS = 4

# These modules draw from Python's global random numbers, for pauses between retries and for temporary names.
_DRAWING_MODULES = (
    "botocore.retries.standard",
    "botocore.retryhandler",
    "botocore.utils",
    "s3transfer",
    "s3transfer.utils",
    "streaming.base.util",
)

# boto3 uploads larger files in pieces of this size; their entity tag is a hash of the pieces' hashes.
_S3_PIECE_BYTES = 8 << 20


class StoredFile(NamedTuple):
    """A file in a listing: size and S3's entity tag, None where the store does not list them."""

    num_bytes: int | None
    etag: str | None = None


class Folder(Protocol):
    """A folder on disk or in an object store. File names are relative, with "/" between their parts."""

    name: str
    """Path, or URL without credentials, for messages."""

    def files(self) -> dict[str, StoredFile] | None:
        """List every file below the folder; None if the store cannot list."""

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file; None if it does not exist."""

    def write(self, name: str, content: str | bytes) -> None:
        """Write a small file, complete or not at all."""

    def fetch(self, name: str, scratch: Path) -> Path:
        """Return a local path of the file, below `scratch` if it had to be downloaded. It may not exist."""

    def put(self, source: Path, names: Iterable[str], report: Callable[[str], None]) -> None:
        """Store files of the local folder `source`, each complete or not at all."""

    def remove(self, names: Iterable[str]) -> bool:
        """Remove files, which need not exist, in this order; return False where that is not possible."""


def is_remote(target: str | Path) -> bool:
    """True for a URL such as `s3://bucket/folder`, False for a path."""
    return re.match(r"[a-z][a-z0-9+.-]+:", str(target)) is not None and not isinstance(target, Path)


def without_credentials(url: str) -> str:
    """Remove user, password, query and fragment from a URL."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def open_folder(target: str | Path, *below: str) -> Folder:
    """Open the folder `target`, or one below it."""
    if is_remote(target):
        return RemoteFolder("/".join([str(target).rstrip("/"), *below]))
    return LocalFolder(Path(target, *below))


def inside(folder: Path, name: str) -> Path:
    """The path of a file by the name that a set, a checkpoint or a model gives it, relative to its folder.

    Raises:
        StoreError: the file would be outside the folder: by an absolute path, by "..", or by a link.
    """
    path = folder / name
    root, resolved = os.path.realpath(folder), os.path.realpath(path)
    if not resolved.startswith(f"{root.rstrip('/')}/"):
        raise StoreError(
            f"{folder}: the file {name!r} is {resolved}, outside the folder. Do not use it; of files of your own, "
            "replace the link by the file."
        )
    return path


def isolate_client_rng() -> None:
    """Give the S3 client and streaming a random number generator apart from Python's global one.

    They draw whenever a store keeps them waiting, and the random numbers of a run must not depend on that.
    """
    rng = random.Random()
    for name in _DRAWING_MODULES:
        module: Any = importlib.import_module(name)
        module.random = rng
    backoff: Any = importlib.import_module("botocore.retries.standard").ExponentialBackoff.__init__
    backoff.__defaults__ = tuple(rng.random if value == random.random else value for value in backoff.__defaults__)


class LocalFolder:
    """A folder on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)

    def files(self) -> dict[str, StoredFile]:
        files = [path for path in sorted(self.path.rglob("*")) if path.is_file()]
        return {path.relative_to(self.path).as_posix(): StoredFile(path.stat().st_size) for path in files}

    def read(self, name: str) -> bytes | None:
        try:
            return inside(self.path, name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(
                f"{self.path / name} cannot be read ({error.strerror}). Check the path and its permissions."
            ) from error

    def write(self, name: str, content: str | bytes) -> None:
        write_atomic(inside(self.path, name), content)

    def fetch(self, name: str, scratch: Path) -> Path:
        return inside(self.path, name)

    def put(self, source: Path, names: Iterable[str], report: Callable[[str], None]) -> None:
        """Move the files; `source` must be on the same file system."""
        for name in names:
            target = inside(self.path, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            (source / name).replace(target)

    def remove(self, names: Iterable[str]) -> bool:
        for name in names:
            inside(self.path, name).unlink(missing_ok=True)
        return True


class RemoteFolder:
    """A folder in an object store.

    Args:
        key: recipe key of the URL, with which messages begin.
        patience_seconds: how long an operation that fails for the moment is repeated.
        timeout_seconds: longest download of one file.
    """

    def __init__(
        self, url: str, key: str = "", patience_seconds: float = PATIENCE_SECONDS, timeout_seconds: float = 60
    ) -> None:
        self.url = url.rstrip("/")
        self._patience, self._timeout = patience_seconds, timeout_seconds
        self.name = without_credentials(self.url)
        self._prefix = f"{key}: {self.name}" if key else self.name
        parts = urlsplit(self.url)
        self._bucket, self._is_s3 = parts.netloc, parts.scheme == "s3"
        self._key_prefix = f"{parts.path.strip('/')}/".lstrip("/")
        self._uploader: Any = None
        self._downloader: Any = None

    def files(self) -> dict[str, StoredFile] | None:
        uploader = self._connect()
        try:
            return patiently(lambda: self._list(uploader), f"{self._prefix} cannot be listed", self._patience)
        except NotImplementedError:
            return None
        except Exception as error:  # every store's client has its own errors
            raise self._error("cannot be listed", error) from error

    def _list(self, uploader: Any) -> dict[str, StoredFile]:
        prefix = self._key_prefix
        if not self._is_s3:
            return {key.removeprefix(prefix): StoredFile(None) for key in uploader.list_objects() or ()}
        pages = uploader.s3.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
        return {
            entry["Key"].removeprefix(prefix): StoredFile(entry["Size"], entry["ETag"].strip('"'))
            for page in pages
            for entry in page.get("Contents", ())
        }

    def read(self, name: str) -> bytes | None:
        with scratch_folder() as scratch:
            try:
                path = self.fetch(name, scratch)
            except StoreError:
                files = None if self._is_s3 else self.files()
                if self._is_s3 or (files is not None and name in files):
                    raise
                return None  # other stores do not distinguish a missing file from a failure
            if path.exists():
                return path.read_bytes()
            self._connect()  # raises if there is no bucket either
            return None

    def write(self, name: str, content: str | bytes) -> None:
        with scratch_folder() as scratch:
            (scratch / name).write_bytes(content.encode() if isinstance(content, str) else content)
            self.put(scratch, [name], lambda line: None)

    def fetch(self, name: str, scratch: Path) -> Path:
        from streaming.base.storage.download import CloudDownloader

        path = inside(scratch, name)
        isolate_client_rng()
        try:
            downloader = self._downloader = self._downloader or CloudDownloader.get(self.url)
            patiently(
                lambda: downloader.download(f"{self.url}/{name}", str(path), self._timeout),
                f"{self._prefix}: {name} cannot be downloaded",
                self._patience,
                downloader.clean_up,
            )
        except Exception as error:  # as above
            if not is_absent(error):
                raise self._error(f"{name} cannot be downloaded", error) from error
        return path

    def put(self, source: Path, names: Iterable[str], report: Callable[[str], None]) -> None:
        """Upload the files that are not stored yet, then check that all are."""
        uploader = self._connect()
        uploader.local = str(source)
        names = list(names)
        stored = self.files()
        missing = [name for name in names if not _is_stored(source / name, (stored or {}).get(name))]
        if len(missing) < len(names):
            report(f"{self.name}: {len(names) - len(missing)} of {len(names)} files are stored already")
        with ThreadPoolExecutor(UPLOAD_THREADS) as pool:
            uploads = {name: pool.submit(self._upload, uploader, name) for name in missing}
            for name, upload in uploads.items():
                try:
                    upload.result()
                except Exception as error:  # as above
                    pool.shutdown(cancel_futures=True)
                    raise self._error(f"{name} cannot be uploaded", error) from error
        stored = self.files()
        if stored is not None:
            lost = [name for name in names if not _is_stored(source / name, stored.get(name), etag=False)]
            if lost:
                raise StoreError(
                    f"{self._prefix}: {', '.join(lost[:3])} did not arrive complete. Rerun the same command."
                )

    def remove(self, names: Iterable[str]) -> bool:
        """Remove files from S3, in this order; do nothing in other stores, and return False."""
        for name in names if self._is_s3 else ():
            s3, key = self._connect().s3, f"{self._key_prefix}{name}"
            delete = partial(s3.delete_object, Bucket=self._bucket, Key=key)
            try:
                patiently(delete, f"{self._prefix}: {name} cannot be removed", self._patience)
            except Exception as error:  # as above
                raise self._error(f"{name} cannot be removed", error) from error
        return self._is_s3

    def _upload(self, uploader: Any, name: str) -> None:
        what = f"{self._prefix}: {name} cannot be uploaded"
        patiently(lambda: uploader.upload_file(name), what, self._patience)

    def _connect(self) -> Any:
        if self._uploader is None:
            from streaming.base.storage.upload import CloudUploader

            isolate_client_rng()
            connect = partial(CloudUploader.get, self.url, keep_local=True, retry=1)
            try:
                self._uploader = patiently(connect, f"{self._prefix} cannot be reached", self._patience)
            except Exception as error:  # as above, and what a missing client library raises
                raise self._error("cannot be reached", error) from error
            # The uploader made an empty local folder for itself; `put` sets the one to read from.
            shutil.rmtree(self._uploader.local, ignore_errors=True)
        return self._uploader

    def _error(self, what: str, error: BaseException) -> StoreError:
        reason = str(error).replace(self.url, self.name) or type(error).__name__
        return StoreError(
            f"{self._prefix}: {what}: {reason}. Check the name, the credentials and (S3) S3_ENDPOINT_URL, then rerun "
            "the same command; files stored so far are kept."
        )


def _is_stored(path: Path, stored: StoredFile | None, *, etag: bool = True) -> bool:
    if stored is None or stored.num_bytes not in (None, path.stat().st_size):
        return False
    return not etag or stored.etag is None or stored.etag == s3_etag(path)


def s3_etag(path: Path) -> str:
    """Compute S3's entity tag of a file that boto3 uploads: its MD5, or the MD5 of the MD5s of its pieces."""
    pieces = []
    with path.open("rb") as file:
        while piece := file.read(_S3_PIECE_BYTES):
            pieces.append(hashlib.md5(piece, usedforsecurity=False).digest())
    if path.stat().st_size < _S3_PIECE_BYTES:
        return (pieces or [hashlib.md5(b"", usedforsecurity=False).digest()])[0].hex()
    return f"{hashlib.md5(b''.join(pieces), usedforsecurity=False).hexdigest()}-{len(pieces)}"
