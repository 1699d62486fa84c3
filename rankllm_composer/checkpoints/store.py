"""Copies of a run's checkpoints in an object store, made while training goes on."""

from __future__ import annotations

import logging
import tempfile
import threading
from pathlib import Path
from urllib.parse import urlsplit

from rankllm_composer.checkpoints.folder import (
    MANIFEST,
    Manifest,
    batch_of,
    clear_stage,
    parse_manifest,
    publish,
    stage_folder,
)
from rankllm_composer.errors import CheckpointError, StoreError
from rankllm_composer.storage.object_store import RemoteFolder, StoredFile, without_credentials

log = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints below a URL. For one process of a run.

    A copy is whole where its `checkpoint.json` is there, and every file that this lists, in its size; the manifest is
    stored last. The newest `keep` whole copies are kept where the store lets files be removed (S3); elsewhere all are.

    Args:
        url: such as s3://bucket/run/checkpoints.
        keep: newest copies that are kept; -1 = all.
    """

    def __init__(self, url: str, keep: int) -> None:
        self.url = url.rstrip("/")
        self.name = without_credentials(self.url)
        self.keep = keep
        self._remote = RemoteFolder(self.url)
        self._upload: threading.Thread | None = None
        self._failure: Exception | None = None

    def newest(self) -> Manifest | None:
        """The newest whole copy; None if there is none.

        Raises:
            CheckpointError: the store cannot be reached, or cannot list.
        """
        try:
            listing = self._listing()
            for name in sorted(listing, key=batch_of, reverse=True):
                if MANIFEST in listing[name]:
                    manifest = self._manifest(name)
                    if manifest is not None and manifest.name == name and _has_all(listing[name], manifest):
                        return manifest
        except StoreError as error:
            raise CheckpointError(f"checkpoint.folder: {error}") from error
        return None

    def _manifest(self, name: str) -> Manifest | None:
        with tempfile.TemporaryDirectory() as scratch:
            Path(scratch, name).mkdir()
            path = self._remote.fetch(f"{name}/{MANIFEST}", Path(scratch))
            return parse_manifest(path.read_bytes()) if path.exists() else None

    def read_text(self, name: str) -> str | None:
        """A small file beside the checkpoints; None if there is none.

        Raises:
            CheckpointError: the store cannot be reached, or cannot list.
        """
        try:
            content = self._remote.read(name)
        except StoreError as error:
            raise CheckpointError(f"checkpoint.folder: {error}") from error
        return None if content is None else content.decode(errors="replace")

    def write_text(self, name: str, text: str) -> None:
        """Store such a file.

        Raises:
            CheckpointError: the store does not take it.
        """
        with tempfile.TemporaryDirectory() as scratch:
            Path(scratch, name).write_text(text)
            try:
                self._remote.put(Path(scratch), [name], log.info)
            except StoreError as error:
                raise CheckpointError(f"checkpoint.folder: {error}") from error

    def fetch(self, manifest: Manifest, folder: Path) -> Path:
        """Copy a checkpoint to a local folder of checkpoints, where it appears whole or not at all.

        Raises:
            CheckpointError: a file could not be fetched.
        """
        clear_stage(folder)
        staged = stage_folder(folder) / manifest.name
        staged.mkdir()
        for name, num_bytes in manifest.files.items():
            try:
                path = self._remote.fetch(f"{manifest.name}/{name}", stage_folder(folder))
            except StoreError as error:
                raise CheckpointError(f"checkpoint.folder: {error}") from error
            if not path.exists() or path.stat().st_size != num_bytes:
                raise CheckpointError(
                    f"{self.name}/{manifest.name}/{name}: found it missing or short, allowed are {num_bytes} bytes; "
                    "start again with the same command"
                )
        return publish(folder, manifest)

    def start_upload(self, checkpoint: Path, manifest: Manifest) -> None:
        """Begin to copy a whole local checkpoint, after the copy before it is done.

        Raises:
            CheckpointError: the copy before it failed.
        """
        self.finish()
        self._upload = threading.Thread(
            target=self._copy, args=(checkpoint, manifest), name=f"upload of {checkpoint.name}", daemon=True
        )
        self._upload.start()

    def finish(self) -> None:
        """Wait for the copy that is being made.

        Raises:
            CheckpointError: it failed; the local checkpoint is as it was.
        """
        if self._upload is not None:
            self._upload.join()
        self._upload, failure, self._failure = None, self._failure, None
        if failure is not None:
            raise CheckpointError(f"checkpoint.folder: {failure}") from failure

    def _copy(self, checkpoint: Path, manifest: Manifest) -> None:
        try:
            for names in (manifest.files, [MANIFEST]):
                self._remote.put(checkpoint.parent, [f"{checkpoint.name}/{name}" for name in names], log.info)
            if self.keep > 0:
                self._prune()
        except Exception as error:  # handed to the training thread
            self._failure = error

    def _prune(self) -> None:
        if urlsplit(self.url).scheme != "s3":
            return
        listing = self._listing()
        complete = sorted((name for name, files in listing.items() if MANIFEST in files), key=batch_of)
        for name, files in listing.items():
            if name not in complete[-self.keep :] and batch_of(name) < batch_of(complete[-1]):
                # The manifest first: what is left of a copy is never taken for one.
                self._remote.remove(f"{name}/{file}" for file in sorted(files, key=lambda file: file != MANIFEST))

    def _listing(self) -> dict[str, dict[str, StoredFile]]:
        """Files of each checkpoint, by its name."""
        files = self._remote.files()
        if files is None:
            raise StoreError(f"{self.name}: this kind of store cannot list what it holds; use s3, gs or oci")
        listing: dict[str, dict[str, StoredFile]] = {}
        for path, stored in files.items():
            name, _, file = path.partition("/")
            if batch_of(name) >= 0 and file:
                listing.setdefault(name, {})[file] = stored
        return listing


def _has_all(files: dict[str, StoredFile], manifest: Manifest) -> bool:
    return all(name in files and files[name].num_bytes in (None, size) for name, size in manifest.files.items())
