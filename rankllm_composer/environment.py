"""Text and paths with environment variables in them, of which only the reference is printed and saved."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any


class FromEnvironment(str):
    """Text with the value of an environment variable in it, which may be secret; `reference` is written instead."""

    reference: str

    def __new__(cls, value: str, reference: str) -> FromEnvironment:
        text = super().__new__(cls, value)
        text.reference = reference
        return text

    def __reduce__(self) -> Any:
        return FromEnvironment, (str(self), self.reference)


def as_written(value: Any) -> Any:
    """A value as it may be printed and saved: without what comes from the environment."""
    return getattr(value, "reference", value)


def keep_reference(value: Any, check: Callable[[Any], Any]) -> Any:
    """Apply a check to a value, and keep its reference to the environment."""
    checked = check(value)
    return FromEnvironment(checked, value.reference) if isinstance(value, FromEnvironment) else checked


def expand_path(value: Any) -> Any:
    """A path with `~`, `$HOME` and other environment variables replaced; any other value unchanged."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(value, str) or isinstance(value, FromEnvironment):
        return value
    text = os.path.expanduser(re.sub(r"^\$(HOME\b|\{HOME\})", "~", value))  # noqa: PTH111  (Path would drop a final /)
    expanded = os.path.expandvars(text)
    if expanded == text:
        return text
    return FromEnvironment(expanded, re.sub(r"\$(?:(\w+)|\{(\w+)\})", r"${oc.env:\1\2}", text))
