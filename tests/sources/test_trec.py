"""Training lists from retrieval files: their candidates, order, target and grades, and what is left out."""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st

from rankllm_composer.errors import RecordError, SourceError
from rankllm_composer.options import SourceOptions
from rankllm_composer.prompts import user_turn
from rankllm_composer.prompts.permutations import parse_permutation
from rankllm_composer.prompts.record import Record
from rankllm_composer.prompts.user_turn import SYSTEM_MESSAGE, parse_user_turn
from rankllm_composer.sources.entries import Judgment, RunLine
from rankllm_composer.sources.lists import by_value, candidate_lists
from rankllm_composer.sources.records import Dropped, Noted, open_source, read_records
from rankllm_composer.sources.retrieval_files import load_run, read_part
from rankllm_composer.sources.trec import NOT_JUDGED, PARTLY_ORDERED, TrecSource

QUERIES = {"q1": "sea [1] birds", "q2": "old maps"}
DOCS = {"d1": "gulls and terns", "d2": "the mole", "d3": "auks [2] fly", "d4": "a  chart\nof 1600", "d5": "ink"}
TITLES = {"d3": "Auks"}
RUN = {"q1": ["d2", "d1", "d3", "d5"], "q2": ["d4", "d5", "d1"]}
GRADES = {"q1": {"d1": 1, "d3": 2, "d5": 0}, "q2": {"d4": 1, "d2": 3}}


def write_files(folder: Path, *, run=RUN, grades=GRADES, queries=QUERIES, docs=DOCS, teacher=None) -> dict[str, str]:
    """The files of the small collection above, by the name of their argument."""

    def lines(name: str, texts: list[str]) -> str:
        (folder / name).write_text("".join(text + "\n" for text in texts), encoding="utf-8")
        return str(folder / name)

    def run_lines(lists: dict[str, list[str]]) -> list[str]:
        ranked = [(qid, docid, rank) for qid, docids in lists.items() for rank, docid in enumerate(docids, 1)]
        return [f"{qid} Q0 {docid} {rank} {10 / rank} tag" for qid, docid, rank in ranked]

    files = {
        "run": lines("first.trec", run_lines(run)),
        "queries": lines("queries.jsonl", [json.dumps({"qid": qid, "text": text}) for qid, text in queries.items()]),
        "docs": lines(
            "docs.jsonl",
            [json.dumps({"docid": docid, "title": TITLES.get(docid, ""), "text": docs[docid]}) for docid in docs],
        ),
    }
    if grades is not None:
        judged = [f"{qid} 0 {docid} {grade}" for qid, known in grades.items() for docid, grade in known.items()]
        files["judgments"] = lines("qrels.trec", judged)
    if teacher is not None:
        files["teacher_run"] = lines("teacher.trec", run_lines(teacher))
    return files


def build(folder: Path, *, files=None, **options) -> tuple[list, Counter]:
    """Records and counts of what was left out."""
    dropped: Counter[str] = Counter()
    files = files or write_files(folder)
    return list(read_records(TrecSource(SourceOptions(**files, **options)), dropped=dropped)), dropped


def test_a_list_has_the_prompt_of_the_client_and_the_order_of_the_judgments(tmp_path):
    (place, record), _ = build(tmp_path)[0]
    assert place == "first.trec:query 'q1' list 0"
    assert (record.id, record.qid, record.system) == ("q1-0", "q1", SYSTEM_MESSAGE)
    assert record.docids == ("d2", "d1", "d3", "d5")
    assert (record.grades, record.scores, record.ordered_by) == ((None, 1, 2, 0), None, "grades")
    turn = parse_user_turn(record.user)
    assert turn.query == "sea (1) birds"
    assert turn.passages == ("the mole", "gulls and terns", "Title: Auks Content: auks (2) fly", "ink")
    # d3 has grade 2, d1 grade 1; d2 (not judged) and d5 (judged 0) tie and stay in first-stage order.
    assert record.response == "[C] > [B] > [A] > [D]"


