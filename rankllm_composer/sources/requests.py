"""Requests: a first-stage run with its queries and documents in the one file that the inference client reranks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from rankllm_composer.errors import SourceError, counted
from rankllm_composer.sources.entries import RunLine
from rankllm_composer.sources.retrieval_files import (
    DISAGREEMENTS,
    Duplicates,
    Ranking,
    load_documents,
    load_queries,
    rank_candidates,
    read_part,
    require_shared,
    source_of,
)
from rankllm_composer.storage.atomic import write_atomic


def write_requests(
    run: str | Path,
    output: str | Path,
    *,
    queries: str | Path | None = None,
    docs: str | Path | None = None,
    top_k: int = 100,
    duplicates: Duplicates = "stop",
) -> list[str]:
    """Write what `rank-llm rerank --requests-file` takes: one line per query, its candidates best first.

    Args:
        run, queries, docs, duplicates: as in `rerank_files`.
        output: file to write, replaced if it exists; the client tells from `.jsonl` how to read it.
        top_k: candidates of a query that are written.
    Returns:
        Lines for the user: what was written, and which queries were not.
    Raises:
        SourceError: a file cannot be read, or they do not belong together.
    """
    path = Path(output)
    if path.suffix != ".jsonl":
        raise SourceError(f"output is {path.name}; expected a name in .jsonl, by which rank_llm reads it. Rename it.")
    name = Path(run).name
    texts = load_queries(query_source := source_of("queries", queries, run))
    collection = source_of("docs", docs, run)
    rankings = _rankings(run, duplicates)
    require_shared("query", (name, rankings), (Path(query_source).name, texts))
    chosen = {qid: list(rankings[qid].scores.items())[:top_k] for qid in texts if qid in rankings}
    documents = load_documents(collection, {docid for found in chosen.values() for docid, _ in found})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(_lines(name, texts, chosen, documents)))
    num_candidates = sum(map(len, chosen.values()))
    lines = [f"{output}: {counted(len(chosen), 'request')} with {counted(num_candidates, 'candidate')}"]
    for kind, what in DISAGREEMENTS.items():
        if found := sum(ranking.disagreement == kind for ranking in rankings.values()):
            lines.append(f"{name}: {found} of {len(rankings)} queries {what}")
    for what, qids in (
        ("without candidates in the run", texts.keys() - rankings.keys()),
        ("of the run without text", rankings.keys() - texts.keys()),
    ):
        if qids:
            lines.append(f"{counted(len(qids), 'query')} {what}, such as {', '.join(sorted(qids)[:3])}")
    return lines


def _rankings(run: str | Path, duplicates: Duplicates) -> dict[str, Ranking]:
    """The candidates of each query, in the order of the file."""
    lines: dict[str, list[RunLine]] = {}
    for line in read_part(run, "run"):
        lines.setdefault(line.qid, []).append(line)
    return {qid: rank_candidates(found, Path(run).name, duplicates) for qid, found in lines.items()}


def _lines(
    name: str, texts: dict[str, str], chosen: dict[str, list[tuple[str, float]]], documents: dict[str, str]
) -> Iterator[str]:
    for qid, found in chosen.items():
        candidates = []
        for docid, score in found:
            if not math.isfinite(score):
                raise SourceError(
                    f"{name}: document {docid!r} of query {qid!r} has the score {score}; expected a finite number, "
                    "as JSON has no other. Correct the run."
                )
            candidates.append({"docid": docid, "score": score, "doc": {"text": documents[docid]}})
        yield json.dumps({"query": {"text": texts[qid], "qid": qid}, "candidates": candidates}) + "\n"
