"""Content of files by SHA-256: a damaged byte is found where the file is read, not in what is made of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rankllm_composer.errors import ModelError

EXPORT_FILE = "export.json"
FORMAT = 1
_NOT_HASHED = {EXPORT_FILE, "README.md"}
"""The card changes after the export: measured figures are added to it."""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of files of a folder by name; several files are read at once."""
    names = list(names)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: sha256_of(folder / name), names)))


def differing_files(folder: Path, expected: Mapping[str, str]) -> list[str]:
    """Return the names of files that are missing or whose SHA-256 is not the expected one."""
    existing = [name for name in expected if (folder / name).is_file()]
    found = hash_files(folder, existing)
    return [name for name, digest in expected.items() if found.get(name) != digest]


@dataclass(frozen=True)
class ExportContent:
    """Content of `export.json`: where an exported folder comes from, and what its files hold."""

    run: str  # identity of the run that wrote it; empty for an export made by hand
    batch: int  # optimizer steps before it
    sha256: Mapping[str, str]  # name → SHA-256 of every visible file but the model card
    format: int = FORMAT


def write_content(folder: Path, run: str, batch: int) -> None:
    """Write the `export.json` of a folder whose other files are complete."""
    files = (path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    names = sorted(name for name in files if name not in _NOT_HASHED)
    content = ExportContent(run, batch, hash_files(folder, names))
    (folder / EXPORT_FILE).write_text(json.dumps(asdict(content), indent=1) + "\n", encoding="utf-8")


def read_content(folder: Path) -> ExportContent | None:
    """Read the `export.json` of a folder; None without one.

    Raises:
        ModelError: it is damaged.
    """
    path = folder / EXPORT_FILE
    try:
        content = ExportContent(**json.loads(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({error}). Export the model again, or copy it again.") from None
    names = content.sha256 if isinstance(content.sha256, dict) else {}
    is_valid = (
        content.format == FORMAT
        and isinstance(content.run, str)
        and isinstance(content.batch, int)
        and names
        and all(name == Path(name).name and isinstance(digest, str) for name, digest in names.items())
    )
    if not is_valid:
        raise ModelError(f"{path} is not the list of an export's files. Export the model again, or copy it again.")
    return content


def check_content(folder: str | Path) -> None:
    """Raise ModelError if a file of an exported folder is not what was exported; a folder without a list passes."""
    content = read_content(Path(folder))
    differing = [] if content is None else differing_files(Path(folder), content.sha256)
    if differing:
        raise ModelError(
            f"{Path(folder, differing[0])} is not what was exported: its SHA-256 differs from that in {EXPORT_FILE}"
            + (f", as for {len(differing) - 1} more files" if len(differing) > 1 else "")
            + f". Export the model again, or copy it again; if you changed the file on purpose, remove {EXPORT_FILE}."
        )
