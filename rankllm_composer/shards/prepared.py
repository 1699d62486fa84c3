"""Prepared shards compared with the source that a recipe names: what is trained is what the recipe says.

Hashing a large source takes as long as reading it. Once a set has been compared, sizes and times of the source's files
are noted beside it, and while they stay the same, so does the result.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rankllm_composer.errors import RankLLMComposerError, ShardError
from rankllm_composer.options import SourceOptions
from rankllm_composer.prompts.clients import CURRENT_CLIENT, UNNAMED_CLIENT, ClientVersion
from rankllm_composer.shards.manifest import MANIFEST_NAME, parse_manifest
from rankllm_composer.sources.records import open_source
from rankllm_composer.storage.atomic import write_atomic
from rankllm_composer.storage.object_store import open_folder

NOTE_NAME = ".compared.json"
_SETTLED_SECONDS = 2.0
"""A file that changed more recently may change again without a change of its times."""


def find_difference(
    place: str | Path, source: SourceOptions, local: str | Path, key: str, client: ClientVersion = CURRENT_CLIENT
) -> ShardError | None:
    """Compare a complete set of shards with the source it should have been built from.

    Args:
        place: folder or URL of the set.
        local: folder on this machine, in which the result is noted.
        key: dotted key of the split, for messages.
        client: version of the inference client whose prompts the shards should have.
    Returns:
        The error to raise if they differ, with both values and what to do; None if they are the same.
    """
    folder = open_folder(place)
    text = folder.read(MANIFEST_NAME)
    as_it_is = f"{key}.source=null to use the shards as they are"
    if text is None:
        return ShardError(
            f"{key}.source is set, but the shards in {folder.name} have no {MANIFEST_NAME} that says what they were "
            f"built from. Set {as_it_is}, {key}.rebuild=true to build them again, or another {key}.local."
        )
    note = _Note(Path(local) / NOTE_NAME, source, client, text)
    if note.holds():
        return None
    manifest = parse_manifest(text, f"{folder.name}/{MANIFEST_NAME}")
    built = {**_flat(manifest.source), "on_error": manifest.options.get("on_error"), "part": manifest.part or "all"}
    try:
        given = {**_flat(open_source(source, client).describe()), "on_error": source.on_error, "part": "all"}
    except RankLLMComposerError as error:
        return ShardError(
            f"{key}.source cannot be compared with the shards in {folder.name}, which were built from "
            f"{', '.join(source_names(manifest.source))}: {error} Or set {as_it_is}."
        )
    if "client_version" in given:
        built.setdefault("client_version", UNNAMED_CLIENT)
    differing = [name for name in dict.fromkeys([*built, *given]) if built.get(name) != given.get(name)]
    if differing == ["client_version"] and not open_source(source).makes_lists:
        differing = []  # the prompts are those of the records
    if not differing:
        note.write()
        return None
    listed = "; ".join(f"{name} was {built.get(name)}, is now {given.get(name)}" for name in differing)
    return ShardError(
        f"{key}.source: the shards in {folder.name} were built from another source or with other options ({listed}). "
        f"Set {key}.rebuild=true to build them again, another {key}.local, or {as_it_is}."
    )


def source_names(source: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the files or of the data set in a manifest's source, as a model card shows them."""
    files = [str(file["name"]) for file in source.get("files", ()) if isinstance(file, Mapping) and "name" in file]
    return (str(source["name"]),) if source.get("name") else tuple(files)


def _flat(source: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a manifest's source by name; a file is one fact, by its role."""
    facts: dict[str, Any] = {}
    for name, value in source.items():
        if name == "files":
            for number, file in enumerate(value):
                facts[str(file.get("role", f"file {number + 1}"))] = (
                    f"{file.get('name')} ({file.get('bytes')} bytes, sha256 {str(file.get('sha256'))[:12]})"
                )
        elif isinstance(value, Mapping):
            facts |= value
        else:
            facts[name] = value
    return facts


class _Note:
    """The note that a set and a source were the same: what the source is, and size and times of its files."""

    def __init__(self, path: Path, source: SourceOptions, client: ClientVersion, manifest_text: bytes) -> None:
        self.path = path
        self._files = dict(_stamps(source))
        manifest = hashlib.sha256(manifest_text).hexdigest()
        named = {"source": asdict(source), "client": client}
        self._text = json.dumps({**named, "manifest": manifest, "files": self._files})

    def holds(self) -> bool:
        """True if the note was written for the same set and the same files, which have not changed since."""
        try:
            return bool(self._files) and self.path.read_text(encoding="utf-8") == self._text
        except (OSError, ValueError):
            return False

    def write(self) -> None:
        """Write the note, unless a file has just been written or the folder is read-only."""
        newest = max((stamp[1] for stamp in self._files.values()), default=None)
        if newest is not None and newest / 1e9 < time.time() - _SETTLED_SECONDS:
            with suppress(OSError):
                write_atomic(self.path, self._text)


def _stamps(source: SourceOptions) -> Iterator[tuple[str, list[int]]]:
    """Path of every file of a source, with size, times of change of content and entry, and inode."""
    for value in asdict(source).values():
        path = Path(value) if isinstance(value, str) else None
        if path is None or not path.exists():
            continue
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            found = file.stat()
            yield str(file.absolute()), [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
