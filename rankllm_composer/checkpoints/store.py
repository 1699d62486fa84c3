"""Copies of a run's checkpoints in an object store, uploaded while training continues."""

from __future__ import annotations

import threading
from pathlib import Path

from rankllm_composer.checkpoints.folder import (
    MANIFEST,
    Manifest,
    batch_of,
    clear_stage,
    parse_manifest,
    publish,
    stage_folder,
)
from rankllm_composer.errors import StoreError
from rankllm_composer.screen import get_logger
from rankllm_composer.storage.object_store import RemoteFolder, StoredFile

log = get_logger(__name__)


class CheckpointStore:
    """The checkpoints below a URL, of which the newest `keep` are kept (-1 = all). Use it in one process per run.

    A copy is complete if its `checkpoint.json`, which is stored last, and every file that it lists exist in full size.
    Old copies are removed from S3 only.
    """

    def __init__(self, url: str, keep: int) -> None:
        self.folder = RemoteFolder(url, "checkpoint.folder")
        self.keep = keep
        self._upload: threading.Thread | None = None
        self._failure: Exception | None = None

    def newest(self) -> Manifest | None:
        """Return the newest complete copy, if any; raise StoreError if the store cannot be reached or cannot list."""
        listing = self._listing()
        for name in sorted(listing, key=batch_of, reverse=True):
            if MANIFEST in listing[name]:
                manifest = parse_manifest(self.folder.read(f"{name}/{MANIFEST}") or "")
                if manifest is not None and manifest.name == name and _has_all(listing[name], manifest):
                    return manifest
        return None

    def fetch(self, manifest: Manifest, folder: Path) -> Path:
        """Download a checkpoint into a local folder of checkpoints, complete or not at all (StoreError)."""
        clear_stage(folder)
        staged = stage_folder(folder) / manifest.name
        staged.mkdir()
        for name, num_bytes in manifest.files.items():
            path = self.folder.fetch(f"{manifest.name}/{name}", stage_folder(folder))
            if not path.exists() or path.stat().st_size != num_bytes:
                raise StoreError(
                    f"checkpoint.folder: {self.folder.name}/{manifest.name}/{name} is missing or short; expected "
                    f"{num_bytes} bytes. Rerun the same command."
                )
        return publish(folder, manifest)

    def start_upload(self, checkpoint: Path, manifest: Manifest) -> None:
        """Wait for the previous upload, as `finish` does, then start to upload a complete local checkpoint."""
        self.finish()
        self._upload = threading.Thread(
            target=self._copy, args=(checkpoint, manifest), name=f"upload of {checkpoint.name}", daemon=True
        )
        self._upload.start()

    def finish(self) -> None:
        """Wait for the upload in progress, if any; raise its error. The local checkpoint is intact in any case."""
        if self._upload is not None:
            self._upload.join()
        self._upload, failure, self._failure = None, self._failure, None
        if failure is not None:
            raise failure

    def _copy(self, checkpoint: Path, manifest: Manifest) -> None:
        try:
            for names in (manifest.files, [MANIFEST]):
                self.folder.put(checkpoint.parent, [f"{checkpoint.name}/{name}" for name in names], log.info)
            if self.keep > 0:
                self._prune()
        except Exception as error:  # raised in the training thread by `finish`
            self._failure = error

    def _prune(self) -> None:
        listing = self._listing()
        complete = sorted((name for name, files in listing.items() if MANIFEST in files), key=batch_of)
        for name, files in listing.items():
            if name not in complete[-self.keep :] and batch_of(name) < batch_of(complete[-1]):
                # The manifest first, so that what remains of a partly removed copy is never read.
                self.folder.remove(f"{name}/{file}" for file in sorted(files, key=lambda file: file != MANIFEST))

    def _listing(self) -> dict[str, dict[str, StoredFile]]:
        """Return the files of each checkpoint, complete or not, by its name."""
        files = self.folder.files()
        if files is None:
            raise StoreError(
                f"checkpoint.folder: {self.folder.name}: this kind of store cannot list files. Use s3, gs or oci."
            )
        listing: dict[str, dict[str, StoredFile]] = {}
        for path, stored in files.items():
            name, _, file = path.partition("/")
            if batch_of(name) >= 0 and file:
                listing.setdefault(name, {})[file] = stored
        return listing


def _has_all(files: dict[str, StoredFile], manifest: Manifest) -> bool:
    return all(name in files and files[name].num_bytes in (None, size) for name, size in manifest.files.items())
