"""The files of a shard: fetched patiently, compared with the index as they arrive, unpacked to the size it gives."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import streaming
from streaming.base.hashing import get_hash

from rankllm_composer.screen import get_logger
from rankllm_composer.shards.unpack import unpack
from rankllm_composer.storage.object_store import without_credentials
from rankllm_composer.storage.patience import patiently

log = get_logger(__name__)


class CheckedStream(streaming.Stream):
    """Streaming's files of one set, without its ways to use a damaged one.

    A file that arrives in another size or with another hash than the index gives is fetched once more. A shard is
    decompressed under a unique name, as machines that share a folder may do so at the same time.

    Args:
        store_patience_seconds: how long a failing download is repeated.
        options: those of `streaming.Stream`.
    """

    def __init__(self, store_patience_seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self._store_patience_seconds = store_patience_seconds
        self._infos: dict[str, Any] = {}  # path of a file → its entry in the index

    def _prepare_shard_part(self, raw_info: Any, zip_info: Any = None, compression: str | None = None) -> int:
        for info in (raw_info, zip_info):
            if info is not None:
                self._infos[str(Path(self.local, info.basename))] = info
        changed: int = super()._prepare_shard_part(raw_info, zip_info, compression)
        return changed

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        local = Path(self.local, to_basename or from_basename)
        remote = None if self.remote is None else f"{self.remote.rstrip('/')}/{from_basename}"
        what = f"{without_credentials(remote or str(local))} cannot be downloaded"
        for is_last in (False, True):
            patiently(
                lambda: self._downloader.download(remote, str(local), self.download_timeout),
                what,
                self._store_patience_seconds,
                self._downloader.clean_up,
            )
            problem = self._problem(local)
            if problem is None:
                break
            if is_last:
                raise ValueError(problem)
            log.warning("%s: %s; fetching it again", local, problem)
            local.unlink()
        return str(local)

    def _problem(self, path: Path) -> str | None:
        """How a file differs from the index, None if it does not."""
        info = self._infos.get(str(path))
        if info is None:
            return None
        size = path.stat().st_size
        if size != info.bytes:
            return f"it has {size} bytes of {info.bytes}"
        algorithm = self.validate_hash
        if algorithm is not None and get_hash(algorithm, path.read_bytes()) != info.hashes[algorithm]:
            return f"its content does not match its hash ({algorithm})"
        return None

    def _decompress_shard_part(self, zip_info: Any, zip_filename: str, raw_filename: str, compression: Any) -> None:
        packed, raw = Path(zip_filename), Path(raw_filename)
        problem = self._problem(packed)
        if problem is not None:
            raise ValueError(problem)
        unique = Path(f"{raw_filename}.{secrets.token_hex(8)}")
        try:
            unique.write_bytes(unpack(packed.read_bytes(), compression, self._infos[str(raw)].bytes))
            unique.replace(raw)
        except BaseException:
            unique.unlink(missing_ok=True)
            raise
        if not self.safe_keep_zip:
            packed.unlink()