def test_a_teacher_run_gives_the_order_and_judgments_the_grades(tmp_path):
    files = write_files(tmp_path, teacher={"q1": ["d5", "d9", "d2"], "q2": ["d1", "d4", "d5"]})
    records, dropped = build(tmp_path, files=files)
    # d1 and d3 are unknown to the teacher: tied behind the others. d9 is not in the list.
    assert records[0][1].response == "[D] > [A] > [B] > [C]"
    assert (records[0][1].grades, records[0][1].ordered_by) == ((None, 1, 2, 0), "scores")
    assert records[0][1].scores == (pytest.approx(10 / 3), None, None, 10.0)
    assert records[1][1].response == "[C] > [A] > [B]"
    assert not dropped


def test_a_teacher_alone_leaves_grades_unknown(tmp_path):
    files = write_files(tmp_path, grades=None, teacher={"q2": ["d1", "d4", "d5"]})
    records, dropped = build(tmp_path, files=files)
    assert [(record.id, record.grades) for _, record in records] == [("q2-0", None)]
    assert dropped == {"queries without a teacher's order": 1}


@pytest.mark.parametrize(
    ("num_candidates", "window", "stride", "expected"),
    [
        (6, 4, 2, [(0, 1, 2, 3), (2, 3, 4, 5)]),
        (7, 4, 2, [(0, 1, 2, 3), (2, 3, 4, 5), (3, 4, 5, 6)]),
        (5, 4, 4, [(0, 1, 2, 3), (1, 2, 3, 4)]),
        (8, 4, 4, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (8, 2, 5, [(0, 1), (5, 6), (6, 7)]),
        (4, 4, 2, [(0, 1, 2, 3)]),
        (3, 4, 2, [(0, 1, 2)]),
    ],
)
def test_windows_cover_the_first_stage_from_the_top(num_candidates, window, stride, expected):
    lists = candidate_lists(num_candidates, window=window, stride=stride, num_lists=0, seed=1, qid="q")
    assert lists == expected


def test_the_stride_is_half_of_the_window_and_one_above_it_warns(tmp_path):
    files = write_files(tmp_path)
    assert [SourceOptions(**files, window=window).step for window in (20, 4, 3, 2)] == [10, 2, 1, 1]
    assert TrecSource(SourceOptions(**files, window=4)).describe()["options"]["stride"] == 2
    with pytest.warns(UserWarning, match=r"stride is 5 with a window of 3: no list shows the 2 candidates between"):
        open_source(SourceOptions(**files, window=3, stride=5))


def test_further_lists_are_random_draws_that_depend_on_seed_query_and_number_only():
    def lists(num_lists, seed=1, qid="q"):
        return candidate_lists(30, window=5, stride=5, num_lists=num_lists, seed=seed, qid=qid)

    assert lists(2) == lists(0)[:2]
    assert lists(9)[:6] == lists(0)
    assert lists(9) == lists(12)[:9]
    assert all(len(set(drawn)) == 5 and set(drawn) <= set(range(30)) for drawn in lists(12))
    assert any(list(drawn) != sorted(drawn) for drawn in lists(12)[6:])
    assert lists(9)[6:] != lists(9, seed=2)[6:]
    assert lists(9)[6:] != lists(9, qid="p")[6:]
    # Pinned: a set built on another machine, or years later, must be the same.
    assert lists(7)[6] == PINNED_DRAW


PINNED_DRAW = (26, 20, 4, 2, 28)


def test_random_lists_keep_target_grades_and_documents_consistent(tmp_path):
    records, _ = build(tmp_path, lists_per_query=12, window=4, require_relevant=False)
    shown = {record.docids for _, record in records if record.qid == "q1"}
    assert len(shown) > 1
    for _, record in records:
        known = GRADES[record.qid]
        assert record.grades == tuple(known.get(docid) for docid in record.docids)
        order = parse_permutation(record.response, len(record.docids))
        by_hand = sorted(record.docids, key=lambda docid: (-known.get(docid, 0), RUN[record.qid].index(docid)))
        assert [record.docids[i] for i in order] == by_hand
        passages = parse_user_turn(record.user).passages
        assert all(DOCS[docid].split()[0] in passage for docid, passage in zip(record.docids, passages))


def test_lists_without_a_relevant_passage_are_dropped_and_counted_or_kept(tmp_path):
    _, dropped = build(tmp_path, window=2, stride=2, lists_per_query=0)
    # q1: (d2, d1) and (d3, d5) hold grades 1 and 2; q2: (d4, d5) holds grade 1, (d5, d1) none.
    assert dropped == {"lists without a relevant passage": 1}
    records, dropped = build(tmp_path, window=2, stride=2, lists_per_query=0, require_relevant=False)
    assert [record.id for _, record in records] == ["q1-0", "q1-1", "q2-0", "q2-1"]
    assert not dropped


def test_lists_without_a_judged_candidate_are_counted_where_they_are_kept(tmp_path):
    options = {"require_relevant": False, "window": 2, "stride": 2, "lists_per_query": 0}
    source = TrecSource(SourceOptions(**write_files(tmp_path, grades={"q1": {"d1": 0}}), **options)).prepare(tmp_path)
    made = [entry for item in source.items() for _, entry in source.records(item)]
    assert sum(isinstance(entry, Record) for entry in made) == 4
    assert made.count(Noted(NOT_JUDGED)) == 3


def test_queries_that_make_no_list_are_counted(tmp_path):
    files = write_files(
        tmp_path,
        run={**RUN, "q3": ["d1", "d2"], "q4": ["d1"]},
        queries={**QUERIES, "q4": "one candidate", "q5": "none"},
    )
    records, dropped = build(tmp_path, files=files)
    assert [record.qid for _, record in records] == ["q1", "q2"]
    assert dropped == {"queries of the run that the queries file lacks": 1, "queries with fewer than two candidates": 2}


def test_the_scores_are_the_order_and_depth_cuts_it(tmp_path):
    files = write_files(tmp_path)
    lines = Path(files["run"]).read_text().splitlines(keepends=True)
    Path(files["run"]).write_text("".join(reversed(lines)))
    assert build(tmp_path, files=files)[0][0][1].docids == ("d2", "d1", "d3", "d5")
    assert build(tmp_path, files=files, depth=3)[0][0][1].docids == ("d2", "d1", "d3")


def write_run(path: Path, lines: list[str]) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def ranked_by_trec_eval(lines: list[str]) -> list[str]:
    """Documents of query q1 as trec_eval orders them, each found as the only relevant one by its reciprocal rank."""
    scores = {docid: float(score) for _, _, docid, _, score, _ in (line.split() for line in lines)}
    place = {}
    for docid in scores:
        evaluator = pytrec_eval.RelevanceEvaluator({"q1": {docid: 1}}, {"recip_rank"})
        place[docid] = round(1 / evaluator.evaluate({"q1": scores})["q1"]["recip_rank"])
    return sorted(scores, key=place.__getitem__)


@pytest.mark.parametrize(
    ("lines", "noted"),
    [
        (["q1 Q0 d2 0 1.5 t", "q1 Q0 d1 0 9.5 t", "q1 Q0 d3 0 -2 t"], "disagree with the scores"),
        (["q1 Q0 d1 1 5 t", "q1 Q0 d3 2 5 t", "q1 Q0 d2 3 5 t"], "differ among equal scores"),
        (["q1 Q0 d1 1 17.123456789 t", "q1 Q0 d2 2 17.123456788 t"], "differ among equal scores"),  # equal in 32 bits
        (["q1 Q0 d1 1.0 1e3 t", "q1 Q0 d2 2.0 9.5e2 t"], None),
        (["q1 Q0 d2 2 1 t", "q1 Q0 d1 1 2 t"], None),
        (["q1 Q0 d1 1 1 t", "q1 Q0 d2 2 2 t"], "disagree with the scores"),
    ],
)
def test_candidates_and_teachers_are_in_the_order_of_trec_eval(tmp_path, lines, noted):
    order = ranked_by_trec_eval(lines)
    assert load_run(write_run(tmp_path / "r", lines)) == {"q1": order}
    files = write_files(tmp_path, grades=None) | {"teacher_run": str(tmp_path / "r")}
    source = TrecSource(SourceOptions(**files, identifiers="numbers")).prepare(tmp_path)
    first = next(source.items())
    made = [entry for _, entry in source.records(first)]
    record = made[-1]
    best = [record.docids[i] for i in parse_permutation(record.response, 4, "numbers")]
    assert best[: len(order)] == order
    texts = [entry.what for entry in made if isinstance(entry, Noted)]
    assert [noted in text for text in texts if "queries of r" in text] == ([True] if noted else [])
    files = write_files(tmp_path) | {"run": str(tmp_path / "r")}
    assert build(tmp_path, files=files, require_relevant=False)[0][0][1].docids == tuple(order)


def test_lists_that_the_teacher_does_not_order_are_dropped_or_counted(tmp_path):
    files = write_files(tmp_path, teacher={"q1": ["d1", "d9"], "q2": ["d8", "d7"]})
    source = TrecSource(SourceOptions(**files, window=2, stride=2, lists_per_query=0)).prepare(tmp_path)
    made = [entry for item in source.items() for _, entry in source.records(item)]
    counts = Counter(entry for entry in made if not isinstance(entry, Record))
    dropped = Dropped("lists without a candidate in the teacher's order")
    assert counts == {dropped: 3, Noted(PARTLY_ORDERED): 1}  # q1: (d2, d1) in part, (d3, d5) not at all; q2: two lists
    assert [entry.response for entry in made if isinstance(entry, Record)] == ["[B] > [A]"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": {"x": ["d1", "d2"]}}, "first.trec and queries.jsonl share no query id: first.trec has 'x'"),
        (
            {"docs": {"x1": "a"}},
            "first.trec and docs.jsonl share no document id: first.trec has 'd2', docs.jsonl has 'x1'",
        ),
        ({"grades": {"q9": {"d1": 1}}}, "qrels.trec and queries.jsonl share no query id: qrels.trec has 'q9'"),
        ({"grades": {"q1": {"D1": 1}}}, "qrels.trec and first.trec share no document id: qrels.trec has 'D1'"),
        ({"teacher": {"q9": ["d1"]}}, "teacher.trec and queries.jsonl share no query id: teacher.trec has 'q9'"),
        ({"teacher": {"q2": ["D1"]}}, "teacher.trec and first.trec share no document id: teacher.trec has 'D1'"),
    ],
)
def test_files_that_share_no_id_are_an_error_that_shows_one_of_each(tmp_path, change, message):
    with pytest.raises(SourceError) as caught:
        build(tmp_path, files=write_files(tmp_path, **change))
    assert message in str(caught.value)
    assert str(caught.value).endswith("Check that they belong together.")


