"""Credentials, which no recipe may hold: the recipe of a run is written beside it, and parts of it go to loggers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from rankllm_composer.recipe_schema import Problem
from rankllm_composer.redaction import redact

_SECRET_NAME = re.compile(r"(?:key|token|secret|password|passphrase|credentials?)$", re.IGNORECASE)
"""Names of arguments that hold a secret; compared with the last word of a key."""


def secrets_in(tree: Any, dotted: str = "") -> Iterator[Problem]:
    """Credentials of a recipe as a plain tree, a problem each; `dotted` is the key of the tree."""
    remedy = "remove it, and give it where its client looks for it: the environment, or the client's own file"
    if isinstance(tree, dict):
        for name, value in tree.items():
            below = f"{dotted}.{name}".lstrip(".")
            if isinstance(value, str) and value and _SECRET_NAME.search(name):
                yield Problem(below, "a value that looks like a secret", "no secrets in recipes", remedy)
            else:
                yield from secrets_in(value, below)
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from secrets_in(value, f"{dotted}.{index}")
    elif isinstance(tree, str):
        try:
            parts = urlsplit(tree if "://" in tree else "")
        except ValueError:
            return
        text = tree if parts.scheme != "sftp" else tree.replace("@", "/", 1)  # whose user is no secret
        if parts.password or parts.query:
            yield Problem(dotted, "a URL with credentials", "a URL without password or query", remedy)
        elif redact(text) != text:
            yield Problem(dotted, "a value that looks like a secret", "no secrets in recipes", remedy)


def is_secret(key: str, value: Any) -> bool:
    """Whether a key of a recipe holds what no recipe may hold, and nobody should be shown."""
    return any(secrets_in({key.rpartition(".")[2]: value}))
