"""Copies of a run's checkpoints in an object store, uploaded while training continues."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from rankllm_composer.checkpoints.folder import (
    MANIFEST,
    Manifest,
    batch_of,
    clear_stage,
    damage_in,
    parse_manifest,
    publish,
    stage_folder,
)
from rankllm_composer.errors import CheckpointError, StoreError
from rankllm_composer.screen import get_logger
from rankllm_composer.storage.content import differing_files
from rankllm_composer.storage.object_store import RemoteFolder, StoredFile
from rankllm_composer.storage.patience import PATIENCE_SECONDS

log = get_logger(__name__)


class CheckpointStore:
    """The checkpoints below a URL, of which the newest `keep` are kept (-1 = all). Use it in one process per run.

    A copy is complete if its `checkpoint.json`, which is stored last, and every file that it lists exist in full size.
    Old copies are removed from S3 only.
    """

    def __init__(self, url: str, keep: int, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.folder = RemoteFolder(url, "checkpoint.folder", patience_seconds)
        self.keep = keep
        self._upload: threading.Thread | None = None
        self._failure: Exception | None = None

    def newest(self) -> Manifest | None:
        """Return the newest complete copy, if any; raise StoreError if the store cannot be reached or cannot list."""
        listing = self._listing()
        for name in sorted(listing, key=batch_of, reverse=True):
            manifest = self._manifest(name, listing[name])
            if manifest is not None:
                return manifest
        return None

    def _manifest(self, name: str, files: dict[str, StoredFile]) -> Manifest | None:
        """Return the manifest of a copy; None if the copy is incomplete."""
        if MANIFEST not in files:
            return None
        manifest = parse_manifest(self.folder.read(f"{name}/{MANIFEST}") or "")
        return manifest if manifest is not None and manifest.name == name and _has_all(files, manifest) else None

    def fetch(self, manifest: Manifest, folder: Path) -> Path:
        """Download a checkpoint into a local folder of checkpoints, complete or not at all (StoreError).

        A file that arrives short or damaged is downloaded once more.
        """
        clear_stage(folder)
        staged = stage_folder(folder) / manifest.name
        staged.mkdir()
        for name, digest in manifest.sha256.items():
            for _ in range(2):
                (staged / name).unlink(missing_ok=True)
                self.folder.fetch(f"{manifest.name}/{name}", stage_folder(folder))
                if not differing_files(staged, {name: digest}):
                    break
            else:
                copy = f"{self.folder.name}/{manifest.name}"
                raise StoreError(
                    f"checkpoint.folder: {copy}/{name} is missing, short or damaged; expected {manifest.files[name]} "
                    f"bytes with the SHA-256 in {MANIFEST}. Rerun the same command, or remove {copy} to resume from "
                    "the checkpoint before it."
                )
        return publish(folder, manifest)

    def start_upload(self, *checkpoints: tuple[Path, Manifest], is_new: bool = True) -> None:
        """Wait for the previous upload, as `finish` does, then start to upload complete local checkpoints in order.

        Args:
            is_new: False = they were written a while ago, so their content is checked first.
        """
        self.finish()
        name = f"upload of {checkpoints[-1][0].name}"
        self._upload = threading.Thread(target=self._copy, args=(checkpoints, is_new), name=name, daemon=True)
        self._upload.start()

    def complete_copies(self, checkpoints: Sequence[tuple[Path, Manifest]]) -> None:
        """Start to upload those of the complete local checkpoints, oldest first, of which the store has no whole copy.

        An earlier process may have been killed, or refused, before it had stored them.
        """
        listing = self._listing()
        kept = checkpoints if self.keep < 0 else checkpoints[-self.keep :]
        missing = [(path, manifest) for path, manifest in kept if not self._has_copy(listing.get(path.name), manifest)]
        if missing:
            log.info("%s: completing the copies of %s", self.folder.name, ", ".join(path.name for path, _ in missing))
            self.start_upload(*missing, is_new=False)

    def _has_copy(self, files: dict[str, StoredFile] | None, manifest: Manifest) -> bool:
        return files is not None and self._manifest(manifest.name, files) == manifest

    def finish(self) -> None:
        """Wait for the upload in progress, if any; raise its error. The local checkpoint is intact in any case."""
        if self._upload is not None:
            self._upload.join()
        self._upload, failure, self._failure = None, self._failure, None
        if failure is not None:
            raise failure

    def _copy(self, checkpoints: Sequence[tuple[Path, Manifest]], is_new: bool) -> None:
        try:
            for checkpoint, manifest in checkpoints:
                damage = None if is_new else damage_in(checkpoint, manifest)
                if damage is not None:
                    raise CheckpointError(damage)
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
