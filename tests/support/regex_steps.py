"""Count the steps of a backtracking search, so that a test can hold how they grow without measuring time.

The matcher walks the tree that `re` itself compiles, one step per character that is compared. It has none of the
shortcuts of `re`, so that it counts at least as many steps.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from re import _constants as op
from re import _parser
from typing import Any

sys.setrecursionlimit(max(sys.getrecursionlimit(), 50_000))
_CATEGORIES = {
    op.CATEGORY_DIGIT: str.isdigit,
    op.CATEGORY_NOT_DIGIT: lambda char: not char.isdigit(),
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    op.CATEGORY_WORD: lambda char: char.isalnum() or char == "_",
    op.CATEGORY_NOT_WORD: lambda char: not (char.isalnum() or char == "_"),
}


class StepCounter:
    """Backtracking matcher of one pattern; `steps` counts the comparisons so far."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.tree: Any = list(_parser.parse(pattern.pattern, pattern.flags & ~re.UNICODE))
        self.flags = pattern.flags
        self.steps = 0
        self.text = ""

    def spans(self, text: str, *, anchored: bool = False) -> Iterator[tuple[int, int]]:
        """Spans of the matches, as `finditer` finds them; with `anchored`, only one at the start."""
        self.text, start = text, 0
        while start <= len(text):
            end = next(self._sequence(self.tree, 0, start), None)
            if end is not None:
                yield start, end
            if anchored:
                return
            start = start + 1 if end is None or end == start else end

    def _sequence(self, ops: list[Any], index: int, place: int) -> Iterator[int]:
        if index == len(ops):
            yield place
            return
        for end in self._one(*ops[index], place):
            yield from self._sequence(ops, index + 1, end)

    def _one(self, kind: Any, value: Any, place: int) -> Iterator[int]:
        self.steps += 1
        if kind in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            if self._fits(kind, value, place):
                yield place + 1
        elif kind is op.AT:
            if self._at(value, place):
                yield place
        elif kind is op.SUBPATTERN:
            yield from self._sequence(list(value[3]), 0, place)
        elif kind is op.BRANCH:
            for branch in value[1]:
                yield from self._sequence(list(branch), 0, place)
        elif kind in (op.ASSERT, op.ASSERT_NOT):
            direction, inner = value
            start = place - inner.getwidth()[0] if direction < 0 else place
            found = start >= 0 and next(self._sequence(list(inner), 0, start), None) is not None
            if found == (kind is op.ASSERT):
                yield place
        elif kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            yield from self._repeat(kind is op.MAX_REPEAT, *value, place)
        else:
            raise NotImplementedError(kind)

    def _repeat(self, greedy: bool, least: int, most: int, inner: Any, place: int) -> Iterator[int]:
        ops = list(inner)
        if greedy and len(ops) == 1 and ops[0][0] in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            end = place
            while end - place < most and self._fits(*ops[0], end):
                self.steps += 1
                end += 1
            yield from range(end, place + least - 1, -1)
            return

        def more(count: int, start: int) -> Iterator[int]:
            if not greedy and count >= least:
                yield start
            if count < most:
                for end in self._sequence(ops, 0, start):
                    if end > start or count < least:
                        yield from more(count + 1, end)
            if greedy and count >= least:
                yield start

        yield from more(0, place)

    def _fits(self, kind: Any, value: Any, place: int) -> bool:
        if place >= len(self.text):
            return False
        char = self.text[place]
        if kind is op.ANY:
            return bool(self.flags & re.DOTALL) or char != "\n"
        variants = {char, char.lower(), char.upper()} if self.flags & re.IGNORECASE else {char}
        if kind is op.IN:
            return any(self._in_class(value, variant) for variant in variants)
        return any(ord(variant) == value for variant in variants if len(variant) == 1) == (kind is op.LITERAL)

    def _in_class(self, members: Any, char: str) -> bool:
        found, negated = False, False
        for kind, value in members:
            if kind is op.NEGATE:
                negated = True
            elif kind is op.LITERAL:
                found |= len(char) == 1 and ord(char) == value
            elif kind is op.RANGE:
                found |= len(char) == 1 and value[0] <= ord(char) <= value[1]
            else:
                found |= _CATEGORIES[value](char)
        return found != negated

    def _at(self, where: Any, place: int) -> bool:
        text, end = self.text, len(self.text)
        if where in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
            lines = where is op.AT_BEGINNING and self.flags & re.MULTILINE
            return place == 0 or bool(lines and text[place - 1] == "\n")
        if where is op.AT_END:
            lines = self.flags & re.MULTILINE
            return place == end or (text[place] == "\n" and (bool(lines) or place == end - 1))
        if where is op.AT_END_STRING:
            return place == end
        around = [0 <= i < end and (text[i].isalnum() or text[i] == "_") for i in (place - 1, place)]
        return (around[0] != around[1]) == (where is op.AT_BOUNDARY)


def literal_runs(pattern: re.Pattern[str]) -> list[str]:
    """The texts between the operators of a pattern, and one character of each of its classes."""
    found: dict[str, None] = {}

    def walk(ops: Any) -> None:
        run = ""
        for kind, value in ops:
            if kind is op.LITERAL:
                run += chr(value)
                continue
            found[run], run = None, ""
            if kind is op.IN:
                for member, inner in value:
                    if member is op.LITERAL:
                        found[chr(inner)] = None
                    elif member is op.RANGE:
                        found[chr(inner[0])] = None
            elif kind is op.SUBPATTERN:
                walk(value[3])
            elif kind is op.BRANCH:
                for branch in value[1]:
                    walk(branch)
            elif kind in (op.ASSERT, op.ASSERT_NOT):
                walk(value[1])
            elif kind in (op.MAX_REPEAT, op.MIN_REPEAT):
                walk(value[2])
        found[run] = None

    walk(_parser.parse(pattern.pattern, pattern.flags & ~re.UNICODE))
    return [text for text in found if text]
