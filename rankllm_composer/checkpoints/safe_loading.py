"""Load checkpoints as data only: a pickle that references anything else is refused before it runs; explain errors."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

from rankllm_composer.errors import CheckpointError, first_line

# Types in the index of a sharded checkpoint besides plain containers.
_INDEX_TYPES = {
    "pathlib": {"PosixPath", "PurePosixPath"},
    "torch": {"Size", "bfloat16", "bool", "float16", "float32", "float64", "int16", "int32", "int64", "int8", "uint8"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.serialization": {"_get_layout"},
}
INDEX_NAME = ".metadata"
_FULL_BYTES = 1 << 20
"""A disk with less free space after a failed write was full; torch does not always report why a write failed."""


def data_types() -> list[Any]:
    """List the types of random states, durations and versions, which `weights_only` does not allow by default."""
    import datetime

    import numpy as np
    from torch.torch_version import TorchVersion

    reconstruct = np.empty(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("uint32", "uint8", "int64", "float32", "float64")]
    return [datetime.timedelta, TorchVersion, np.dtype, np.ndarray, reconstruct, *kinds]


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member  # early patch releases of Python 3.11 pickle a member of an enumeration by its name
        if name not in _INDEX_TYPES.get(module, ()):
            raise pickle.UnpicklingError(f"global {module}.{name}")
        return super().find_class(module, name)


def _member(kind: Any, name: Any) -> Enum:
    """A member of an enumeration, and nothing else that `getattr` could return."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError("global builtins.getattr")


def read_index(stream: BinaryIO, name: str) -> Any:
    """Read the index of a sharded checkpoint; raise CheckpointError if it is damaged or references other types."""
    try:
        return _IndexUnpickler(stream).load()
    except (pickle.UnpicklingError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise CheckpointError(explain_unreadable(name, error)) from None


def holds_only_data(path: str | Path, specs: object = None) -> bool:
    """Check an index before Composer reads it, as `read_index` does; torch loads other files with `weights_only`."""
    del specs
    if Path(path).name == INDEX_NAME:
        with Path(path).open("rb") as stream:
            read_index(stream, str(path))
    return True


@contextlib.contextmanager
def safe_loading() -> Iterator[None]:
    """Make Composer and torch load checkpoints as data only, although Composer requests arbitrary pickles."""
    import torch

    settings = {
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
        "CHECKPOINT_VALIDATION_FUNCTION": f"{__name__}.{holds_only_data.__name__}",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        with torch.serialization.safe_globals(data_types()):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def explain_unreadable(name: object, error: BaseException) -> str:
    """Describe an error from loading a checkpoint."""
    match = re.search(r"(?:GLOBAL|global|function) ([\w.]+\.\w+)", str(error))
    if match and ("UnpicklingError" in repr(error) or "UnpicklingError" in str(error)):
        return (
            f"{name} contains a pickle that references {match[1]}; expected data only, because loading it could run "
            "arbitrary code. Use a checkpoint from a run you trust."
        )
    return f"{name} is damaged ({first_line(error)}). Use an earlier checkpoint."


def write_error(checkpoint: Path, error: BaseException) -> CheckpointError:
    """Describe an error from writing a checkpoint, by torch or by the system."""
    reason = _write_reason(checkpoint.parent, error)
    return CheckpointError(
        f"{checkpoint} could not be written ({reason}); earlier checkpoints are intact. Free space or "
        "correct the permissions, then rerun the same command to resume."
    )


def _write_reason(folder: Path, error: BaseException) -> str:
    """Return why a write failed: the error of the system behind torch's, or the last line of the error."""
    errors = [error, *(failure[0] for failure in getattr(error, "failures", {}).values())]
    for cause in errors:
        while cause is not None:
            if isinstance(cause, OSError) and cause.strerror:
                return cause.strerror
            cause = cause.__cause__ or cause.__context__
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if shutil.disk_usage(parent).free < _FULL_BYTES:
        return os.strerror(errno.ENOSPC)
    lines = [line.strip() for line in str(errors[-1]).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(errors[-1]).__name__
