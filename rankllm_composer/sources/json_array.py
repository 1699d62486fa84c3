"""A JSON array decoded element by element, in memory that does not grow with the array."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

from rankllm_composer.errors import SourceError

MAX_ELEMENT_CHARS = 1 << 26
_CHUNK_CHARS = 1 << 20

# A value that the end of the buffer cuts off fails there, or at most one escape or literal before it.
_CUT_OFF_CHARS = 16


class JsonArrayError(SourceError):
    """A text that is not one complete JSON array; `index` is the 0-based element where it fails, None outside them."""

    def __init__(self, index: int | None, reason: str) -> None:
        super().__init__(reason)
        self.index = index


def iterate_array(file: TextIO) -> Iterator[tuple[Any, int]]:
    """Decode the elements of the JSON array in a file, one at a time, each with its length in characters.

    Raises:
        JsonArrayError: the text is not one complete array.
        OSError, UnicodeDecodeError: raised by the file.
    """
    text = _SlidingText(file)
    if text.peek() != "[":
        found = repr(text.peek()) if text.peek() else "empty"
        expected = "'[': a .json file is one array of records. Name a file with one record per line .jsonl."
        raise JsonArrayError(None, f"the start is {found}; expected {expected}")
    text.step()
    index = 0
    while index > 0 or text.peek() != "]":
        if text.peek() == "":
            raise JsonArrayError(index, "the file ends before the array does. Fetch it again.")
        yield text.decode(index)
        after = text.peek()
        if after == "]":
            break
        if after != ",":
            found = repr(after) if after else "the end of the file"
            raise JsonArrayError(index, f"it is followed by {found}; expected ',' or ']'. Correct or refetch the file.")
        text.step()
        index += 1
    text.step()
    if text.peek():
        raise JsonArrayError(None, f"the array is followed by {text.peek()!r}; expected nothing. Remove what follows.")


class _SlidingText:
    """The unread part of a file, buffered only as far as the current value requires."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._buffer, self._position, self._at_end = "", 0, False
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """Next character that is not white space; "" at the end of the file."""
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
        """Skip the character that `peek` returned."""
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
                    reason = f"invalid JSON: {error.msg} at {found!r}. Correct or refetch the file."
                    raise JsonArrayError(index, reason) from error
            except (RecursionError, ValueError) as error:  # nested too deep, a number of thousands of digits
                raise JsonArrayError(index, f"cannot be decoded: {error}. Correct the file.") from error
            else:
                if end < len(self._buffer) - _CUT_OFF_CHARS or self._at_end:  # otherwise a number may continue
                    num_chars, self._position = end - self._position, end
                    return value, num_chars
            num_pending = len(self._buffer) - self._position
            if num_pending > MAX_ELEMENT_CHARS:
                limit = MAX_ELEMENT_CHARS >> 20
                raise JsonArrayError(index, f"longer than {limit} Mi characters. Add the missing quote or bracket.")
            self._refill(max(_CHUNK_CHARS, num_pending))

    def _refill(self, num_chars: int) -> None:
        chunk = self._file.read(num_chars)
        self._at_end = not chunk
        self._buffer, self._position = self._buffer[self._position :] + chunk, 0
