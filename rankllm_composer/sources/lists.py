"""Training records made from a query and its candidates: which of them, in which order, with which prompt."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

from rankllm_composer.errors import RecordError
from rankllm_composer.options import SourceOptions
from rankllm_composer.prompts.clients import ClientVersion, passage_word_limit
from rankllm_composer.prompts.permutations import MAX_CANDIDATES, format_permutation
from rankllm_composer.prompts.record import OrderedBy, Record, validate_record
from rankllm_composer.prompts.user_turn import SYSTEM_MESSAGE, clean_query, render_user_turn, truncate_passage
from rankllm_composer.sources.ranked_records import RankedList
from rankllm_composer.sources.records import Dropped, Made, Noted
from rankllm_composer.sources.training_layouts import GradedList


def candidate_lists(
    num_candidates: int, *, window: int, stride: int, num_lists: int, seed: int, qid: str
) -> list[tuple[int, ...]]:
    """Choose and order the candidates of each list of a query.

    The first lists are windows over the first-stage order, from the top, `stride` apart, the last one ending at the
    last candidate. Further lists are random draws of `window` candidates in random order, each from a generator seeded
    with (seed, qid, number of the list). With `num_lists` 0 there is one list per window. Positions count from 0.
    """
    size = min(window, num_candidates)
    last = num_candidates - size
    starts = [*range(0, last, stride), last]
    lists = [tuple(range(start, start + size)) for start in starts]
    for number in range(len(lists), num_lists):
        lists.append(tuple(random.Random(f"{seed}/{qid}/{number}").sample(range(num_candidates), size)))
    return lists[: num_lists or None]


def by_value(values: Sequence[float | None]) -> list[int]:
    """Positions by value, the highest first; equal ones keep their order, and those without a value come last."""
    return sorted(range(len(values)), key=lambda i: math.inf if (value := values[i]) is None else -value)


def word_limit(options: SourceOptions, num_candidates: int, client: ClientVersion) -> int:
    """Words kept of each passage of a list."""
    return options.max_passage_words or passage_word_limit(num_candidates, client=client)


def described_client(options: SourceOptions, client: ClientVersion) -> dict[str, str]:
    """The client's version in the description of a source, if the words of its passages depend on it."""
    return {"client_version": client} if options.max_passage_words is None else {}


def make_record(
    record: Record, query: str, passages: Sequence[str], best_first: Sequence[int], options: SourceOptions, place: str
) -> Record:
    """Write the turns of a record whose ids and grades are known, from passages that are cut already."""
    user = render_user_turn(clean_query(query), passages, options.identifiers)
    response = format_permutation(best_first, options.identifiers)
    made = dataclasses.replace(record, system=SYSTEM_MESSAGE, user=user, response=response)
    validate_record(made, place)
    return made


def record_of_graded_list(found: GradedList, options: SourceOptions, place: str, client: ClientVersion) -> list[Made]:
    """The record of a query with graded passages, presented in random order, since relevant ones are listed first.

    The best come first by the teacher's scores, else by grade; equal ones are tied. A list that
    is longer than the window keeps its first passages, but at least one that is not relevant.
    """
    made: list[Made] = []
    if found.is_numbered:
        made.append((place, Noted(NUMBERED)))
    num_relevant = sum(found.grades)
    kept = [*range(min(num_relevant, options.window - 1)), *range(num_relevant, len(found.texts))][: options.window]
    if num_relevant in (0, len(found.texts)) and found.scores is None:
        return [*made, (place, Dropped("lists whose passages are all relevant, or none"))]
    if len(kept) < len(found.texts):
        made.append((place, Noted("lists longer than the window, of which the first passages are kept")))
    random.Random(f"{options.seed}/{found.id}").shuffle(kept)
    scores = None if found.scores is None else tuple(found.scores[i] for i in kept)
    grades = tuple(found.grades[i] for i in kept)
    record = Record(
        found.id,
        "",
        "",
        "",
        qid=found.qid,
        docids=None if found.docids is None else tuple(found.docids[i] for i in kept),
        grades=grades,
        scores=scores,
        ordered_by="grades" if scores is None else "scores",
    )
    passages = [truncate_passage(found.texts[i], word_limit(options, len(kept), client)) for i in kept]
    return [*made, (place, make_record(record, found.query, passages, by_value(scores or grades), options, place))]


def record_of_ranked_list(found: RankedList, options: SourceOptions, place: str, client: ClientVersion) -> list[Made]:
    """The record of a query with ranked passages, presented in their order; equal scores or grades are tied.

    Raises:
        RecordError: the list is longer than the window.
    """
    num_passages = len(found.texts)
    if num_passages > options.window:
        reason = f"passages holds {num_passages}; expected at most window={options.window}. Raise it (--window)"
        if num_passages > (most := MAX_CANDIDATES[options.identifiers]):
            reason += f", with numbers (--identifiers) above {most}"
        raise RecordError(place, found.id, f"{reason}, or shorten the list.")
    by: OrderedBy = "answer" if found.ranking is not None else "scores" if found.scores is not None else "grades"
    values = {"answer": None, "scores": found.scores, "grades": found.grades}[by]
    best_first = list(found.ranking or ()) if values is None else by_value(values)
    made: list[Made] = [(place, Noted(NUMBERED))] if found.is_numbered else []
    if values is not None and len({value or 0 if by == "grades" else value for value in values}) == 1:
        return [*made, (place, Dropped("lists whose scores or grades are all equal"))]
    if best_first == list(range(num_passages)):
        made.append((place, Noted(IN_ORDER)))
    record = Record(
        found.id,
        "",
        "",
        "",
        qid=found.qid,
        docids=found.docids,
        grades=found.grades,
        scores=found.scores,
        ordered_by=by,
    )
    passages = [truncate_passage(text, word_limit(options, num_passages, client)) for text in found.texts]
    return [*made, (place, make_record(record, found.query, passages, best_first, options, place))]


IN_ORDER = (
    "lists whose passages stand in the order of the answer; if most do, a model learns to keep the order: set "
    "data.train.shuffle_passages"
)
NUMBERED = "records without an id, numbered instead"