def test_duplicates_in_a_run_stop_or_keep_the_highest_score(tmp_path):
    files = write_files(tmp_path)
    files["run"] = write_run(tmp_path / "r", ["q1 Q0 d1 1 9 t", "q1 Q0 d2 2 8 t", "q1 Q0 d1 3 7 t", "q1 Q0 d2 4 8 t"])
    with pytest.raises(
        SourceError, match=r"r:line 4: document 'd2' .*in line 2. Remove one, or set duplicates to first"
    ):
        load_run(files["run"])
    assert load_run(files["run"], "first") == {"q1": ["d1", "d2"]}
    with pytest.raises(RecordError, match="r:line 4"):
        build(tmp_path, files=files)
    assert build(tmp_path, files=files, duplicates="first")[0][0][1].docids == ("d1", "d2")


def test_a_run_that_holds_queries_and_documents_needs_no_other_file(tmp_path):
    candidates = [{"docid": docid, "score": 0, "doc": {"contents": DOCS[docid]}} for docid in RUN["q1"]]
    rows = [{"query": {"qid": qid, "text": text}, "candidates": candidates} for qid, text in QUERIES.items()]
    requests = write_run(tmp_path / "requests.jsonl", [json.dumps(row) for row in rows])
    results = [row | {"candidates": candidates[::-1]} for row in rows]
    teacher = write_run(tmp_path / "results.json", [json.dumps(results)])
    records, dropped = build(tmp_path, files={"run": requests, "teacher_run": teacher})
    assert [(record.id, record.docids, record.response) for _, record in records] == [
        (f"{qid}-0", tuple(RUN["q1"]), "[D] > [C] > [B] > [A]") for qid in QUERIES
    ]
    assert parse_user_turn(records[0][1].user).query == "sea (1) birds"
    assert not dropped
    with pytest.raises(SourceError, match=r"queries is not given, and first.trec holds no queries"):
        build(tmp_path, files={"run": write_files(tmp_path)["run"], "teacher_run": teacher})


