"""The reranking job: a first-stage run and a model in, a reranked TREC run and its comparison with the first stage out.

A finished query is kept on disk, so that a job that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankllm_composer.errors import ModelError, RunError
from rankllm_composer.prompts.contract import DecodingContract, chat_template_sha256, read_contract
from rankllm_composer.ranking.comparison import (
    DEFAULT_MEASURES,
    MeasureComparison,
    MeasuredSet,
    compare_runs,
    comparison_table,
    query_lines,
    write_measured,
)
from rankllm_composer.ranking.evaluation import Decoding
from rankllm_composer.ranking.sliding import (
    RerankedQuery,
    check_settings,
    default_decoding,
    query_spans,
    rerank_queries,
)
from rankllm_composer.sources.retrieval_files import load_documents, load_judgments, load_queries, load_run
from rankllm_composer.storage.atomic import write_atomic
from rankllm_composer.storage.locks import try_lock

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TAG = "rankllm-composer"


FIGURES_SUFFIX = ".figures.json"


@dataclasses.dataclass(frozen=True, slots=True)
class RerankReport:
    """What a job did: the queries as written; their measures, where there are judgments; all of it as text."""

    queries: tuple[RerankedQuery, ...]
    measured: MeasuredSet | None
    text: str

    @property
    def comparisons(self) -> tuple[MeasureComparison, ...]:
        """One a measure; empty without judgments."""
        return () if self.measured is None else self.measured.comparisons


def rerank_files(
    folder: str | Path,
    *,
    queries: str | Path,
    documents: str | Path,
    run: str | Path,
    output: str | Path,
    judgments: str | Path | None = None,
    measures: Sequence[str] = DEFAULT_MEASURES,
    name: str | None = None,
    window_size: int | None = None,
    stride: int | None = None,
    passes: int = 1,
    top_k: int = 100,
    decoding: Decoding | None = None,
    constrained: bool = False,
    batch_tokens: int = 16384,
    queries_at_once: int = 32,
    device: str | None = None,
    dtype: str | None = None,
    attention: str = "auto",
    tag: str = TAG,
    progress_bar: bool = True,
) -> RerankReport:
    """Rerank a run with an exported model, and compare it with the first stage where judgments are given.

    What was measured is kept in `OUTPUT.figures.json`, see `comparison.write_measured`.

    Args:
        folder: an exported model, with its decoding contract.
        queries, documents, judgments: see `retrieval`.
        run: TREC run of the first stage.
        output: path of the reranked run.
        measures: see `compare_runs`.
        name: of the set of queries and its first stage, in figures; None = the run's file name without its ending.
        window_size, stride: None = the contract's.
        passes, …, tag: see `rerank_run`; device, dtype: see `load_reranker`.
    Returns:
        The report.
    Raises:
        ValueError: a file, the model or a setting cannot be used; the message says which and what to do.
    """
    texts, first_stage = load_queries(queries), load_run(run)
    grades = None if judgments is None else load_judgments(judgments)
    chosen = {qid: first_stage[qid] for qid in texts if qid in first_stage}
    if grades is not None and chosen:
        compare_runs(chosen, chosen, grades, measures)  # what cannot be measured stops here, not after hours
    wanted = {docid for docids in chosen.values() for docid in docids[:top_k]}
    collection = load_documents(documents, wanted)
    model, tokenizer, contract = load_reranker(folder, device=device, dtype=dtype)
    contract = dataclasses.replace(
        contract,
        window_size=contract.window_size if window_size is None else window_size,
        stride=contract.stride if stride is None else stride,
    )
    decoding = decoding or default_decoding(contract)
    began = time.monotonic()
    ranked = rerank_run(
        model,
        tokenizer,
        texts,
        collection,
        first_stage,
        contract,
        output,
        decoding=decoding,
        constrained=constrained,
        passes=passes,
        top_k=top_k,
        batch_tokens=batch_tokens,
        queries_at_once=queries_at_once,
        attention=attention,
        model_name=model_identity(folder),
        tag=tag,
        progress_bar=progress_bar,
    )
    seconds = time.monotonic() - began
    measured: MeasuredSet | None = None
    if grades is not None:
        rows = compare_runs(first_stage, {query.qid: query.docids for query in ranked}, grades, measures)
        measured = MeasuredSet(name or Path(run).stem, str(Path(folder).resolve()), decoding, tuple(rows))
        write_measured(f"{output}{FIGURES_SUFFIX}", measured)
    lines = [f"{output}: {len(ranked)} queries reranked by {decoding} in {seconds:.1f} s", *_counts(ranked)]
    for what, qids in (
        ("queries given that have no candidates in the run", texts.keys() - first_stage.keys()),
        ("queries of the run that have no text", first_stage.keys() - texts.keys()),
        ("queries reranked that are not judged", () if grades is None else chosen.keys() - grades.keys()),
        ("queries judged that were not reranked", () if grades is None else grades.keys() - chosen.keys()),
    ):
        if qids:
            lines.append(f"{len(qids)} {what}, such as {', '.join(sorted(qids)[:3])}")
    if measured is not None:
        rows = list(measured.comparisons)
        lines += ["", f"{measured.name}: {len(rows[0].reranked)} queries", comparison_table(rows)]
        lines += ["", *query_lines(rows[0])]
    return RerankReport(tuple(ranked), measured, "\n".join(lines))


def load_reranker(
    folder: str | Path, *, device: str | None = None, dtype: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, DecodingContract]:
    """Model, tokenizer and decoding contract of an exported folder.

    Args:
        folder: with `reranker.json`.
        device: torch's name; None = cuda where there is one, else cpu.
        dtype: torch's name; None = as stored on cuda, float32 on cpu.
    Raises:
        ModelError: no contract, or a tokenizer whose chat template is not the one it names.
        RunError: the dtype is unknown, or the folder holds no model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    contract = read_contract(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = "auto" if dtype is None and device != "cpu" else getattr(torch, dtype or "float32", None)
    if chosen != "auto" and not isinstance(chosen, torch.dtype):
        raise RunError(f"dtype: found {dtype!r}, allowed are float32, bfloat16, float16")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=chosen, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise RunError(f"{folder}: holds no model that loads: {reason}; export it again") from error
    if chat_template_sha256(tokenizer) != contract.chat_template_sha256:
        raise ModelError(
            f"{folder}: the tokenizer's chat template is not the one the model was trained with (by its hash in "
            "reranker.json); export the model again, or restore the tokenizer's files"
        )
    return model.to(device).eval(), tokenizer, contract


def rerank_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: Mapping[str, str],
    documents: Mapping[str, str],
    run: Mapping[str, Sequence[str]],
    contract: DecodingContract,
    output: str | Path,
    *,
    decoding: Decoding | None = None,
    constrained: bool = False,
    passes: int = 1,
    top_k: int = 100,
    batch_tokens: int = 16384,
    queries_at_once: int = 32,
    attention: str = "auto",
    model_name: str = "",
    tag: str = TAG,
    progress_bar: bool = True,
) -> list[RerankedQuery]:
    """Rerank a run and write it as a TREC run, going on where an earlier job with the same settings was stopped.

    Finished queries are kept in `OUTPUT.progress.jsonl`, which goes when the run is written. Queries are written in the
    order of `queries`, scores fall by one a place.

    Args:
        output: path of the run to write; replaced if it is there.
        model_name: tells models apart when a job is resumed.
        tag: last column of the run.
        progress_bar: show one, on a terminal.
        model, …, attention: see `rerank_queries`.
    Returns:
        The queries in the order written.
    Raises:
        RunError: no query has both a text and candidates; what was kept is of other settings or damaged; another
            process is writing the same output.
        PromptError, RunError, PromptError: a window cannot be shown or read.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    output = Path(output)
    decoding = decoding or default_decoding(contract)
    check_settings(contract, decoding, constrained, passes, top_k, queries_at_once)
    qids = [qid for qid in queries if qid in run]
    if not qids:
        raise RunError(
            f"run: none of its {len(run)} queries is among the {len(queries)} queries given; check that they match"
        )
    settings = {
        "model": model_name,
        "decoding": decoding,
        "constrained": constrained,
        "passes": passes,
        "top_k": top_k,
        "contract": json.loads(contract.to_json()),
        "input": _digest(qids, queries, documents, run),
    }
    num_windows = passes * sum(len(query_spans(len(run[qid]), contract, top_k)) for qid in qids)
    with _kept_queries(output.with_name(f"{output.name}.progress.jsonl"), settings) as (finished, keep):
        with tqdm(
            total=num_windows,
            initial=sum(query.num_windows for query in finished.values()),
            unit=" windows",
            disable=None if progress_bar else True,
        ) as bar:
            for query in rerank_queries(
                model,
                tokenizer,
                {qid: queries[qid] for qid in qids if qid not in finished},
                documents,
                run,
                contract,
                decoding=decoding,
                constrained=constrained,
                passes=passes,
                top_k=top_k,
                batch_tokens=batch_tokens,
                queries_at_once=queries_at_once,
                attention=attention,
                on_windows=bar.update,
            ):
                keep(query)
                finished[query.qid] = query
        ranked = [finished[qid] for qid in qids]
        write_run(output, {query.qid: query.docids for query in ranked}, tag)
    return ranked


def write_run(path: Path, rankings: Mapping[str, Sequence[str]], tag: str = TAG) -> None:
    """Write a TREC run, there as a whole or not at all; the last place of a query has score 1."""
    lines = (
        f"{qid} Q0 {docid} {rank} {len(docids) - rank + 1} {tag}\n"
        for qid, docids in rankings.items()
        for rank, docid in enumerate(docids, start=1)
    )
    write_atomic(path, "".join(lines))


def model_identity(folder: str | Path) -> str:
    """Tells model folders, and what was in them, apart: names, sizes and times of their files."""
    folder = Path(folder).resolve()
    files = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    told = [(name, status.st_size, status.st_mtime_ns) for name, status in files]
    return f"{folder} {hashlib.blake2b(repr(told).encode(), digest_size=8).hexdigest()}"


def _counts(queries: Sequence[RerankedQuery]) -> Iterator[str]:
    num_windows = sum(query.num_windows for query in queries)
    for counts, what in (
        ([query.num_opened for query in queries], "windows in which the model's own first token is '['"),
        ([query.num_malformed for query in queries], "answers not exactly as asked"),
    ):
        if num_windows and None not in counts:
            num = sum(count or 0 for count in counts)
            yield f"{num} of {num_windows} {what} ({num / num_windows:.1%})"


def _digest(
    qids: Iterable[str], queries: Mapping[str, str], documents: Mapping[str, str], run: Mapping[str, Sequence[str]]
) -> str:
    """Hash of everything that is shown to the model."""
    digest = hashlib.blake2b(digest_size=16)
    for qid in qids:
        shown = [qid, queries[qid], *(text for docid in run[qid] for text in (docid, documents.get(docid)))]
        digest.update(json.dumps(shown).encode())
    return digest.hexdigest()


@contextmanager
def _kept_queries(
    path: Path, settings: dict[str, Any]
) -> Iterator[tuple[dict[str, RerankedQuery], Callable[[RerankedQuery], None]]]:
    """Queries that an earlier job finished, and how to keep one more. The file goes when the block ends well."""
    lock = try_lock(path)
    if lock is None:
        raise RunError(f"{path}: another process is writing this run; wait for it, or name another output")
    with lock, path.open("ab", buffering=0) as file:
        whole = path.read_bytes().rpartition(b"\n")[0]  # a line that a kill tore goes
        file.truncate(len(whole) + 1 if whole else 0)
        finished = _read_kept(path, whole.splitlines(), settings)

        def append(values: Any) -> None:
            file.write(json.dumps(values).encode() + b"\n")
            os.fsync(file.fileno())

        if not whole:
            append(settings)
        yield finished, lambda query: append(dataclasses.asdict(query))
        lock.remove()


def _read_kept(path: Path, lines: Sequence[bytes], settings: dict[str, Any]) -> dict[str, RerankedQuery]:
    try:
        before, *queries = [json.loads(line) for line in lines] or [settings]
        finished = {query["qid"]: RerankedQuery(**{**query, "docids": tuple(query["docids"])}) for query in queries}
        changed = [name for name in settings if before[name] != settings[name]]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: is damaged ({error!r}); delete it to begin anew") from error
    if changed:
        raise RunError(
            f"{path}: is of a stopped job with other settings ({', '.join(changed)}); repeat that command, name "
            "another output, or delete the file to begin anew"
        )
    return finished
