"""Lists laid out augmented: other places, other names, the same teaching."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
from support.list_shards import new_record

from rankllm_composer.errors import PromptError
from rankllm_composer.prompts.permutations import parse_permutation
from rankllm_composer.prompts.record import augment_record, record_key
from rankllm_composer.prompts.user_turn import parse_user_turn


def ranked(record):
    """Passages best first, with what is known of each: what must not change."""
    turn = parse_user_turn(record.user)
    order = parse_permutation(record.response, len(turn.passages), turn.style)
    return [(turn.passages[i], record.docids[i], record.grades[i]) for i in order]


@pytest.mark.parametrize("style", ["letters", "numbers"])
@pytest.mark.parametrize("identifiers", [None, "letters", "numbers"])
@pytest.mark.parametrize("shuffle_passages", [False, True])
def test_the_order_of_the_teacher_is_kept(style, identifiers, shuffle_passages):
    record = new_record(3, num_candidates=7, style=style)
    augmented = augment_record(record, seed=1, epoch=0, shuffle_passages=shuffle_passages, identifiers=identifiers)
    assert ranked(augmented) == ranked(record)
    assert (augmented.id, augmented.system, augmented.qid) == (record.id, record.system, record.qid)
    turn, before = parse_user_turn(augmented.user), parse_user_turn(record.user)
    assert turn.query == before.query
    assert turn.style == (identifiers or style)
    assert (turn.passages != before.passages) == shuffle_passages


def test_letters_become_numbers_in_the_text():
    record = new_record(0, num_candidates=2, gpt="[B] > [A]")
    augmented = augment_record(record, seed=0, epoch=0, shuffle_passages=False, identifiers="numbers")
    assert augmented.response == "[2] > [1]"
    assert "each indicated by a numerical identifier []" in augmented.user and "\n[1] " in augmented.user


def test_the_order_depends_only_on_seed_epoch_and_record():
    def order(index=3, seed=1, epoch=0):
        record = new_record(index, num_candidates=8)
        return augment_record(record, seed=seed, epoch=epoch, shuffle_passages=True, identifiers=None).docids

    assert order() == order()
    assert len({order(), order(seed=2), order(epoch=1), order(epoch=2)}) == 4
    places = [tuple(docid.split("-")[1] for docid in order(index=index)) for index in range(6)]
    assert len(set(places)) == 6


def test_absent_docids_and_grades_stay_absent():
    record = dataclasses.replace(new_record(1), docids=None, grades=None)
    augmented = augment_record(record, seed=0, epoch=0, shuffle_passages=True, identifiers=None)
    assert augmented.docids is None and augmented.grades is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"human": "Which is best? [A] one [B] two"}, "expected the client's layout"),
        ({"gpt": "[A] > [B] > [C]"}, "missing"),
        ({"num_candidates": 30, "style": "numbers", "num_words": 1}, "expected 1 to 26 with letters"),
    ],
)
def test_records_that_cannot_be_augmented_are_refused(changes, message):
    with pytest.raises(PromptError, match=f"record 'q5': .*{message}.*data.train.shuffle_passages"):
        augment_record(new_record(5, **changes), seed=0, epoch=0, shuffle_passages=True, identifiers="letters")


def test_record_key():
    first_8_bytes = hashlib.blake2b(b"q1", digest_size=8).digest()
    assert record_key("q1") == int.from_bytes(first_8_bytes, "big") // 2 < 2**63