def test_permutations_order_the_lists_with_the_same_number(tmp_path):
    passages = [{"docid": docid, "text": text} for docid, text in DOCS.items()]
    rows = [
        {"query": f"query {number}", "positive_passages": passages[:1], "retrieved_passages": passages[:size]}
        for number, size in enumerate((3, 2, 3))
    ]
    run = write_run(tmp_path / "marco.jsonl", [json.dumps(row) for row in rows])
    (tmp_path / "gpt.json").write_text(json.dumps(["[2] > [3] > [1]", "I am sorry.", "[3] > [3] > [9] > [1]"]))
    files = {"run": run, "teacher_run": str(tmp_path / "gpt.json"), "judgments": run}
    records, dropped = build(tmp_path, files=files)
    assert [(record.id, record.response, record.grades) for _, record in records] == [
        ("0-0", "[B] > [C] > [A]", (1, None, None)),
        ("2-0", "[C] > [A] > [B]", (1, None, None)),
    ]
    assert dropped == {"queries without a teacher's order": 1}
    trec = write_files(tmp_path) | {"teacher_run": str(tmp_path / "gpt.json")}
    with pytest.raises(SourceError, match=r"which has no such list\. Name the run whose lists were permuted"):
        build(tmp_path, files=trec)


@pytest.mark.parametrize(("words", "expected"), [(2, "Title: Auks"), (4, "Title: Auks Content: auks")])
def test_passages_are_cut_to_the_word_limit(tmp_path, words, expected):
    record = build(tmp_path, max_passage_words=words)[0][0][1]
    assert parse_user_turn(record.user).passages[2] == expected


