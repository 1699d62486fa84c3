"""What grades or a teacher's scores decide between the candidates of a list, and what they leave open: ties.

An answer is one order of all candidates. Where grades or scores made it (`Record.ordered_by`), candidates of equal
value stand in it in the order of the first stage, which is nothing to learn: they are tied.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from rankllm_composer.options import Ties, Unjudged
from rankllm_composer.prompts.permutations import format_permutation, identifier_style, parse_permutation
from rankllm_composer.prompts.record import Record, record_key

LEFT_OUT = -1
"""Rank of a candidate that takes part in no comparison."""

_TIES = 1  # distinguishes the draw from that of the order of presentation


@dataclass(frozen=True, slots=True)
class Preferences:
    """What counts as a preference between two candidates.

    Args:
        ties: "tied" = candidates of equal grade or score are neither better nor worse; "ordered" = the answer's order
            counts in full, as if a teacher had given it.
        unjudged: candidates without a grade or score: "irrelevant" = grade 0, or worse than every score; "left_out" =
            in no comparison of a ranking loss.
    """

    ties: Ties = "tied"
    unjudged: Unjudged = "irrelevant"


@dataclass(frozen=True, slots=True)
class Relevance:
    """What a ranking loss learns from a list, per candidate in presentation order.

    Attributes:
        ranks: (N,) int64, number of better candidates: 0 = best, equal = tied, `LEFT_OUT` = in no comparison.
        grades: (N,) float32, the grades if they order the list, otherwise NaN.
        teacher_scores: (N,) float32, NaN = none.
    """

    ranks: NDArray[np.int64]
    grades: NDArray[np.float32]
    teacher_scores: NDArray[np.float32]


def order_values(record: Record) -> tuple[float, ...] | None:
    """What orders the candidates, higher is better, equal is tied; None if only the answer does, which has no ties."""
    if record.ordered_by == "grades" and record.grades is not None:
        return tuple(0.0 if grade is None else float(grade) for grade in record.grades)
    if record.ordered_by == "scores" and record.scores is not None:
        return tuple(-math.inf if score is None else score for score in record.scores)
    return None


def tied_share(record: Record) -> float:
    """Share of the pairs of a list that its grades or scores leave open, 0 to 1."""
    values = order_values(record)
    if values is None or len(values) < 2:
        return 0.0
    sizes = [values.count(value) for value in set(values)]
    return sum(size * (size - 1) for size in sizes) / (len(values) * (len(values) - 1))


def count_pairs(record: Record) -> Counter[str]:
    """Pairs of candidates of a list: "tied", "as_presented" with the better one first, and "reversed"."""
    num = len(record.turn.passages)
    places = parse_permutation(record.response, num, identifier_style(record.response))
    values = order_values(record)
    pairs = list(combinations(places, 2))
    ordered = pairs if values is None else [(i, j) for i, j in pairs if values[i] != values[j]]
    as_presented = sum(better < worse for better, worse in ordered)
    return +Counter(tied=len(pairs) - len(ordered), as_presented=as_presented, reversed=len(ordered) - as_presented)


def draw_ties(record: Record, *, seed: int, epoch: int) -> Record:
    """Return the record with tied candidates in a random order in its answer.

    The order depends only on seed, epoch and the record's id. Over the epochs the answer favors none of the candidates
    that its grades or scores leave equal.
    """
    values = order_values(record)
    if values is None or len(set(values)) == len(values):
        return record
    style = identifier_style(record.response)
    permutation = parse_permutation(record.response, len(values), style)
    drawn = np.random.default_rng((seed, epoch, record_key(record.id), _TIES)).permutation(len(values)).tolist()
    best_first = sorted((permutation[place] for place in drawn), key=lambda i: -values[i])
    return dataclasses.replace(record, response=format_permutation(best_first, style))


def relevance_of(record: Record, ranks: NDArray[np.int64], preferences: Preferences) -> Relevance:
    """What a ranking loss learns from a record.

    Args:
        record: the list.
        ranks: (N,) int64, places of the candidates in its answer, which count where nothing else orders it.
        preferences: what counts as a preference.
    """
    unknown = np.full(len(ranks), np.nan, dtype=np.float32)
    teacher_scores = unknown if record.scores is None else _floats(record.scores)
    values = order_values(record) if preferences.ties == "tied" else None
    if values is None:
        return Relevance(ranks, unknown, teacher_scores)
    given = (record.grades if record.ordered_by == "grades" else record.scores) or ()
    order = np.array(values)
    counts = np.array([preferences.unjudged == "irrelevant" or value is not None for value in given])
    better = (order[None, :] > order[:, None]) & counts[None, :]  # (N, N), [i, j]: j is better than i
    tied_ranks = np.where(counts, better.sum(axis=1), LEFT_OUT).astype(np.int64)
    grades = order.astype(np.float32) if record.ordered_by == "grades" else unknown
    return Relevance(tied_ranks, grades, teacher_scores)


def _floats(values: Sequence[float | None]) -> NDArray[np.float32]:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float32)
