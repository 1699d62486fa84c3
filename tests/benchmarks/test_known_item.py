"""Known-item lists: exactly one passage per list is relevant, and the query is words of it in their order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.known_item import build_known_items
from rankllm_composer.sources.retrieval_files import load_documents, load_judgments, load_queries, load_run


@pytest.fixture()
def documents(tmp_path: Path) -> Path:
    """Six documents that share no word: five of 30 words, and one of two; and one without a text."""
    path = tmp_path / "docs.jsonl"
    rows = [{"docid": f"d{i}", "text": " ".join(f"w{number}of{i}" for number in range(30))} for i in range(5)]
    rows += [{"docid": "short", "text": "a b"}, {"docid": "empty", "text": " "}]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_query_is_words_of_the_one_relevant_passage(documents: Path, tmp_path: Path) -> None:
    folder = tmp_path / "known"
    files = build_known_items(documents, folder, num_lists=60, num_candidates=3, query_words=(2, 4), seed=42)
    queries, run, judgments = load_queries(files.queries), load_run(files.run), load_judgments(files.judgments)
    texts = load_documents(documents, {docid for shown in run.values() for docid in shown})
    assert len(queries) == len(run) == len(judgments) == 60
    asked, places, lengths = set(), set(), set()
    for qid, query in queries.items():
        (relevant,) = (docid for docid in run[qid] if judgments[qid][docid] == 1)
        assert len(run[qid]) == len(set(run[qid])) == 3
        words = query.split()
        assert [word for word in texts[relevant].split() if word in words] == words
        asked.add(relevant)
        places.add(run[qid].index(relevant))
        lengths.add(len(words))
    assert asked == {"d0", "d1", "d2", "d3", "d4", "short"} and places == {0, 1, 2} and lengths == {2, 3, 4}


def test_the_same_arguments_write_the_same_files(documents: Path, tmp_path: Path) -> None:
    def written(name: str, seed: int) -> list[str]:
        sizes = {"num_lists": 9, "num_candidates": 4}
        files = build_known_items(documents, tmp_path / name, **sizes, query_words=(1, 3), seed=seed)
        return [path.read_text() for path in (files.queries, files.run, files.judgments)]

    assert written("a", 1) == written("b", 1) != written("c", 2)


@pytest.mark.parametrize(
    ("num_lists", "num_candidates", "query_words", "message"),
    [
        (5, 7, (1, 2), "6 documents have a text; expected at least 7"),
        (5, 1, (1, 2), "num_candidates 1"),
        (0, 2, (1, 2), "num_lists is 0"),
        (5, 2, (0, 2), r"query_words \(0, 2\)"),
        (5, 2, (3, 2), "with the minimum first"),
    ],
)
def test_impossible_requests_are_errors(
    documents: Path, tmp_path: Path, num_lists: int, num_candidates: int, query_words: tuple[int, int], message: str
) -> None:
    sizes = {"num_lists": num_lists, "num_candidates": num_candidates}
    with pytest.raises(ValueError, match=message):
        build_known_items(documents, tmp_path / "known", **sizes, query_words=query_words, seed=1)
    assert not (tmp_path / "known").exists()
