"""Models that come with Python code of their own, which runs only where a flag allows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rankllm_composer.errors import ModelError


@contextmanager
def code_refused(name: str) -> Iterator[None]:
    """Raise a ModelError that says what to do if loading stops because a model requires code of its own."""
    try:
        yield
    except (ValueError, OSError) as error:
        if "trust_remote_code" not in f"{error} {error.__cause__}":
            raise
        raise ModelError(
            f"{name} comes with Python code of its own, which is not run (trust_remote_code). Read that code, then "
            "allow it with --trust-remote-code, or use a model that transformers contains."
        ) from error
