"""A JSON array of any length, decoded one element at a time in the memory of the largest element."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

MAX_ELEMENT_CHARS = 1 << 26
_CHUNK_CHARS = 1 << 20
# A value that the end of the buffer cuts off fails there, or at most one escape or literal before it.
_CUT_OFF_CHARS = 16


class JsonArrayError(ValueError):
    """A text that is no JSON array, or not to its end.

    Attributes:
        index: element at which it goes wrong, counted from 0; None outside the elements.
    """

    def __init__(self, index: int | None, reason: str) -> None:
        super().__init__(index, reason)
        self.index, self.reason = index, reason

    def __str__(self) -> str:
        return self.reason


def iterate_array(file: TextIO) -> Iterator[tuple[Any, int]]:
    """Elements of the one JSON array that `file` holds.

    Args:
        file: text, read from where it stands to its end.
    Yields:
        (element, its length in characters).
    Raises:
        JsonArrayError: what was found instead, what is allowed, what to do. OSError and UnicodeDecodeError of the file
            go through.
    """
    text = _SlidingText(file)
    if text.peek() != "[":
        found = repr(text.peek()) if text.peek() else "nothing"
        raise JsonArrayError(
            None,
            f"found {found} at the start, allowed in a .json file is one array of records; "
            "a file with one record a line is named .jsonl",
        )
    text.step()
    index = 0
    while index > 0 or text.peek() != "]":
        if text.peek() == "":
            raise JsonArrayError(index, "the file ends before the array does; it is cut off, fetch it again")
        yield text.decode(index)
        after = text.peek()
        if after == "]":
            break
        if after != ",":
            found = repr(after) if after else "the end of the file"
            raise JsonArrayError(
                index, f"found {found} after it, allowed is ',' or ']'; correct the file or fetch it again"
            )
        text.step()
        index += 1
    text.step()
    if text.peek():
        raise JsonArrayError(None, f"found {text.peek()!r} after the array; remove what follows it")


class _SlidingText:
    """The unread part of a file, as much of it as the value being decoded needs."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._buffer, self._position, self._at_end = "", 0, False
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """Next character that is no white space; "" at the end of the file."""
        while True:
            while self._position < len(self._buffer):
                char = self._buffer[self._position]
                if char not in " \t\n\r":
                    return char
                self._position += 1
            if self._at_end:
                return ""
            self._refill(_CHUNK_CHARS)

    def step(self) -> None:
        """Pass over the character that `peek` showed."""
        self._position += 1

    def decode(self, index: int) -> tuple[Any, int]:
        """The value that starts here, and its length in characters."""
        while True:
            try:
                value, end = self._decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string")
                cut_off = cut_off or error.pos >= len(self._buffer) - _CUT_OFF_CHARS
                if self._at_end or not cut_off:
                    found = self._buffer[error.pos : error.pos + 40]
                    reason = f"no valid JSON: {error.msg} at {found!r}; correct the file or fetch it again"
                    raise JsonArrayError(index, reason) from error
            except (RecursionError, ValueError) as error:  # nested too deep, a number of thousands of digits
                raise JsonArrayError(index, f"cannot be decoded: {error}; correct the file") from error
            else:
                if end < len(self._buffer) - _CUT_OFF_CHARS or self._at_end:  # else a number may go on
                    num_chars, self._position = end - self._position, end
                    return value, num_chars
            num_pending = len(self._buffer) - self._position
            if num_pending > MAX_ELEMENT_CHARS:
                reason = (
                    f"does not end within {MAX_ELEMENT_CHARS >> 20} Mi characters; a quote is missing, correct the file"
                )
                raise JsonArrayError(index, reason)
            self._refill(max(_CHUNK_CHARS, num_pending))

    def _refill(self, num_chars: int) -> None:
        chunk = self._file.read(num_chars)
        self._at_end = not chunk
        self._buffer, self._position = self._buffer[self._position :] + chunk, 0
