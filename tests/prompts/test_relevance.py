"""What grades and scores decide, and the order drawn among what they leave open."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from support.list_shards import new_record

from rankllm_composer.errors import RecordError
from rankllm_composer.prompts.permutations import parse_permutation
from rankllm_composer.prompts.record import Record, augment_record, validate_record
from rankllm_composer.prompts.relevance import LEFT_OUT, Preferences, count_pairs, draw_ties, relevance_of, tied_share


def tied_record(index=0, **known) -> Record:
    """Five candidates, of which the second is best and the fifth comes next; the rest are tied."""
    record = new_record(index, num_candidates=5, gpt="[B] > [E] > [A] > [C] > [D]")
    return dataclasses.replace(record, **({"grades": (0, 3, None, 0, 1), "ordered_by": "grades"} | known))


SCORED = {"scores": (-1.5, 9.0, -1.5, None, 2.5), "ordered_by": "scores"}


def answer(record):
    return parse_permutation(record.response, 5)


@pytest.mark.parametrize("known", [{}, SCORED])
def test_ties_are_drawn_by_seed_epoch_and_record_and_nothing_else_changes(known):
    record = tied_record(**known)
    drawn = [draw_ties(record, seed=1, epoch=epoch) for epoch in range(40)]
    assert drawn == [draw_ties(record, seed=1, epoch=epoch) for epoch in range(40)]
    assert all(dataclasses.replace(one, response=record.response) == record for one in drawn)
    orders = {answer(one) for one in drawn}
    assert {order[:2] for order in orders} == {(1, 4)}
    last = {order[2:] for order in orders}  # a candidate without a score is behind those that have one
    assert len(last) == (2 if known else 6) and (not known or {order[2] for order in last} == {3})
    others = [draw_ties(record, seed=2, epoch=epoch) for epoch in range(40)]
    assert others != drawn
    # The order drawn does not depend on the order of presentation.
    shuffled = augment_record(record, seed=5, epoch=3, shuffle_passages=True, identifiers=None)
    docids = [draw_ties(one, seed=1, epoch=7).docids for one in (record, shuffled)]
    ordered = [
        [docids[i][k] for k in answer(draw_ties(one, seed=1, epoch=7))] for i, one in enumerate((record, shuffled))
    ]
    assert ordered[0] == ordered[1]


def test_an_answer_without_ties_is_left_alone():
    strict = tied_record(grades=(2, 4, 1, 0, 3))
    for record in (strict, tied_record(ordered_by="answer")):
        assert draw_ties(record, seed=1, epoch=0) is record
        assert tied_share(record) == 0
    assert tied_share(tied_record()) == 3 / 10


def test_what_a_loss_learns():
    record, places = tied_record(), np.array([2, 0, 3, 4, 1])
    relevance = relevance_of(record, places, Preferences())
    assert relevance.ranks.tolist() == [2, 0, 2, 2, 1] and relevance.ranks.dtype == np.int64
    assert relevance.grades.tolist() == [0, 3, 0, 0, 1] and np.isnan(relevance.teacher_scores).all()

    left_out = relevance_of(tied_record(grades=(0, None, None, 0, 1)), places, Preferences(unjudged="left_out"))
    assert left_out.ranks.tolist() == [1, LEFT_OUT, LEFT_OUT, 1, 0]

    ordered = relevance_of(record, places, Preferences(ties="ordered"))
    assert ordered.ranks is places and np.isnan(ordered.grades).all()

    scored = relevance_of(tied_record(**SCORED), places, Preferences())
    assert scored.ranks.tolist() == [2, 0, 2, 4, 1] and np.isnan(scored.grades).all()
    np.testing.assert_array_equal(scored.teacher_scores, np.float32([-1.5, 9, -1.5, math.nan, 2.5]))
    behind = relevance_of(tied_record(**SCORED), places, Preferences(unjudged="left_out"))
    assert behind.ranks.tolist() == [2, 0, 2, LEFT_OUT, 1]

    beside = relevance_of(tied_record(**SCORED | {"ordered_by": "answer"}), places, Preferences())
    assert beside.ranks is places and beside.teacher_scores[1] == 9


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (
            {"grades": (0, 1, None, 0, 3)},
            r"ordered_by is grades, but the response has 1 at place 1 before 3\. Order it",
        ),
        ({"grades": (0, 3, -1, 0, 1)}, r"the response has -1 at place 4 before 0"),
        ({"grades": None}, r"ordered_by is grades, but there are no grades\. Add them, or set ordered_by to answer\."),
        ({"ordered_by": "scores"}, "ordered_by is scores, but there are no scores"),
        (SCORED | {"scores": (0.0, 1.0, math.nan, 0.0, 0.5)}, "scores contains nan; expected numbers below 1e38"),
        (SCORED | {"scores": (0.0, 1.0)}, "scores has 2 entries for 5 passages"),
        ({"grades": (0, 2.5, 0, 0, 1)}, r"grades contains 2\.5; expected integers or nulls"),
    ],
)
def test_an_order_that_its_grades_or_scores_contradict_is_refused(known, message):
    with pytest.raises(RecordError, match=message):
        validate_record(tied_record(**known))
    validate_record(tied_record())
    validate_record(tied_record(**SCORED))


def test_pairs_are_counted_by_what_a_model_could_copy():
    # Presented A to E; the answer is B, E, and A, C and D tied.
    assert count_pairs(tied_record()) == {"tied": 3, "as_presented": 3, "reversed": 4}
    assert count_pairs(tied_record(ordered_by="answer")) == {"as_presented": 6, "reversed": 4}
