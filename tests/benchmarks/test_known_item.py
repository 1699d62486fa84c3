"""Known-item lists: exactly one passage per list is relevant, and excluded documents are left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.known_item import build_known_items
from rankllm_composer.sources.retrieval_files import load_documents, load_judgments, load_queries, load_run

DOCUMENTS = [{"docid": f"d{i}", "title": f"title {i} of many words .", "text": f"text number {i}"} for i in range(8)]


@pytest.fixture()
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "docs.jsonl"
    rows = [*DOCUMENTS, {"docid": "untitled", "title": "", "text": "x"}, {"docid": "empty", "title": "t", "text": " "}]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_only_the_document_of_the_query_is_relevant(documents: Path, tmp_path: Path) -> None:
    files = build_known_items(documents, tmp_path / "known", num_lists=60, num_candidates=3, exclude={"d0", "d1"})
    queries, run, judgments = load_queries(files.queries), load_run(files.run), load_judgments(files.judgments)
    texts = load_documents(files.docs, {docid for shown in run.values() for docid in shown})
    assert len(queries) == len(run) == len(judgments) == 60
    asked, places = set(), set()
    for qid, query in queries.items():
        relevant = [docid for docid in run[qid] if judgments[qid][docid] == 1]
        assert len(run[qid]) == len(set(run[qid])) == 3 and len(relevant) == 1
        number = relevant[0][1:]
        assert query == f"title {number} of many words" and texts[relevant[0]] == f"text number {number}"
        asked.add(relevant[0])
        places.add(run[qid].index(relevant[0]))
    assert asked == {f"d{i}" for i in range(2, 8)} and places == {0, 1, 2}
    assert set(texts) == {f"d{i}" for i in range(2, 8)}


def test_words_are_sampled_from_the_title_in_their_order(documents: Path, tmp_path: Path) -> None:
    files = build_known_items(documents, tmp_path / "known", num_lists=40, num_candidates=2, query_words=(2, 9))
    lengths = set()
    for query in load_queries(files.queries).values():
        words = query.split()
        lengths.add(len(words))
        places = ["title", "number", "of", "many", "words"]
        places = [places.index("number" if word.isdigit() else word) for word in words]
        assert places == sorted(places)
    assert lengths == {2, 3, 4, 5}


def test_words_are_sampled_from_the_passage(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(30)]
    rows = [{"docid": f"d{i}", "text": " ".join(f"{word}of{i}" for word in words)} for i in range(5)]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"docid": "short", "text": "a b"}])))
    files = build_known_items(
        tmp_path / "docs.jsonl",
        tmp_path / "known",
        num_lists=50,
        num_candidates=3,
        ask_with="text",
        query_words=(2, 4),
        passage_words=6,
    )
    run, judgments = load_run(files.run), load_judgments(files.judgments)
    texts = load_documents(files.docs, {docid for shown in run.values() for docid in shown})
    starts, lengths = set(), set()
    for qid, query in load_queries(files.queries).items():
        (relevant,) = (docid for docid in run[qid] if judgments[qid][docid])
        shown, asked = texts[relevant].split(), query.split()
        assert [word for word in shown if word in asked] == asked
        assert len(run[qid]) == 3 and not any(
            set(asked) & set(texts[docid].split()) for docid in run[qid] if docid != relevant
        )
        lengths.add(len(asked))
        starts.add(shown[0].split("of")[0])
        assert len(shown) == (2 if relevant.startswith("short") else 6)
    assert lengths == {2, 3, 4} and len(starts) > 5
    assert len(texts) == 150


def test_the_same_arguments_write_the_same_files(documents: Path, tmp_path: Path) -> None:
    def written(name: str, seed: int) -> list[str]:
        files = build_known_items(documents, tmp_path / name, num_lists=9, num_candidates=4, seed=seed)
        return [path.read_text() for path in (files.queries, files.docs, files.run, files.judgments)]

    assert written("a", 1) == written("b", 1) != written("c", 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_candidates": 9}, "8 documents have a title and a text; expected at least 9"),
        ({"num_candidates": 11, "ask_with": "text"}, "9 documents have a text and a text"),
        ({"num_candidates": 1}, "num_candidates 1"),
        ({"num_lists": 0}, "num_lists is 0"),
        ({"query_words": (0, 2)}, r"query_words \(0, 2\)"),
        ({"query_words": (3, 2)}, "with the minimum first"),
        ({"passage_words": -1}, "passage_words -1"),
    ],
)
def test_impossible_requests_are_errors(documents: Path, tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_known_items(documents, tmp_path / "known", **{"num_lists": 5, "num_candidates": 2, **options})
    assert not (tmp_path / "known").exists()
