"""Permutations of a candidate list: `[B] > [A]` as text, as candidate indices (best first), and as ranks.

Two readers: `parse_permutation` is strict and is for training data, `parse_answer` is the inference client's
lenient rule and is for what a model writes.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from rankllm_composer.errors import PromptError

IdentifierStyle = Literal["letters", "numbers"]
MAX_CANDIDATES: dict[str, int] = {"letters": 26, "numbers": 99}
SEPARATOR = " > "
_BRACKETED = re.compile(r"\[([^\[\]]*)\]")

# Digits besides 0-9 in the client: runs of look-alikes, each with the digit of its first character.
_DIGIT_RUNS = (
    ("⁰¹²³⁴⁵⁶⁷⁸⁹", 0),
    ("₀₁₂₃₄₅₆₇₈₉", 0),
    ("①②③④⑤⑥⑦⑧⑨", 1),
    ("❶❷❸❹❺❻❼❽❾", 1),
    ("０１２３４５６７８９", 0),
    ("🄀🄁🄂🄃🄄🄅🄆🄇🄈🄉", 0),
)
_DIGITS = str.maketrans({char: str(first + i) for run, first in _DIGIT_RUNS for i, char in enumerate(run)})


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """The order that the inference client reads from a model's answer.

    Attributes:
        permutation: candidate indices, best first; always complete.
        num_repeated: repeated identifiers (ignored).
        num_out_of_range: identifiers outside the list (ignored).
        num_missing: candidates that the answer did not name (appended in input order).
        is_well_formed: True if `parse_permutation` would accept the answer, white space around it aside.
    """

    permutation: tuple[int, ...]
    num_repeated: int
    num_out_of_range: int
    num_missing: int
    is_well_formed: bool


def identifiers(num_candidates: int, style: IdentifierStyle = "letters") -> tuple[str, ...]:
    """Identifiers of a list in presentation order, without brackets: ("A", "B", …) or ("1", "2", …).

    Raises:
        PromptError: style is unknown, or the list is empty or longer than `MAX_CANDIDATES[style]`.
    """
    if style not in MAX_CANDIDATES:
        raise PromptError(f"identifier style is {style!r}; expected one of {', '.join(get_args(IdentifierStyle))}")
    limit = MAX_CANDIDATES[style]
    if not 1 <= num_candidates <= limit:
        raise PromptError(
            f"number of candidates is {num_candidates}; expected 1 to {limit} with {style}. "
            + ("Use a shorter window." if style == "numbers" else "Use a shorter window, or numbers (1 to 99).")
        )
    if style == "letters":
        return tuple(string.ascii_uppercase[:num_candidates])
    return tuple(str(i + 1) for i in range(num_candidates))


def identifier_style(text: str) -> IdentifierStyle:
    """Style of the first bracketed letter or number of `text`; raises PromptError if it contains none."""
    for match in _BRACKETED.finditer(text):
        if re.fullmatch(r"[A-Z]", match[1]):
            return "letters"
        if re.fullmatch(r"[0-9]{1,2}", match[1]):
            return "numbers"
    raise PromptError(
        f"permutation: {_shorten(text)} names no candidate; expected a text like '[B] > [A]' or '[2] > [1]'"
    )


def format_permutation(permutation: Sequence[int], style: IdentifierStyle = "letters") -> str:
    """Text of a permutation of 0 … N-1, as a training target: (1, 0) → `[B] > [A]`."""
    _check(permutation)
    names = identifiers(len(permutation), style)
    return SEPARATOR.join(f"[{names[i]}]" for i in permutation)


def normalize_white_space(text: str) -> str:
    """An answer with the white space of `format_permutation` around its brackets and separators."""
    text = " ".join(text.split())
    for mark in "[]>":
        text = text.replace(f" {mark}", mark).replace(f"{mark} ", mark)
    return text.replace("]>[", f"]{SEPARATOR}[")


def parse_permutation(text: str, num_candidates: int, style: IdentifierStyle = "letters") -> tuple[int, ...]:
    """Parse a text that names each of N candidates exactly once: `[B] > [A] > [C]` → (1, 0, 2).

    Raises:
        PromptError: identifiers repeat, are missing, exceed the list or are unknown, or the format is another one.
    """
    names = identifiers(num_candidates, style)
    index_of = {name: i for i, name in enumerate(names)}
    found = _BRACKETED.findall(text)
    if SEPARATOR.join(f"[{name}]" for name in found) != text:
        raise PromptError(
            f"permutation is {_shorten(text)}; expected bracketed identifiers joined by ' > ' and nothing else, "
            f"e.g. '{SEPARATOR.join(f'[{name}]' for name in reversed(names[:2]))}'. Correct the response."
        )
    every = identifiers(MAX_CANDIDATES[style], style)
    faults = {
        "repeated": [name for name in names if found.count(name) > 1],
        "missing": [name for name in names if name not in found],
        "beyond the list": [name for name in every[num_candidates:] if name in found],
        "unknown": list(dict.fromkeys(name for name in found if name not in every)),
    }
    wrong = "; ".join(f"{fault}: {_shorten(', '.join(which))}" for fault, which in faults.items() if which)
    if wrong:
        raise PromptError(
            f"permutation is {_shorten(text)} for {num_candidates} candidates ({wrong}); expected each of "
            f"[{names[0]}] to [{names[-1]}] once. Correct the response or remove the record."
        )
    return tuple(index_of[name] for name in found)


def parse_answer(text: str, num_candidates: int, style: IdentifierStyle = "letters") -> ParsedAnswer:
    """Read a model's answer, which may be any text, as the inference client does; the result is always complete.

    Identifiers count in order; repeats and those out of range are dropped, and missing candidates follow in input
    order. As in the client, brackets do not matter, adjacent letters are one identifier (`AB` is the 12th, not the 1st
    and 2nd), only the text after a last `</think>` counts, digit look-alikes (①, ２, ³) are digits, and if a number
    cannot be parsed at all the input order is kept.

    Source:
        rank_llm 0.25.7, listwise answers.
    """
    identifiers(num_candidates, style)
    answer = text.rpartition("</think>")[2] if "</think>" in text else text
    answer = answer.translate(_DIGITS)
    if style == "letters":
        words = "".join(char if char.isalpha() else " " for char in answer).split()
        words = ["".join(str(ord(char) - ord("A") + 1) for char in word) for word in words]
    else:
        words = "".join(char if char.isdigit() else " " for char in answer).split()
    try:
        named = [int(word) - 1 for word in words]
    except ValueError:  # digits that are no decimals, or thousands of them
        return ParsedAnswer(tuple(range(num_candidates)), 0, len(words), num_candidates, False)
    in_range = [i for i in named if 0 <= i < num_candidates]
    first = tuple(dict.fromkeys(in_range))
    missing = tuple(i for i in range(num_candidates) if i not in first)
    return ParsedAnswer(
        permutation=first + missing,
        num_repeated=len(in_range) - len(first),
        num_out_of_range=len(named) - len(in_range),
        num_missing=len(missing),
        is_well_formed=not missing and text.strip() == format_permutation(first, style),
    )


def ranks_from_permutation(permutation: Sequence[int]) -> tuple[int, ...]:
    """Ranks of a permutation of 0 … N-1: `ranks[i]` is the 0-based place of candidate i. (1, 2, 0) → (2, 0, 1)."""
    _check(permutation)
    ranks = [0] * len(permutation)
    for place, index in enumerate(permutation):
        ranks[index] = place
    return tuple(ranks)


def permutation_from_scores(scores: Iterable[float]) -> tuple[int, ...]:
    """Candidate indices by descending score; equal scores keep their input order. (0.1, 0.9, 0.1) → (1, 0, 2)."""
    values = [float(score) for score in scores]
    for i, value in enumerate(values):
        if math.isnan(value):
            raise PromptError(f"scores: NaN at candidate {i}; expected numbers or infinities")
    return tuple(sorted(range(len(values)), key=lambda i: -values[i]))


def _check(values: Sequence[int]) -> None:
    if sorted(values) != list(range(len(values))):
        raise PromptError(
            f"permutation is {_shorten(str(list(values)))}; expected each of 0 to {len(values) - 1} exactly once"
        )


def _shorten(text: str, limit: int = 120) -> str:
    quoted = repr(text)
    return quoted if len(quoted) <= limit else f"{quoted[: limit - 2]}…{quoted[-1]}"
