"""The simple record: how its order is read, that grades and scores reach the losses, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from support.tiny_rerankers import new_tokenizer

from rankllm_composer.errors import RecordError
from rankllm_composer.options import SourceOptions
from rankllm_composer.prompts.encoding import encode_record
from rankllm_composer.prompts.permutations import parse_permutation
from rankllm_composer.prompts.record import Record
from rankllm_composer.prompts.relevance import Preferences, relevance_of
from rankllm_composer.prompts.user_turn import SYSTEM_MESSAGE
from rankllm_composer.sources.look import look
from rankllm_composer.sources.records import Dropped, Noted, open_source

THREE = ["one", "two", "three"]
TWENTY_ONE = [f"text {number}" for number in range(21)]


def named(*docids: str | int) -> list[dict]:
    return [{"docid": docid, "text": text} for docid, text in zip(docids, THREE)]


NAMED = named(*THREE)
NUMBERED = named(2, 3, 1)


def made_of(folder: Path, *rows: dict, **options) -> list:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(SourceOptions(input=str(path), **options))
    assert source.makes_lists
    return [made for item in source.items() for _, made in source.records(item)]


def record_of(folder: Path, row: dict, **options) -> Record:
    (record,) = (made for made in made_of(folder, row, **options) if isinstance(made, Record))
    return record


@pytest.mark.parametrize(
    ("given", "best_first"),
    [
        ({"ranking": [3, 1, 2]}, (2, 0, 1)),
        ({"ranking": [3.0, 1.0, 2.0]}, (2, 0, 1)),
        ({"passages": NAMED, "ranking": ["three", "one", "two"]}, (2, 0, 1)),
        ({"passages": NAMED, "ranking": [3, 1, 2]}, (2, 0, 1)),
        (
            {"passages": [{"docid": i, "text": t} for i, t in zip((70, 80, 90), THREE)], "ranking": [90, 70, 80]},
            (2, 0, 1),
        ),
        (
            {"passages": [{"docid": f"{i}", "text": t} for i, t in zip((1, 2, 3), THREE)], "ranking": [3, 1, 2]},
            (2, 0, 1),
        ),
        ({"scores": [0.5, -1, 7.25]}, (2, 0, 1)),
        ({"scores": [0.5, None, 0.5]}, (0, 2, 1)),
        ({"grades": [1, 0, 3]}, (2, 0, 1)),
        ({"grades": [1.0, None, 2]}, (2, 0, 1)),
        ({"ranking": [2, 1, 3], "scores": [3, 2, 1], "grades": [0, 0, 1]}, (1, 0, 2)),
        ({"scores": [1, 2, 3], "grades": [2, 1, 0]}, (2, 1, 0)),
    ],
    ids=str,
)
def test_the_order_of_a_list(tmp_path, given, best_first):
    record = record_of(tmp_path, {"query": "which [1]?", "passages": THREE, **given})
    assert parse_permutation(record.response, 3) == best_first
    assert record.turn.passages == tuple(THREE) and record.turn.query == "which (1)?"
    assert (record.system, record.has_standard_prompt) == (SYSTEM_MESSAGE, True)
    assert record.ordered_by == ("answer" if "ranking" in given else "scores" if "scores" in given else "grades")
    for name in ("scores", "grades"):
        assert getattr(record, name) == (tuple(given[name]) if name in given else None)


def test_grades_and_scores_reach_the_losses_with_their_ties(tmp_path):
    for given, ranks, scores in (
        ({"grades": [0, 2, 2]}, [2, 0, 0], None),
        ({"scores": [1.5, 1.5, None]}, [0, 0, 2], [1.5, 1.5, math.nan]),
        ({"ranking": [2, 3, 1], "scores": [3, 3, 3]}, [2, 0, 1], [3, 3, 3]),
    ):
        record = record_of(tmp_path, {"query": "q", "passages": THREE, **given})
        encoded = encode_record(record, new_tokenizer(), "combined")
        learned = relevance_of(record, encoded.ranks, Preferences())
        assert learned.ranks.tolist() == ranks
        grades = given.get("grades")
        np.testing.assert_array_equal(learned.grades, np.float32(grades if grades else [math.nan] * 3))
        np.testing.assert_array_equal(learned.teacher_scores, np.float32(scores if scores else [math.nan] * 3))


def test_ids_titles_and_the_words_of_passages(tmp_path):
    passages = [{"docid": 7, "title": "T", "text": "a b c d"}, {"docid": "x", "contents": "e f g h"}]
    row = {"id": "r", "qid": 4, "query": "q", "passages": passages, "grades": [0, 1]}
    record = record_of(tmp_path, row, max_passage_words=4, identifiers="numbers")
    assert (record.id, record.qid, record.docids, record.response) == ("r", "4", ("7", "x"), "[2] > [1]")
    assert record.turn.passages == ("Title: T Content: a", "e f g h")
    query = {"query": {"qid": "9", "text": "q"}, "passages": THREE, "ranking": [2, 1, 3]}
    assert (record_of(tmp_path, query).id, record_of(tmp_path, query).qid) == ("9", "9")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"ranking": [2, 1]}, "ranking has 2 entries for 3 passages; expected one per passage. Correct it."),
        ({"scores": [1, 2, 3, 4]}, "scores has 4 entries for 3 passages"),
        ({"grades": []}, "grades has 0 entries for 3 passages"),
        ({"ranking": [0, 1, 2]}, "ranking counts from 0; expected positions from 1, best first. Add 1 to each."),
        ({"ranking": [1, 2, 4]}, "ranking contains 4; expected the positions 1 to 3, best first. Correct it."),
        ({"ranking": [1, 2, -1]}, "ranking contains -1; expected the positions 1 to 3"),
        ({"ranking": [1, 2, 2]}, "ranking names '2' twice; expected each passage once. Correct it."),
        ({"ranking": [1, 2, True]}, "ranking contains True; expected the positions"),
        ({"ranking": [1, 2, 2.5]}, "ranking contains 2.5; expected the positions"),
        ({"ranking": [1, 2, None]}, "ranking contains None; expected the positions"),
        (
            {"ranking": ["2", "1", "3"]},
            "ranking holds text, but the passages have no docids; expected positions from 1.",
        ),
        ({"ranking": "[2] > [1] > [3]"}, "ranking is '[2] > [1] > [3]'; expected a list with one entry per passage."),
        ({"ranking": {"a": 1}}, "ranking is {'a': 1}; expected a list"),
        (
            {"passages": NAMED, "ranking": ["one", "two", "four"]},
            "ranking contains 'four'; expected the positions 1 to 3",
        ),
        (
            {"passages": NUMBERED, "ranking": [1, 2, 3]},
            "ranking can be read as positions and as docids, which give two",
        ),
        ({"passages": NUMBERED, "ranking": ["1", "2", "3"]}, "ranking can be read as positions and as docids"),
        ({"scores": [1, "2", 3]}, "scores contains '2'; expected numbers, higher for better, or null. Correct it."),
        ({"scores": [1, math.nan, 3]}, "scores contains nan; expected numbers"),
        ({"scores": [1, math.inf, 3]}, "scores contains inf; expected numbers"),
        ({"scores": [1, 10**400, 3]}, "scores contains 1000"),
        ({"scores": [1, False, 3]}, "scores contains False; expected numbers"),
        ({"scores": [None, None, None]}, "scores holds nothing but nulls; expected a value for at least one"),
        ({"grades": [1, -1, 0]}, "grades contains -1; expected whole numbers from 0 (not relevant) up, or null."),
        ({"grades": [1, 0.5, 0]}, "grades contains 0.5; expected whole numbers from 0"),
        ({"grades": [1, True, 0]}, "grades contains True; expected whole numbers"),
        ({"grades": [1, math.nan, 0]}, "grades contains nan; expected whole numbers"),
        ({"grades": ["1", 0, 0]}, "grades contains '1'; expected whole numbers"),
        ({}, "no ranking, scores or grades; expected one of them, which orders the passages. Add it."),
        ({"passages": [], "ranking": []}, "passages holds 0; expected 2 or more. Correct or remove the record."),
        ({"passages": ["a"], "ranking": [1]}, "passages holds 1; expected 2 or more."),
        ({"passages": ["a", " "], "ranking": [2, 1]}, "a passage is empty or no valid Unicode. Correct or remove it."),
        ({"passages": ["a", 5], "ranking": [2, 1]}, "a passage is '5'; expected text. Correct the record."),
        ({"passages": ["a", {"docid": "d"}], "ranking": [2, 1]}, "a passage is \"{'docid': 'd'}\"; expected text."),
        ({"passages": ["a", ["b"]], "ranking": [2, 1]}, "a passage is empty or no valid Unicode."),
        ({"passages": ["a", NAMED[0]], "ranking": [2, 1]}, "1 of 2 passages have a docid; expected all or none."),
        (
            {"passages": [NAMED[0], NAMED[0]], "ranking": [2, 1]},
            "passages holds the docid 'one' twice; expected each once.",
        ),
        ({"query": " ", "ranking": [2, 1, 3]}, "query '0' has no text under 'text'"),
        (
            {"passages": [f"t{i}" for i in range(21)], "scores": [*range(21)]},
            "passages holds 21; expected at most window=20.",
        ),
    ],
    ids=str,
)
def test_records_that_are_wrong_or_could_be_read_in_two_ways_are_refused(tmp_path, given, reason):
    with pytest.raises(RecordError) as failure:
        made_of(tmp_path, {"query": "q", "passages": THREE, **given})
    assert f"records.jsonl:record 0 (line 1): {reason}" in str(failure.value).replace("id '0': ", "")


def test_the_remedies_for_long_lists_and_what_is_counted(tmp_path):
    long = {"query": "q", "passages": [f"t{i}" for i in range(30)], "scores": [*range(30)]}
    with pytest.raises(RecordError, match=r"Raise it \(--window\), with numbers \(--identifiers\) above 26"):
        made_of(tmp_path, long)
    assert record_of(tmp_path, long, window=30, identifiers="numbers").response.startswith("[30] > [29]")
    rows = [
        {"query": "q", "passages": THREE, "grades": [2, 1, 0]},
        {"id": "b", "query": "q", "passages": THREE, "grades": [1, 1, 1]},
        {"id": "c", "query": "q", "passages": THREE, "grades": [0, None, 0]},
    ]
    kinds = [type(made) if isinstance(made, Record) else made for made in made_of(tmp_path, *rows)]
    equal = Dropped("lists whose scores or grades are all equal")
    assert kinds[2:] == [Record, equal, equal]
    assert all(isinstance(made, Noted) for made in kinds[:2]) and "shuffle_passages" in str(kinds[1])


def test_look_shows_a_simple_record(tmp_path):
    row = {"query": "sea birds", "passages": NAMED, "grades": [0, 2, 1]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    shown = list(look([str(tmp_path / "a.jsonl")]))
    assert shown[0].startswith(
        "a.jsonl: queries with ranked passages or queries with their candidates (json), read for"
    )
    assert shown[1] == f"--input {tmp_path / 'a.jsonl'}"
    assert shown[-3:] == [
        "  1. presented as 2 two (grade 2): two",
        "  2. presented as 3 three (grade 1): three",
        "  3. presented as 1 one (grade 0): one",
    ]
