"""The reranking job: reranks a first-stage run, writes a TREC run, and compares it with the first stage.

Finished queries are kept on disk, so that a stopped job resumes.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from rankllm_composer.errors import RunError, counted, shell_line, shown_path
from rankllm_composer.escaping import in_one_line
from rankllm_composer.options import RerankOptions
from rankllm_composer.prompts.user_turn import clean_query
from rankllm_composer.ranking.comparison import (
    DEFAULT_MEASURES,
    FIGURES_SUFFIX,
    MeasureComparison,
    RerankResult,
    compare_runs,
    comparison_table,
    query_lines,
    write_rerank_result,
)
from rankllm_composer.ranking.reranker import RerankedQuery, Reranker
from rankllm_composer.screen import counting, doing, report
from rankllm_composer.sources.hold_out import is_held_out
from rankllm_composer.sources.retrieval_files import (
    Duplicates,
    load_documents,
    load_judgments,
    load_queries,
    load_run,
    require_shared,
    source_of,
)
from rankllm_composer.storage.atomic import write_atomic
from rankllm_composer.storage.locks import try_lock

Value = TypeVar("Value")

TAG = "rankllm-composer"
"""Last column of the runs written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RerankFiles:
    """Files of a reranking job.

    Attributes:
        first_stage: run to rerank, like the other inputs in any layout of docs/what-it-reads.md, or irds:ID.
        output: TREC run to write; replaced if it exists.
        queries, documents: files, BEIR folders or irds:ID; None for those that the first stage's layout holds.
        judgments: the same; with them the reranked run is compared with the first stage.
        duplicates: at a document that a query has twice in the run: stop, or keep the one with the highest score.
        hold_out: rerank only the queries that `shards build` keeps apart for this share; None = all.
    """

    first_stage: str | Path
    output: str | Path
    queries: str | Path | None = None
    documents: str | Path | None = None
    judgments: str | Path | None = None
    duplicates: Duplicates = "stop"
    hold_out: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class RerankReport:
    """Outcome of a job.

    Attributes:
        queries: as written.
        result: their measures; None without judgments.
        text: a report.
        output: path of the run.
        decoding: first_token or generation.
        seconds: of reranking, without loading.
        notes: what of the inputs is left out and how the answers were, one sentence each.
    """

    queries: tuple[RerankedQuery, ...]
    result: RerankResult | None
    text: str
    output: str
    decoding: str
    seconds: float
    notes: tuple[str, ...]

    @property
    def comparisons(self) -> tuple[MeasureComparison, ...]:
        """One per measure; empty without judgments."""
        return () if self.result is None else self.result.comparisons

    def fields(self) -> dict[str, Any]:
        """The report for JSON, see docs/commands.md."""
        return {
            "output": self.output,
            "name": None if self.result is None else self.result.name,
            "decoding": self.decoding,
            "num_queries": len(self.queries),
            "num_windows": sum(query.num_windows for query in self.queries),
            "seconds": round(self.seconds, 1),
            "measures": [row.fields() for row in self.comparisons],
            "notes": list(self.notes),
        }


