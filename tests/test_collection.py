"""The demo's collection and tokenizer: grades, held-out passages, the tokenizer's coverage of prompts and answers."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict

import pytest
from transformers import AutoTokenizer

from rankllm_composer.demo import CollectionOptions, build_collection, build_model_folder, invent_words
from rankllm_composer.prompts.encoding import encode_record
from rankllm_composer.prompts.identifier_tokens import check_tokenizer
from rankllm_composer.prompts.permutations import identifiers
from rankllm_composer.prompts.record import Record
from rankllm_composer.prompts.user_turn import SYSTEM_MESSAGE, render_user_turn
from rankllm_composer.sources.retrieval_files import load_documents, load_judgments, load_queries, load_run

SMALL = CollectionOptions(num_train_queries=50, num_test_queries=20)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return build_collection(tmp_path_factory.mktemp("collection"), SMALL)


def test_a_grade_counts_the_query_in_the_passage(files):
    queries = {**load_queries(files.train_queries), **load_queries(files.test_queries)}
    judgments = load_judgments(files.judgments)
    texts = {row["docid"]: row["text"] for row in map(json.loads, files.docs.read_text().splitlines())}
    assert len(queries) == len(judgments) == 70
    for qid, word in queries.items():
        for docid, grade in judgments[qid].items():
            assert Counter(texts[docid].split())[word] == grade
        assert sorted(judgments[qid].values()) == [0, 1, 2, 3]


def test_no_held_out_passage_is_trained_on(files):
    train, test = load_run(files.train_run), load_run(files.test_run)
    seen = {docid for docids in train.values() for docid in docids}
    held_out = {docid for docids in test.values() for docid in docids}
    assert not seen & held_out
    assert load_documents(files.docs, seen | held_out).keys() == seen | held_out


def test_no_two_passages_have_the_same_text(files):
    texts = [json.loads(line)["text"] for line in files.docs.read_text().splitlines()]
    assert len(set(texts)) == len(texts) == 16 * 3 * (40 + 20)  # words, grades 1 to 3, passages to train on + held out


def test_a_passage_without_the_query_repeats_words_as_often(files):
    """Otherwise repetition alone would reveal relevance, without reading the query."""
    queries = {**load_queries(files.train_queries), **load_queries(files.test_queries)}
    texts = {row["docid"]: row["text"] for row in map(json.loads, files.docs.read_text().splitlines())}
    most_repeated: dict[int, set[int]] = defaultdict(set)
    for qid, graded in load_judgments(files.judgments).items():
        for docid, grade in graded.items():
            if queries[qid] not in texts[docid].split():
                assert grade == 0
                most_repeated[grade].add(max(Counter(texts[docid].split()).values()))
    assert most_repeated[0] == {1, 2, 3}


def test_the_first_stage_is_in_random_order(tmp_path):
    files = build_collection(tmp_path, CollectionOptions(num_train_queries=4000, num_test_queries=1))
    judgments, places = load_judgments(files.judgments), defaultdict(Counter)
    for qid, docids in load_run(files.train_run).items():
        for place, docid in enumerate(docids):
            places[place][judgments[qid][docid]] += 1
    for counts in places.values():  # each grade comes in each place a quarter of the time; 120 is over 4 deviations
        assert all(abs(count - 1000) < 120 for count in counts.values())


def test_the_same_seed_writes_the_same_files(files, tmp_path):
    again = build_collection(tmp_path / "again", SMALL)
    other = build_collection(tmp_path / "other", dataclasses.replace(SMALL, seed=1))
    assert again.docs.read_bytes() == files.docs.read_bytes() and again.words == files.words
    assert again.judgments.read_bytes() == files.judgments.read_bytes()
    assert other.docs.read_bytes() != files.docs.read_bytes()


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="num_candidates is 6; expected 2 to 5"):
        CollectionOptions(num_candidates=6)
    with pytest.raises(ValueError, match="num_words is 4; expected more than the 4"):
        CollectionOptions(num_words=4)
    # A word three times and one of 15 others in one of 4 places: 60 texts.
    with pytest.raises(ValueError, match="passages_per_grade is 61; expected at most 60"):
        CollectionOptions(passages_per_grade=41)


@pytest.mark.parametrize(
    "with_numbers, style, num_candidates",
    [
        (False, "letters", 2),
        (False, "letters", 4),
        (False, "letters", 26),
        (True, "letters", 26),
        (True, "numbers", 4),
        (True, "numbers", 99),
    ],
)
def test_the_tokenizer_reads_every_prompt_and_writes_every_answer(tmp_path, with_numbers, style, num_candidates):
    words = invent_words(16, seed=3)
    build_model_folder(tmp_path, words, with_numbers=with_numbers)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    check_tokenizer(tokenizer, "combined", style, num_candidates)
    names = identifiers(num_candidates, style)
    response = " > ".join(f"[{name}]" for name in reversed(names))
    turn = render_user_turn(words[0], [" ".join(words[1:5])] * num_candidates, style)
    encoded = encode_record(Record("r", SYSTEM_MESSAGE, turn, response), tokenizer, "combined")
    ids = encoded.input_ids.tolist()
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids[encoded.response_start :], skip_special_tokens=True) == response
