"""Operations on a store, repeated for some time while it does not answer or answers that it cannot.

What fails again, such as a missing bucket or a refused key, fails at once; what arrives damaged is fetched once more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from rankllm_composer.errors import first_line
from rankllm_composer.screen import get_logger

log = get_logger(__name__)
Result = TypeVar("Result")
PATIENCE_SECONDS = 300.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 15.0
_TRANSIENT_CODES = {
    "InternalError",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
}
_TRANSIENT_STATUS = {408, 425, 429}
_TRANSIENT_NAMES = ("Timeout", "Connection", "IncompleteRead", "ResponseStreaming", "Protocol", "SSL", "RemoteDisconn")


def patiently(
    operation: Callable[[], Result], what: str, seconds: float, clean_up: Callable[[], None] = lambda: None
) -> Result:
    """Return the result of an operation that may be repeated; repeat it while its failures are transient.

    Args:
        what: the operation, for the log.
        seconds: no attempt begins later than this after the first one; 0 = a single attempt.
        clean_up: called after each failure that is followed by another attempt.
    Raises:
        Exception: that of the last attempt.
    """
    deadline, pause = time.monotonic() + seconds, _FIRST_PAUSE_SECONDS
    was_damaged = False
    while True:
        try:
            return operation()
        except Exception as error:
            left = deadline - time.monotonic()
            if _is_named(error, "Checksum") and not was_damaged:
                was_damaged = True
            elif not is_transient(error) or left < pause:
                raise
            log.warning("%s: %s; trying again (for %.0f s)", what, first_line(error), max(0, left))
        clean_up()
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def is_transient(error: BaseException) -> bool:
    """Whether an error of a store's client may be gone a moment later: a server error, a timeout, a lost connection."""
    for cause in _causes(error):
        status, code = _status(cause), _code(cause)
        if code in _TRANSIENT_CODES or status in _TRANSIENT_STATUS or (status is not None and status >= 500):
            return True
        if status is not None or code:
            return False
        if isinstance(cause, ConnectionError | TimeoutError):
            return True
        if _is_named(cause, *_TRANSIENT_NAMES):
            return True
    return False


def is_absent(error: BaseException) -> bool:
    """Whether an error says that there is no such file."""
    return any(
        _status(cause) == 404 or _code(cause) in ("404", "NoSuchKey") or isinstance(cause, FileNotFoundError)
        for cause in _causes(error)
    )


def _is_named(error: BaseException, *parts: str) -> bool:
    """Whether the name of an error's class, or of one above it, has one of these parts."""
    return any(part in kind.__name__ for kind in type(error).__mro__ for part in parts)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was raised from; clients wrap the answer of the store."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = getattr(found, "last_exception", None) or found.__cause__ or found.__context__


def _response(error: BaseException) -> dict[str, Any]:
    response = getattr(error, "response", None)
    return response if isinstance(response, dict) else {}


def _status(error: BaseException) -> int | None:
    """HTTP status of an answer, where the clients of S3, Google, Azure, Oracle and Hugging Face keep it."""
    values = [
        _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode"),
        getattr(getattr(error, "response", None), "status_code", None),
        *(getattr(error, name, None) for name in ("status_code", "code", "status")),
    ]
    return next((value for value in values if isinstance(value, int) and 100 <= value < 600), None)


def _code(error: BaseException) -> str | None:
    code = _response(error).get("Error", {}).get("Code")
    return None if code is None else str(code)