@pytest.mark.parametrize(("client", "words"), [("0.26.0", 300), ("0.25.7", 300 * 20 // 3)])
def test_without_a_limit_the_rule_of_the_client_applies(tmp_path, client, words):
    options = SourceOptions(**write_files(tmp_path, docs=dict.fromkeys(DOCS, "word " * 5000)))
    source = open_source(options, client)
    assert source.describe()["options"]["client_version"] == client
    _, record = list(read_records(source))[1]
    assert [len(text.split()) for text in parse_user_turn(record.user).passages] == [words] * 3


def test_numbers_name_lists_beyond_26(tmp_path):
    docs = {f"d{i}": f"text {i}" for i in range(40)}
    files = write_files(tmp_path, run={"q1": list(docs)}, docs=docs, grades={"q1": {"d30": 1}})
    (_, record), *_ = build(tmp_path, files=files, window=40, stride=20, identifiers="numbers")[0]
    assert record.response.startswith("[31] > [1] > [2]")
    assert parse_user_turn(record.user).style == "numbers"


def test_negative_grades_are_worst_and_count_as_zero_in_measures(tmp_path):
    files = write_files(tmp_path, grades={"q1": {"d2": -2, "d1": 1}})
    record = build(tmp_path, files=files)[0][0][1]
    assert record.response == "[B] > [C] > [D] > [A]"
    assert (record.grades, record.known_grades) == ((-2, 1, None, None), (0, 1, 0, 0))


@pytest.mark.parametrize(
    ("file", "number", "line", "message_part"),
    [
        ("run", 2, "q1 Q0 d1 2 5.0", "has 5 fields"),
        ("run", 2, "q1 Q0 d1 second 5.0 tag", "rank is 'second' and score '5.0'; expected numbers"),
        ("run", 2, "q1 Q0 d1 2 high tag", "score 'high'"),
        ("run", 2, "q1 Q0 d1 2 nan tag", "nan"),
        ("judgments", 3, "q1 0 d5", "has 3 fields"),
        ("judgments", 3, "q1 0 d5 good", "grade is 'good'; expected a whole number"),
        ("judgments", 3, "q1 0 d5 1.5", "grade is '1.5'"),
        ("queries", 1, '{"qid": "q1"', "invalid JSON"),
        ("queries", 1, '{"qid": "q1"}', "an object with the keys 'qid'; expected queries"),
        ("queries", 2, '{"qid": "q2"}', "has no text"),
        ("queries", 2, '{"qid": true, "text": "a"}', "no id under 'qid'"),
        ("docs", 4, '["d4", "text"]', "no id under 'docid'"),
        ("docs", 4, '{"docid": "d\\ud800", "text": "a"}', "surrogate"),
    ],
)
def test_a_malformed_line_is_reported_with_file_and_line(tmp_path, file, number, line, message_part):
    files = write_files(tmp_path)
    path = Path(files[file])
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(SourceError) as caught:
        build(tmp_path, files=files)
    assert str(caught.value).startswith(f"{path.name}:line {number}: ")
    assert message_part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message_part"),
    [
        ({"docs": {"d1": "a", "d2": "b", "d3": "c", "d4": "d"}}, "document 'd5' of the run is not in docs.jsonl"),
        (
            {"run": {"q1": ["d1", "d2", "d1"]}},
            "first.trec:line 3: document 'd1' is repeated for query 'q1', also in line 1",
        ),
    ],
)
def test_files_that_contradict_each_other_are_an_error(tmp_path, change, message_part):
    with pytest.raises(RecordError) as caught:
        build(tmp_path, files=write_files(tmp_path, **change))
    assert message_part in str(caught.value)


def test_two_grades_for_one_document_are_an_error(tmp_path):
    files = write_files(tmp_path)
    with Path(files["judgments"]).open("a") as file:
        file.write("q1 0 d1 3\n")
    with pytest.raises(RecordError, match=r"qrels.trec:line 6: document 'd1' has grade 3 here and 1 before"):
        build(tmp_path, files=files)


def test_a_document_with_two_texts_is_bad_only_where_a_list_shows_it(tmp_path):
    files = write_files(tmp_path)
    with Path(files["docs"]).open("a") as file:
        file.write(json.dumps({"docid": "d2", "text": "again"}) + "\n")
        file.write(json.dumps({"docid": "d1", "title": "", "text": DOCS["d1"]}) + "\n")  # the same text is no fault
        file.writelines(json.dumps({"docid": "d9", "text": text}) + "\n" for text in ("not", "shown"))
    with pytest.raises(RecordError) as caught:
        build(tmp_path, files=files)
    assert str(caught.value).startswith("first.trec:query 'q1' list 0: ")
    assert "docs.jsonl:line 6: document 'd2' is repeated with another text, also in docs.jsonl:line 2." in str(
        caught.value
    )
    source = TrecSource(SourceOptions(**files))
    assert [record.qid for _, record in read_records(source, skip_bad=True)] == ["q2"]


def test_a_query_with_two_texts_is_bad_on_its_own(tmp_path):
    files = write_files(tmp_path)
    with Path(files["queries"]).open("a") as file:
        file.write(json.dumps({"qid": "q2", "text": "old maps"}) + "\n")
        file.write(json.dumps({"qid": "q1", "text": "again"}) + "\n")
    with pytest.raises(
        RecordError, match=r"queries.jsonl:line 4: query 'q1' is repeated .* also in queries.jsonl:line 1"
    ):
        build(tmp_path, files=files)
    assert [record.qid for _, record in read_records(TrecSource(SourceOptions(**files)), skip_bad=True)] == ["q2"]


@pytest.mark.parametrize(
    ("options", "message_part"),
    [
        ({"window": 27}, "window is 27 with identifiers: letters; expected at most 26"),
        ({"window": 100, "identifiers": "numbers"}, "at most 99"),
        ({"window": 1}, "window is 1; expected a whole number of at least "),
        ({"stride": 0}, "stride is 0; expected a whole number of at least "),
        ({"lists_per_query": -1}, "lists_per_query is -1; expected a whole number of at least "),
        ({"depth": 1}, "depth is 1; expected a whole number of at least "),
        ({"max_passage_words": 0}, "max_passage_words is 0; expected a whole number of at least "),
        ({"identifiers": "roman"}, "identifiers is 'roman'; expected "),
        ({"judgments": None}, "judgments is null, as is teacher_run"),
        (
            {"judgments": None, "teacher_run": "t", "require_relevant": True},
            "require_relevant is true without judgments",
        ),
    ],
)
def test_invalid_options_are_errors(tmp_path, options, message_part):
    with pytest.raises(ValueError) as caught:
        TrecSource(SourceOptions(**(write_files(tmp_path) | options)))
    assert message_part in str(caught.value)


def test_each_user_turn_is_parsed_once(tmp_path, monkeypatch):
    parsed = Counter()

    def count(text, parse=user_turn.parse_user_turn):
        parsed[text] += 1
        return parse(text)

    monkeypatch.setattr(user_turn, "parse_user_turn", count)
    records, _ = build(tmp_path, lists_per_query=3, window=3)
    assert all(record.has_standard_prompt for _, record in records)
    assert parsed == {record.user: 1 for _, record in records}


def test_files_of_different_collections_are_an_error(tmp_path):
    files = write_files(tmp_path, queries={"x1": "another"})
    with pytest.raises(SourceError, match=r"share no query id: first.trec has 'q1', queries.jsonl has 'x1'"):
        build(tmp_path, files=files)


def test_a_missing_file_is_an_error(tmp_path):
    files = write_files(tmp_path) | {"run": str(tmp_path / "absent.trec")}
    with pytest.raises(SourceError, match=r"absent.trec: the file cannot be read .No such file"):
        build(tmp_path, files=files)


def test_any_process_builds_the_same_lists_of_a_query(tmp_path):
    source = TrecSource(SourceOptions(**write_files(tmp_path), lists_per_query=5, window=3)).prepare(tmp_path)
    copy = pickle.loads(pickle.dumps(source))
    items = list(source.items())
    assert [copy.records(item) for item in reversed(items)] == [source.records(item) for item in reversed(items)]


def test_the_description_has_names_and_options_but_no_paths(tmp_path):
    text = json.dumps(TrecSource(SourceOptions(**write_files(tmp_path), seed=7)).describe())
    assert str(tmp_path) not in text
    assert '"seed": 7' in text
    assert "docs.jsonl" in text


def test_lines_have_named_fields(tmp_path):
    files = write_files(tmp_path)
    assert next(read_part(files["run"], "run")) == RunLine(line=1, qid="q1", docid="d2", rank=1, score=10.0)
    assert next(read_part(files["judgments"], "judgments")) == Judgment(line=1, qid="q1", docid="d1", grade=1)


@given(st.lists(st.none() | st.integers(-1, 3) | st.floats(-2, 2), min_size=1))
def test_the_order_is_a_permutation_consistent_with_every_pair(values):
    order = by_value(values)
    assert sorted(order) == list(range(len(values)))
    for better, worse in pairwise(order):
        a, b = (math.inf if values[i] is None else -values[i] for i in (better, worse))
        assert (a, better) < (b, worse)


def test_equal_and_infinite_scores_of_a_teacher_are_kept_as_far_as_they_have_a_distribution(tmp_path):
    files = write_files(tmp_path, teacher={"q1": ["d5", "d2", "d1", "d3"]})
    lines = [f"q1 Q0 {docid} {rank} {score} t" for rank, (docid, score) in enumerate(TIED, start=1)]
    Path(files["teacher_run"]).write_text("\n".join(lines))
    record = build(tmp_path, files=files)[0][0][1]
    assert record.scores == (0.5, 0.5, -1e37, 1e37)
    assert record.response == "[D] > [A] > [B] > [C]"  # d2 before d1, as trec_eval orders equal scores


TIED = [("d5", "inf"), ("d2", 0.5), ("d1", 0.5), ("d3", "-inf")]


def test_cranfield_lists_are_ordered_by_grade(shared):
    folder = shared / "data" / "cranfield"
    dropped: Counter[str] = Counter()
    options = SourceOptions(
        run=str(folder / "bm25_top100.trec"),
        queries=str(folder / "queries.jsonl"),
        docs=str(folder / "docs.jsonl"),
        judgments=str(folder / "qrels.trec"),
    )
    records = [record for _, record in read_records(TrecSource(options), dropped=dropped)]
    assert len(records) + dropped["lists without a relevant passage"] == 225
    assert len(records) > 180
    for record in records:
        best_first = [record.grades[i] or 0 for i in parse_permutation(record.response, 20)]
        assert best_first == sorted(best_first, reverse=True)
        assert max(best_first) > 0