def rerank_files(
    folder: str | Path,
    files: RerankFiles,
    options: RerankOptions | None = None,
    *,
    measures: Sequence[str] = DEFAULT_MEASURES,
    name: str | None = None,
    progress_bar: bool = True,
    reranker: Reranker | None = None,
    keep_progress: bool = False,
) -> RerankReport:
    """Rerank a run with an exported model, and compare it with the first stage if there are judgments.

    The measures are stored in `OUTPUT.figures.json`, see `comparison.write_rerank_result`.

    Args:
        folder: a model as in `Reranker.from_pretrained`.
        files: inputs and output.
        options: how to rerank; None for the defaults.
        measures: names of measures as in ir-measures or trec_eval.
        name: name of the set of queries and its first stage, in figures; None: the run's file name without its suffix.
        progress_bar: whether to show progress.
        reranker: the model with these options, if it is loaded already.
        keep_progress: see `rerank_run`.
    Raises:
        ValueError: a file, the model or an option cannot be used.
    """
    options = options or RerankOptions()
    _check_output(Path(files.output))
    notes: list[str] = []
    queries = source_of("queries", files.queries, files.first_stage)
    collection = source_of("docs", files.documents, files.first_stage)
    texts, first_stage = load_queries(queries), load_run(files.first_stage, files.duplicates, notes.append)
    run = Path(files.first_stage).name
    require_shared("query", (run, first_stage), (Path(queries).name, texts))
    grades = None
    if files.judgments is not None:
        grades, judgments = load_judgments(files.judgments), Path(files.judgments).name
        require_shared("query", (judgments, grades), (run, first_stage))
        candidates = {docid for docids in first_stage.values() for docid in docids}
        require_shared(
            "document", (judgments, (docid for known in grades.values() for docid in known)), (run, candidates)
        )
    if files.hold_out is not None:
        trained = {qid for qid, text in texts.items() if not is_held_out(clean_query(text), files.hold_out)}
        if len(trained) == len(texts):
            raise RunError(f"{run}: none of its queries {_sample(texts)} was held out. Build with a larger --hold-out.")
        notes.append(f"{len(texts) - len(trained)} of {counted(len(texts), 'query')} held out")
        texts, first_stage = _without(texts, trained), _without(first_stage, trained)
        grades = None if grades is None else _without(grades, trained)
    chosen = {qid: first_stage[qid] for qid in texts if qid in first_stage}
    if grades is not None:
        compare_runs(chosen, chosen, grades, measures)  # fails now, not after hours, if it cannot be measured
    documents = load_documents(collection, {id for docids in chosen.values() for id in docids[: options.top_k]})
    if reranker is None:
        with doing(f"loading the model {shown_path(Path(folder))}") if progress_bar else nullcontext():
            reranker = Reranker.from_pretrained(folder, options)
    start = time.monotonic()
    how = {"progress_bar": progress_bar, "keep_progress": keep_progress}
    ranked = rerank_run(reranker, texts, documents, first_stage, files.output, **how)
    seconds = time.monotonic() - start
    lines = [
        f"{files.output}: {counted(len(ranked), 'query')} reranked by {reranker.decoding} in {seconds:.1f} s",
        *notes,
    ]
    lines += answer_statistics(ranked, reranker)
    if files.judgments is None:
        lines.append("nothing is measured without judgments (--qrels)")
    for noun, what, qids in (
        ("query", "without candidates in the run", texts.keys() - first_stage.keys()),
        ("query", "of the run without text", first_stage.keys() - texts.keys()),
        ("reranked query", "without judgments", () if grades is None else chosen.keys() - grades.keys()),
        ("judged query", "not reranked", () if grades is None else grades.keys() - chosen.keys()),
    ):
        if qids:
            lines.append(f"{counted(len(qids), noun)} {what}, such as {', '.join(sorted(qids)[:3])}")
    done: dict[str, Any] = {
        "output": str(files.output),
        "decoding": reranker.decoding,
        "seconds": seconds,
        "notes": tuple(lines[1:]),
    }
    if grades is None:
        return RerankReport(tuple(ranked), None, "\n".join(lines), **done)
    rows = compare_runs(first_stage, {query.qid: query.docids for query in ranked}, grades, measures)
    model = str(Path(folder).resolve() if Path(folder).is_dir() else folder)
    result = RerankResult(name or Path(files.first_stage).stem, model, reranker.decoding, tuple(rows))
    write_rerank_result(f"{files.output}{FIGURES_SUFFIX}", result)
    measured = counted(len(rows[0].reranked), "query")
    lines += ["", f"{result.name}: {measured}", comparison_table(rows), "", *query_lines(rows[0])]
    trained_in = Path(folder).parents[1] if len(Path(folder).parents) > 1 else Path()
    if (trained_in / "metrics.jsonl").is_file():
        command = ("rankllm-composer", "report", trained_in, "--reranked", f"{files.output}{FIGURES_SUFFIX}")
        lines += ["", f"draw them with the run: {shell_line(*command)}"]
    return RerankReport(tuple(ranked), result, "\n".join(lines), **done)


