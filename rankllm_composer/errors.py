"""Everything that a user can cause: one base class, and one class per kind of thing that is wrong.

A message says where, what it is, what is expected and what to do. `assert` is for our own invariants.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rankllm_composer.escaping import for_screen

T = TypeVar("T")


class RankLLMComposerError(ValueError):
    """Base of every error that this package raises on purpose; its text has no terminal escapes."""

    def __str__(self) -> str:
        return for_screen(super().__str__())


class Problem(NamedTuple):
    """One thing wrong with a recipe or with options, as text "KEY is FOUND; expected EXPECTED. REMEDY"

    `involved` names further dotted keys that the finding rests on. A finding that was worded as a whole elsewhere is
    `found`, with an empty `expected` and `remedy`.
    """

    key: str
    found: str
    expected: str
    remedy: str
    involved: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.expected:
            return self.found
        return f"{self.key} is {self.found}; expected {self.expected}. {self.remedy}"


class RecipeError(RankLLMComposerError):
    """A recipe, or options, cannot be used. `problems` lists everything that is wrong, not only the first."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__("\n  ".join([f"{source}: {counted(len(problems), 'problem')}", *map(str, problems)]))


def worded(kind: type[T]) -> type[T]:
    """Word what is wrong with the arguments of a pydantic dataclass as in a recipe, in a RecipeError."""
    build: Any = kind.__init__

    @functools.wraps(build)
    def checked(self: T, *unnamed: Any, **named: Any) -> None:
        from pydantic import ValidationError

        if unnamed:
            found = f"given {len(unnamed)} without a name"
            raise RecipeError(kind.__name__, [Problem("options", found, "each by its name", "Write NAME=VALUE.")])
        try:
            build(self, **named)
        except ValidationError as error:
            from rankllm_composer.recipe.validate import problems_in

            raise RecipeError(kind.__name__, list(problems_in(error, kind))) from None

    kind.__init__ = checked  # type: ignore[method-assign, assignment]
    return kind


class RecordError(RankLLMComposerError):
    """A record that cannot be trained on, at a `place` such as `train.json:record 17`, counted from 0."""

    def __init__(self, place: str, record_id: str | None, reason: str) -> None:
        super().__init__(place, record_id, reason)
        self.place, self.record_id, self.reason = place, record_id, reason

    def __str__(self) -> str:
        named = "" if self.record_id is None else f"id {self.record_id!r}: "
        return for_screen(f"{self.place}: {named}{self.reason}")


class SourceError(RankLLMComposerError):
    """A file of records, queries, documents, judgments or a run cannot be read as what it is given as."""


class PromptError(RankLLMComposerError):
    """A prompt, a permutation or a window cannot be written, read back or tokenized."""


class ShardError(RankLLMComposerError):
    """A set of shards cannot be built, is not what its index says, or cannot be trained on as requested."""


class StoreError(RankLLMComposerError):
    """A folder or an object store cannot be read or written."""


class CheckpointError(RankLLMComposerError):
    """A checkpoint is damaged, unsafe to load, or cannot be written."""


class ModelError(RankLLMComposerError):
    """A model folder, its weights or its decoding contract cannot be loaded, checked or written."""


class RunError(RankLLMComposerError):
    """A run or a reranking job cannot start, continue or be measured."""


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 problem, 2 problems, 3 queries, 4 batches."""
    several = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else several}"


def counted_as(number: int, phrase: str) -> str:
    """A number with a phrase that begins with its noun in the plural: 1 query without text, 3 queries without text."""
    noun, space, rest = phrase.partition(" ")
    one = f"{noun[:-3]}y" if noun.endswith("ies") else noun.removesuffix("s")
    return f"{number:,} {one if number == 1 else noun}{space}{rest}"


def shown_path(path: Path) -> str:
    """A path as its user would write it: relative to the working folder where it is below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (OSError, ValueError):  # the working folder is gone, or the path is elsewhere
        return str(path)


def shell_line(*words: object) -> str:
    """A command to copy into a shell, with words quoted where needed; capitals such as RECORDS stand for a value."""
    return shlex.join(map(str, words))


def first_line(error: object) -> str:
    """The first line of an error's text that is not empty, at most 200 characters; its class where it has no text."""
    lines = (line.strip() for line in for_screen(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:200]
