"""Print, warn and log: without terminal escapes, and except on standard output without secrets."""

from __future__ import annotations

import logging
import sys
import warnings

from rankllm_composer.escaping import for_screen
from rankllm_composer.redaction import redact


def say(text: object, *, error: bool = False, escaped: bool = False, end: str = "\n") -> None:
    """Print text at once.

    Args:
        error: print to standard error, without secrets.
        escaped: the text went through `for_screen` before colors were added to it.
    """
    shown = str(text) if escaped else for_screen(text)
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = (redact(shown) if error else shown).encode(encoding, "backslashreplace").decode(encoding)
    print(shown, file=stream, end=end, flush=True)


def report(text: object) -> None:
    """Print text to standard error: progress, warnings and errors, beside the output of a command."""
    say(text, error=True)


def warn(text: str, category: type[Warning] = UserWarning, stacklevel: int = 1) -> None:
    """Issue a warning; `stacklevel` counts from the caller, as in `warnings.warn`."""
    warnings.warn(redact(for_screen(text)), category, stacklevel=stacklevel + 1)


def get_logger(name: str) -> logging.Logger:
    """The logger of a module."""
    log = logging.getLogger(name)
    if _escape not in log.filters:
        log.addFilter(_escape)
    return log


def _escape(record: logging.LogRecord) -> bool:
    record.msg, record.args = redact(for_screen(record.getMessage())), ()
    return True