def rerank_run(
    reranker: Reranker,
    queries: Mapping[str, str],
    documents: Mapping[str, str],
    first_stage: Mapping[str, Sequence[str]],
    output: str | Path,
    *,
    progress_bar: bool = True,
    keep_progress: bool = False,
) -> list[RerankedQuery]:
    """Rerank a run and write it as a TREC run; resumes a stopped job with the same settings.

    Finished queries are kept in `OUTPUT.progress.jsonl`, which is deleted when the run is written. Queries are written
    and returned in the order of `queries`; scores fall by one per rank.

    Args:
        queries, documents, first_stage: see `Reranker.rerank_queries`.
        output: path of the run to write; replaced if it exists.
        keep_progress: keep the progress file too, with which the same job again only writes the run.
    Raises:
        RunError: no query has both a text and candidates; the progress file has other settings or is damaged; another
            process is writing the same output.
        RunError, PromptError: a window cannot be presented or read.
    """
    output, options = Path(output), reranker.options
    qids = [qid for qid in queries if qid in first_stage]
    if not qids:
        raise RunError(
            f"run: none of its queries {_sample(first_stage)} is among those given {_sample(queries)}. Check that both "
            "are of the same collection."
        )
    _check_ids(reranker.options.top_k, {qid: first_stage[qid] for qid in qids}, documents)
    reranker.check_queries({qid: queries[qid] for qid in qids}, first_stage)
    presented = hashlib.blake2b(digest_size=16)
    for qid in qids:
        texts = [qid, queries[qid], *(text for docid in first_stage[qid] for text in (docid, documents.get(docid)))]
        presented.update(json.dumps(texts).encode())
    settings = {
        "model": reranker.name,
        "decoding": reranker.decoding,
        "constrained": options.constrained,
        "passes": options.passes,
        "top_k": options.top_k,
        "contract": json.loads(reranker.contract.to_json()),
        "input": presented.hexdigest(),
    }
    progress = progress_file(output)
    total = sum(len(reranker.spans(len(first_stage[qid]))) for qid in qids)
    with _kept_queries(progress, settings, keep_progress) as (finished, keep):
        if finished and progress_bar:
            report(f"{output}: {counted(len(finished), 'query')} of {len(qids)} taken from the stopped job")
        done = sum(query.num_windows for query in finished.values())
        shown = counting("reranking", "windows", total, done) if progress_bar else nullcontext(int)
        remaining = {qid: queries[qid] for qid in qids if qid not in finished}
        with shown as advance:
            for query in reranker.rerank_queries(remaining, documents, first_stage, advance):
                keep(query)
                finished[query.qid] = query
        ranked = [finished[qid] for qid in qids]
        write_run(output, {query.qid: query.docids for query in ranked})
    return ranked


def progress_file(output: Path) -> Path:
    """Where the finished queries of a job are kept."""
    return output.with_name(f"{output.name}.progress.jsonl")


def _check_ids(top_k: int, run: Mapping[str, Sequence[str]], documents: Mapping[str, str]) -> None:
    """Raise RunError if a candidate has no text, or an id cannot be written into a TREC run."""
    missing = sorted({docid for docids in run.values() for docid in docids[:top_k] if docid not in documents})
    if missing:
        raise RunError(
            f"documents: {len(missing)} of the run have no text, such as {in_one_line(missing[:3])}. Give the "
            "collection that the run was made from."
        )
    for what, ids in (("query", run.keys()), ("document", {id for docids in run.values() for id in docids})):
        apart = next((id for id in ids if id.split() != [id]), None)
        if apart is not None:
            raise RunError(
                f"run: the {what} id {apart!r} is empty or holds white space; expected one word, because white space "
                "separates the columns of a TREC run. Rename it in all files."
            )


def write_run(path: Path, rankings: Mapping[str, Sequence[str]]) -> None:
    """Write a TREC run atomically; the last rank of a query has score 1."""
    lines = (
        f"{qid} Q0 {docid} {rank} {len(docids) - rank + 1} {TAG}\n"
        for qid, docids in rankings.items()
        for rank, docid in enumerate(docids, start=1)
    )
    write_atomic(path, "".join(lines))


def _sample(known: Collection[str]) -> str:
    return f"({len(known):,}, such as {next(iter(known))!r})" if known else "(0)"


def _without(known: Mapping[str, Value], qids: Collection[str]) -> dict[str, Value]:
    return {qid: value for qid, value in known.items() if qid not in qids}


WHY_UNREAD = {
    "generation": "The model writes no permutation such as [B] > [A]: train it longer, or check that --decoding, "
    "--identifiers and --client-version are those that it was trained with. --constrained makes it write one.",
    "first_token": "No identifier is among its likeliest first tokens: train it longer, or check that it was trained "
    "with a ranking loss, and with these --identifiers.",
}
"""Likely reasons why no answer of a decoding can be read."""


def answer_statistics(queries: Sequence[RerankedQuery], reranker: Reranker) -> Iterator[str]:
    """Sentences on the answers of the model that could not be read as requested, and on passages shown empty."""
    num_windows = sum(query.num_windows for query in queries)
    append_bracket = reranker.contract.append_bracket
    opened = [None if append_bracket else query.num_opened for query in queries]  # an appended bracket is always there
    for counts, what in (
        (opened, "windows have '[' as the model's first token"),
        ([query.num_malformed for query in queries], "answers deviate from the requested format and were repaired"),
    ):
        if num_windows and None not in counts:
            num = sum(count or 0 for count in counts)
            yield f"{num} of {num_windows} {what} ({num / num_windows:.1%})"
    if num := sum(query.num_unread for query in queries):
        reason = f"\n{WHY_UNREAD[reranker.decoding]}" if num == num_windows else ""
        yield f"{num} of {num_windows} windows kept the first stage's order, as their answer names no candidate{reason}"
    if num := sum(query.num_client_empties for query in queries):
        yield (
            f"{num} of {num_windows} windows hold passages without spaces that are too long, cut here between "
            "characters; rank_llm would show every passage of these windows empty"
        )
    if num := sum(query.num_emptied for query in queries):
        yield f"{counted(num, 'passage')} shown empty, as nothing of them fits the context"


def _check_output(output: Path) -> None:
    """Raise RunError if the run could not be written at the end."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise RunError(f"{output}: the run cannot be written ({error.strerror}). Name another output.") from error


@contextmanager
def _kept_queries(
    path: Path, settings: dict[str, Any], keep_file: bool
) -> Iterator[tuple[dict[str, RerankedQuery], Callable[[RerankedQuery], None]]]:
    """Yield the queries that an earlier job finished, and a function to keep one more; delete the file on success
    unless `keep_file`."""
    lock = try_lock(path)
    if lock is None:
        raise RunError(f"{path}: another process is writing this run. Wait for it, or name another output.")
    with lock, path.open("ab", buffering=0) as file:
        complete = path.read_bytes().rpartition(b"\n")[0]  # without the line that a kill cut off
        file.truncate(len(complete) + 1 if complete else 0)
        finished = _read_kept(path, complete.splitlines(), settings)

        def append(values: Any) -> None:
            file.write(json.dumps(values).encode() + b"\n")
            os.fsync(file.fileno())

        if not complete:
            append(settings)
        yield finished, lambda query: append(dataclasses.asdict(query))
        if not keep_file:
            lock.remove()


def _read_kept(path: Path, lines: Sequence[bytes], settings: dict[str, Any]) -> dict[str, RerankedQuery]:
    try:
        before, *queries = [json.loads(line) for line in lines] or [settings]
        finished = {query["qid"]: RerankedQuery(**{**query, "docids": tuple(query["docids"])}) for query in queries}
        changed = [name for name in settings if before[name] != settings[name]]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error!r}). Delete it to start over.") from error
    if changed:
        raise RunError(
            f"{path} is from a stopped job with other settings ({', '.join(changed)}). Repeat that command, name "
            "another output, or delete the file to start over."
        )
    return finished
