"""The reranking job: sliding windows over many queries, resuming, inputs, the comparison with the first stage."""

from __future__ import annotations

import fcntl
import json
import math
import re
import shutil
import socket
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import ir_measures
import numpy as np
import pytest
import torch
from support.tiny_rerankers import KnownReranker, new_contract, new_model, new_tokenizer

from rankllm_composer.cli import main
from rankllm_composer.errors import ModelError, RunError, ShardError, SourceError
from rankllm_composer.export.model_card import CardFacts, render_card
from rankllm_composer.options import BuildOptions, RerankOptions, SourceOptions
from rankllm_composer.prompts.contract import read_contract
from rankllm_composer.prompts.windows import fit_window
from rankllm_composer.ranking.comparison import (
    MeasureComparison,
    compare,
    compare_runs,
    comparison_table,
    query_lines,
    read_rerank_result,
)
from rankllm_composer.ranking.decoding import generate_windows, score_windows_first_token
from rankllm_composer.ranking.metrics import ndcg
from rankllm_composer.ranking.rerank import RerankFiles, answer_statistics, rerank_files, write_run
from rankllm_composer.ranking.reranker import RerankedQuery, Reranker
from rankllm_composer.shards.build import build_shards
from rankllm_composer.shards.contents import held_out_share
from rankllm_composer.shards.read import SplitRecords
from rankllm_composer.sources.retrieval_files import load_documents, load_judgments, load_queries, load_run

DECODINGS = ("first_token", "generation")


def collection(sizes: dict[str, int], seed: int = 0) -> tuple[dict, dict, dict, dict]:
    """(queries, documents, run, value of each document): lists of these lengths; a document is worth its `w…`."""
    generator = np.random.default_rng(seed)
    queries, documents, run, values = {}, {}, {}, {}
    for qid, size in sizes.items():
        queries[qid] = "heat flow"
        run[qid] = [f"{qid}-{i}" for i in range(size)]
        for docid, value in zip(run[qid], generator.permutation(100)[:size].tolist()):
            values[docid], documents[docid] = value, f"wing w{value}"
    return queries, documents, run, values


def slide(docids: list[str], rank, window: int, stride: int, passes: int = 1) -> list[str]:
    """Slow: one query alone, a window at a time."""
    docids = list(docids)
    for _ in range(passes):
        stop = len(docids)
        while True:
            start = max(0, stop - window)
            docids[start:stop] = rank(docids[start:stop])
            if start == 0:
                break
            stop -= stride
    return docids


def rerank(model, sizes, contract_options, seed=0, objective="combined", **options):
    tokenizer = new_tokenizer()
    contract = new_contract(tokenizer, objective, **contract_options)
    queries, documents, run, values = collection(sizes, seed)
    found = Reranker(model, tokenizer, contract, RerankOptions(**options)).rerank_queries(queries, documents, run)
    return {query.qid: query for query in found}, run, values


SIZES = {"one": 1, "two": 2, "five": 5, "window": 6, "more": 7, "long": 17, "exact": 12}


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("window, stride, passes", [(6, 3, 1), (6, 3, 2), (6, 6, 1), (5, 2, 1), (20, 10, 1), (2, 1, 3)])
def test_windows_of_a_perfect_model_lift_the_best(decoding, window, stride, passes):
    options = {"window_size": window, "stride": stride}
    found, run, values = rerank(
        KnownReranker(ending="]"), SIZES, options, decoding=decoding, passes=passes, queries_at_once=3
    )
    assert found.keys() == run.keys()
    for qid, docids in run.items():

        def by_value(part):
            return sorted(part, key=values.__getitem__, reverse=True)

        assert list(found[qid].docids) == slide(docids, by_value, window, stride, passes)
        if stride < window or len(docids) <= window:
            assert values[found[qid].docids[0]] == max(values[docid] for docid in docids)
        assert found[qid].num_opened == (found[qid].num_windows if decoding == "first_token" else None)
        assert found[qid].num_malformed == (0 if decoding == "generation" else None)


@pytest.mark.parametrize("decoding", DECODINGS)
def test_packed_queries_equal_one_query_and_window_at_a_time(decoding):
    """Packed with others, in any number of queries at once, a query ends as it does alone, unpacked."""
    model, tokenizer = new_model(seed=6), new_tokenizer()
    contract = new_contract(tokenizer, window_size=4, stride=2)
    queries, documents, run, _ = collection({"a": 9, "b": 3, "c": 6})

    def rank(part):
        if len(part) < 2:
            return part
        window = fit_window("w", "heat flow", [documents[docid] for docid in part], tokenizer)
        if decoding == "first_token":
            (answer,) = score_windows_first_token(model, tokenizer, [window], contract)
        else:
            (answer,) = generate_windows(model, tokenizer, [window], contract)
        return [part[i] for i in answer.permutation]

    expected = {qid: tuple(slide(docids, rank, 4, 2)) for qid, docids in run.items()}
    for queries_at_once, batch_tokens in ((1, 10), (2, 500), (32, 10_000)):
        options = RerankOptions(decoding=decoding, queries_at_once=queries_at_once, batch_tokens=batch_tokens)
        found = Reranker(model, tokenizer, contract, options).rerank_queries(queries, documents, run)
        assert {query.qid: query.docids for query in found} == expected
    assert expected != {qid: tuple(docids) for qid, docids in run.items()}


def test_only_the_top_is_reranked():
    found, run, values = rerank(KnownReranker(), {"a": 30}, {"window_size": 6, "stride": 3}, top_k=10)
    assert found["a"].docids[10:] == tuple(run["a"][10:])
    top = [values[docid] for docid in found["a"].docids[:10]]
    assert top[0] == max(values[docid] for docid in run["a"][:10])
    assert found["a"].num_windows == 3  # 4–10, 1–7, 0–4


def test_windows_of_different_queries_share_a_forward():
    sizes = {f"q{i}": 9 for i in range(10)}
    model = KnownReranker()
    rerank(model, sizes, {"window_size": 6, "stride": 3}, queries_at_once=10, batch_tokens=100_000)
    assert model.num_forwards == 2  # two windows a query
    model.num_forwards = 0
    rerank(model, sizes, {"window_size": 6, "stride": 3}, queries_at_once=4, batch_tokens=100_000)
    assert model.num_forwards == 2 * math.ceil(10 / 4)


def test_ranking_objective_reads_after_an_appended_bracket():
    model = KnownReranker(opening=[">"])
    found, run, values = rerank(model, {"a": 5}, {}, objective="ranking")
    assert found["a"].docids == tuple(sorted(run["a"], key=values.__getitem__, reverse=True))
    assert found["a"].num_opened == 0 and model.num_forwards == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"decoding": "beam"}, "decoding is 'beam'; expected one of first_token, generation"),
        ({"passes": 0}, "passes is 0; expected a whole number of at least 1"),
        ({"top_k": 1}, "top_k is 1; expected a whole number of at least 2"),
        ({"queries_at_once": 0}, "queries_at_once is 0; expected a whole number of at least 1"),
        ({"dtype": "float8"}, "dtype is 'float8'; expected one of float32, bfloat16, float16"),
        ({"constrained": True}, "constrained has no effect on first_token"),
        ({"decoding": "generation", "objective": "ranking"}, "the model was trained by ranking alone"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rerank(KnownReranker(), {"a": 5}, {}, **options)


# The job


class Killed(Exception):
    pass


class DyingReranker(KnownReranker):
    """Dies at its nth forward."""

    def __init__(self, dies_at: int) -> None:
        super().__init__()
        self.dies_at = dies_at

    def forward(self, *args, **kwargs):
        if self.num_forwards + 1 == self.dies_at:
            raise Killed
        return super().forward(*args, **kwargs)


def run_job(folder: Path, model, **options):
    tokenizer = new_tokenizer()
    queries, documents, run, _ = collection(SIZES)
    contract = new_contract(tokenizer, window_size=options.pop("window_size", 6), stride=3)
    name, progress_bar = options.pop("name", "known"), options.pop("progress_bar", False)
    chosen = RerankOptions(**{"queries_at_once": 2, "batch_tokens": 10, **options})
    reranker = Reranker(model, tokenizer, contract, chosen, name=name)
    return reranker.rerank_run(run, queries, documents, folder / "out.trec", progress_bar=progress_bar)


def test_output_is_a_trec_run_in_the_order_of_the_queries(tmp_path):
    ranked = run_job(tmp_path, KnownReranker())
    lines = [line.split() for line in (tmp_path / "out.trec").read_text().splitlines()]
    assert [line[0] for line in lines if line[3] == "1"] == list(SIZES)
    assert len(lines) == sum(SIZES.values())
    for query in ranked:
        own = [line for line in lines if line[0] == query.qid]
        assert [line[2] for line in own] == list(query.docids)
        assert [int(line[3]) for line in own] == list(range(1, len(own) + 1))
        assert [int(line[4]) for line in own] == list(range(len(own), 0, -1))
        assert {line[1] for line in own} == {"Q0"} and {line[5] for line in own} == {"rankllm-composer"}
    assert load_run(tmp_path / "out.trec") == {query.qid: list(query.docids) for query in ranked}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.trec"]


def test_a_job_stopped_anywhere_resumes(tmp_path):
    model = KnownReranker()
    expected = run_job(tmp_path, model)
    whole = (tmp_path / "out.trec").read_bytes()
    total, resumed = model.num_forwards, 0
    assert total > 6
    for dies_at in range(1, total + 1):
        folder = tmp_path / str(dies_at)
        folder.mkdir()
        with pytest.raises(Killed):
            run_job(folder, DyingReranker(dies_at))
        assert not (folder / "out.trec").exists()
        second = KnownReranker()
        ranked = run_job(folder, second)
        assert ranked == expected and (folder / "out.trec").read_bytes() == whole
        resumed += second.num_forwards < total
    assert resumed > total / 2


def test_progress_counts_windows_and_resumes(tmp_path, capsys):
    with pytest.raises(Killed):
        run_job(tmp_path, DyingReranker(8), progress_bar=True)
    ranked = run_job(tmp_path, KnownReranker(), progress_bar=True)
    shown = capsys.readouterr().err
    found = re.findall(r"reranking  (\d+)/(\d+) windows$", shown, re.MULTILINE)
    assert re.search(r"out\.trec: \d+ quer(y|ies) of \d+ taken from the stopped job$", shown, re.MULTILINE)
    (stopped, total), (resumed, same) = [tuple(map(int, numbers)) for numbers in found]
    assert total == same == sum(query.num_windows for query in ranked)
    assert stopped == 0 < resumed < total


@pytest.mark.parametrize("decoding, remedy", [("generation", "--constrained"), ("first_token", "a ranking loss")])
def test_answers_that_cannot_be_read_are_counted_and_explained(decoding, remedy):
    """A job whose model answers nothing readable says that it changed nothing, and why."""
    malformed = 27 if decoding == "generation" else None
    reranker = SimpleNamespace(decoding=decoding, contract=SimpleNamespace(append_bracket=True))
    query = RerankedQuery("q", ("d",), 27, None, malformed, num_unread=27)
    text = "\n".join(answer_statistics([query], reranker))
    assert "27 of 27 windows kept the first stage's order, as their answer names no candidate" in text
    assert remedy in text and "train it longer" in text
    text = "\n".join(answer_statistics([query, replace(query, num_unread=0)], reranker))
    assert "27 of 54 windows kept the first stage's order" in text and "train it longer" not in text
    assert ("54 of 54 answers deviate from the requested format" in text) == (decoding == "generation")


def test_a_line_cut_off_by_a_kill_is_redone(tmp_path):
    kept = tmp_path / "out.trec.progress.jsonl"
    expected = run_job(tmp_path, KnownReranker())
    with pytest.raises(Killed):
        run_job(tmp_path, DyingReranker(8))
    content = kept.read_bytes()
    lines = content.splitlines(keepends=True)
    assert len(lines) > 2
    for torn in (content[:-1], content[:-20], lines[0] + lines[1][:5], lines[0][:7], b""):
        kept.write_bytes(torn)
        assert run_job(tmp_path, KnownReranker()) == expected
        assert not kept.exists()


@pytest.mark.parametrize(
    "change, named",
    [
        ({"name": "other"}, "model"),
        ({"passes": 2}, "passes"),
        ({"top_k": 9}, "top_k"),
        ({"decoding": "generation"}, "decoding"),
        ({"window_size": 5}, "contract"),
    ],
)
def test_other_settings_do_not_resume_a_stopped_job(tmp_path, change, named):
    with pytest.raises(Killed):
        run_job(tmp_path, DyingReranker(8))
    with pytest.raises(RunError, match=rf"progress\.jsonl is from a stopped job with other settings \({named}\)"):
        run_job(tmp_path, KnownReranker(), **change)
    run_job(tmp_path, KnownReranker(), batch_tokens=9000, queries_at_once=7)  # these change nothing in the result


def test_a_damaged_or_busy_progress_file_is_refused(tmp_path):
    kept = tmp_path / "out.trec.progress.jsonl"
    with pytest.raises(Killed):
        run_job(tmp_path, DyingReranker(8))
    lines = kept.read_bytes().splitlines(keepends=True)
    for bad in (b"{\n", b"[]\n", b'{"qid": "one"}\n'):
        kept.write_bytes(lines[0] + bad)
        with pytest.raises(RunError, match=r"is damaged .*\. Delete it to start over"):
            run_job(tmp_path, KnownReranker())
    kept.write_bytes(b"")
    with kept.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process is writing this run"):
            run_job(tmp_path, KnownReranker())


def test_queries_that_do_not_match_the_run(tmp_path):
    tokenizer = new_tokenizer()
    shared = r"none of its queries \(1, such as 'b'\) is among those given \(1, such as 'a'\)\. Check that both"
    with pytest.raises(RunError, match=shared):
        reranker = Reranker(KnownReranker(), tokenizer, new_contract(tokenizer))
        reranker.rerank_run({"b": ["d"]}, {"a": "x"}, {}, tmp_path / "out.trec")


@pytest.mark.parametrize(
    "run, documents, message",
    [
        ({"a": ["d", "e"]}, {"d": "heat"}, "documents: 1 of the run have no text, such as e"),
        ({"a": ["d", "e 1"]}, {"d": "heat", "e 1": "flow"}, "the document id 'e 1' is empty or holds white space"),
        ({"a": ["d", ""]}, {"d": "heat", "": "flow"}, "the document id '' is empty or holds white space"),
        ({"a\tb": ["d", "e"]}, {"d": "heat", "e": "flow"}, r"the query id 'a\\tb' is empty or holds white space"),
    ],
)
def test_ids_that_the_end_could_not_write_are_refused_first(run, documents, message, tmp_path):
    tokenizer, model = new_tokenizer(), KnownReranker()
    with pytest.raises(RunError, match=message):
        Reranker(model, tokenizer, new_contract(tokenizer)).rerank_run(
            run, dict.fromkeys(run, "heat"), documents, tmp_path / "out.trec"
        )
    assert model.num_forwards == 0 and list(tmp_path.iterdir()) == []


# Inputs


def write_json_lines(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_files(folder: Path, sizes=SIZES) -> dict[str, Path]:
    """A collection as files; the judgments are the values."""
    queries, documents, run, values = collection(sizes)
    write_run(folder / "run.trec", run)
    judgments = [f"{qid} 0 {docid} {values[docid]}\n" for qid, docids in run.items() for docid in docids]
    (folder / "qrels.trec").write_text("".join(judgments))
    return {
        "queries": write_json_lines(folder / "q.jsonl", ({"qid": k, "text": v} for k, v in queries.items())),
        "documents": write_json_lines(folder / "d.jsonl", ({"docid": k, "text": v} for k, v in documents.items())),
        "first_stage": folder / "run.trec",
        "judgments": folder / "qrels.trec",
    }


def test_only_queries_that_a_build_held_out_are_reranked(exported, tmp_path):
    files = write_files(tmp_path)
    texts = ("Heat", "flow", "wing", " heat  flow", "heat wing", "flow wing", "wing flow")
    write_json_lines(files["queries"], [{"qid": qid, "text": text} for qid, text in zip(SIZES, texts)])
    source = {"run": files["first_stage"], "queries": files["queries"], "docs": files["documents"]}
    for output, share in (("lists", 0.5), ("all", 0.0)):
        options = SourceOptions(**source, judgments=files["judgments"], window=2)
        build_shards(tmp_path / output, options, BuildOptions(hold_out=share, num_processes=1))
    qids = [{record.qid for record in SplitRecords([(tmp_path / name, None)])} for name in ("lists", "lists-held-out")]
    job = RerankFiles(**files, output=tmp_path / "out.trec", hold_out=held_out_share(tmp_path / "lists"))
    report = rerank_files(exported, job, progress_bar=False)
    reranked = {query.qid for query in report.queries}
    assert qids[1] <= reranked and reranked.isdisjoint(qids[0]) and 0 < len(reranked) < len(SIZES)
    assert f"{len(reranked)} of 7 queries held out" in report.text and "not reranked" not in report.text
    assert held_out_share(tmp_path / "lists-held-out") == 0.5
    with pytest.raises(RunError, match=r"none of its queries \(7, such as '.+'\) was held out\. Build"):
        rerank_files(exported, RerankFiles(**files, output=tmp_path / "none.trec", hold_out=1e-9))
    with pytest.raises(ShardError, match=r"all: its build held out no queries; expected a set of .*hold-out`\. Name"):
        held_out_share(tmp_path / "all")


def test_files_and_a_beir_folder_contain_the_same(tmp_path):
    write_json_lines(tmp_path / "q.jsonl", [{"qid": "1", "text": " heat "}, {"qid": "2", "text": "flow"}])
    rows = [{"docid": "a", "title": "T", "text": "one"}, {"docid": "b", "text": "two"}, {"docid": "c", "contents": "x"}]
    write_json_lines(tmp_path / "d.jsonl", rows)
    (tmp_path / "qrels.trec").write_text("1 0 a 2\n1 0 b 0\n")
    beir = tmp_path / "beir"
    write_json_lines(beir / "queries.jsonl", [{"_id": "1", "text": "heat"}, {"_id": "2", "text": "flow"}])
    rows = [{"_id": "a", "title": "T", "text": "one"}, {"_id": "b", "title": "", "text": "two"}]
    write_json_lines(beir / "corpus.jsonl", rows)
    (beir / "qrels").mkdir()
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\ta\t2\n1\tb\t0\n")
    assert load_queries(tmp_path / "q.jsonl") == load_queries(beir) == {"1": "heat", "2": "flow"}
    expected = {"a": "Title: T Content: one", "b": "two"}
    assert load_documents(tmp_path / "d.jsonl", ["a", "b"]) == load_documents(beir, ["a", "b"]) == expected
    judgments = {"1": {"a": 2, "b": 0}}
    assert load_judgments(tmp_path / "qrels.trec") == load_judgments(beir) == judgments
    assert load_judgments(beir / "qrels" / "test.tsv") == judgments


class LocalFile:
    """A file that is here already, as ir_datasets takes what it would download."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def path(self, force: bool = True) -> str:
        return str(self._path)

    @contextmanager
    def stream(self):
        with self._path.open("rb") as file:
            yield file


class TopicQuery(NamedTuple):
    query_id: str
    title: str


class PageDoc(NamedTuple):
    doc_id: str
    url: str
    body: str

    def default_text(self) -> str:
        return f"{self.url} {self.body}"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Data sets of the real ir_datasets: one of all four parts, one of pages and topics alone, one out of reach."""
    home = tmp_path_factory.mktemp("irds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IR_DATASETS_HOME", str(home))
        import ir_datasets
        from ir_datasets.datasets.base import Dataset
        from ir_datasets.formats import TrecQrels, TrecScoredDocs, TsvDocs, TsvQueries
        from ir_datasets.util import Cache, RequestsDownload

        parts = {
            "docs": "a\tone\nb\ttwo [12]\nc\tthree\n",
            "queries": "1\theat\n2\tflow\n",
            "qrels": "1 0 a 2\n1 0 b 0\n",
            "scoreddocs": "1 Q0 b 1 1.5 x\n1 Q0 a 2 2.5 x\n2 Q0 c 1 0.1 x\n",
        }
        for name, text in parts.items():
            (home / name).write_text(text)
        files = {name: LocalFile(home / name) for name in parts}
        whole = Dataset(
            TsvDocs(files["docs"], namespace="local", lang="en"),
            TsvQueries(files["queries"], lang="en"),
            TrecQrels(files["qrels"], {0: "no", 2: "yes"}),
            TrecScoredDocs(files["scoreddocs"]),
        )
        (home / "pages").write_text("p\thttp://x\tbody\n")
        (home / "topics").write_text("t\ta title\n")
        pages = Dataset(
            TsvDocs(LocalFile(home / "pages"), doc_cls=PageDoc, namespace="pages", lang="en"),
            TsvQueries(LocalFile(home / "topics"), query_cls=TopicQuery, lang="en"),
        )
        with socket.socket() as closed:  # a port that nobody listens on
            closed.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        far = Cache(RequestsDownload(url, tries=1), home / "far")
        absent = Dataset(TsvDocs(far, namespace="absent", lang="en"), TsvQueries(far, lang="en"))
        for name, dataset in (("rankllm-local", whole), ("rankllm-pages", pages), ("rankllm-absent", absent)):
            if name not in ir_datasets.registry:
                ir_datasets.registry.register(name, dataset)
        yield


def test_ir_datasets_ids(stored):
    """Through the real package: every part, the collection's own text fields, and what a data set lacks."""
    source = "irds:rankllm-local"
    assert load_queries(source) == {"1": "heat", "2": "flow"}
    assert load_documents(source, ["a", "b"]) == {"a": "one", "b": "two [12]"}
    assert load_judgments(source) == {"1": {"a": 2, "b": 0}}
    assert load_run(source) == {"1": ["a", "b"], "2": ["c"]}  # by score, not as the lines stand
    assert load_queries("irds:rankllm-pages") == {"t": "a title"}
    assert load_documents("irds:rankllm-pages", ["p"]) == {"p": "http://x body"}
    with pytest.raises(SourceError, match="irds:rankllm-local: lacks 1 document of the run, such as z"):
        load_documents(source, ["a", "z"])
    with pytest.raises(SourceError, match="irds:nowhere: ir_datasets has no dataset 'nowhere'"):
        load_queries("irds:nowhere")
    for load, part in ((load_judgments, "qrels"), (load_run, "scoreddocs")):
        with pytest.raises(SourceError, match=f"irds:rankllm-pages: the dataset has no {part}"):
            load("irds:rankllm-pages")


def test_ir_datasets_that_cannot_be_downloaded(stored):
    for load in (load_queries, lambda source: load_documents(source, ["a"])):
        with pytest.raises(SourceError, match=r"irds:rankllm-absent: ir_datasets cannot fetch .* \(ConnectionError: "):
            load("irds:rankllm-absent")


def test_ir_datasets_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    with pytest.raises(SourceError, match="irds:vaswani: the package ir_datasets is not installed"):
        load_queries("irds:vaswani")


def test_the_command_accepts_ids_and_folders(exported, stored, tmp_path, capsys):
    """From an ir_datasets id, a BEIR folder beside a TREC run, and requests of rank_llm: the same reranked run."""
    beir = tmp_path / "beir"
    rows = [{"_id": docid, "text": text} for docid, text in (("a", "one"), ("b", "two [12]"), ("c", "three"))]
    write_json_lines(beir / "corpus.jsonl", rows)
    write_json_lines(beir / "queries.jsonl", [{"_id": "1", "text": "heat"}, {"_id": "2", "text": "flow"}])
    (beir / "qrels").mkdir()
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\ta\t2\n1\tb\t0\n")
    write_run(tmp_path / "run.trec", {"1": ["a", "b"], "2": ["c"]})
    texts = {row["_id"]: {"docid": row["_id"], "doc": {"text": row["text"]}} for row in rows}
    queries = (("1", "heat", ("a", "b")), ("2", "flow", ("c",)))
    requests = tmp_path / "requests.jsonl"
    write_json_lines(
        requests,
        [{"query": {"qid": q, "text": text}, "candidates": [texts[d] for d in docs]} for q, text, docs in queries],
    )
    for name, inputs in {
        "ids": {"run": "irds:rankllm-local", "qrels": "irds:rankllm-local"},
        "beir": {"run": tmp_path / "run.trec", "queries": beir, "docs": beir, "qrels": beir},
        "requests": {"run": requests, "qrels": beir},
    }.items():
        arguments = [text for key, value in inputs.items() for text in (f"--{key}", str(value))]
        with pytest.raises(SystemExit) as ended:
            main(["rerank", "--model", str(exported), *arguments, "--output", str(tmp_path / f"{name}.trec")])
        assert not ended.value.code, capsys.readouterr().err
    assert (tmp_path / "ids.trec").read_text() == (tmp_path / "beir.trec").read_text()
    assert (tmp_path / "ids.trec").read_text() == (tmp_path / "requests.trec").read_text()
    assert "nDCG@10" in capsys.readouterr().out


BAD_FILES = {
    "query twice": (
        load_queries,
        '{"qid": "1", "text": "x"}\n{"qid": 1, "text": "y"}\n',
        r"f:line 2: query '1' is repeated with another text, also in f:line 1",
    ),
    "query without text": (
        load_queries,
        '{"qid": "0", "text": "x"}\n{"qid": "1"}\n',
        r"f:line 2: query '1' has no text",
    ),
    "document twice": (
        lambda path: load_documents(path, ["1"]),
        '{"docid": "1", "text": "x"}\n{"docid": 1, "text": "y"}\n',
        r"f:line 2: document '1' is repeated with another text, also in f:line 1",
    ),
    "document without text": (
        lambda path: load_documents(path, ["1"]),
        '{"docid": "0", "text": "x"}\n{"docid": "1", "x": 1}\n',
        r"f:line 2: document '1': .*expected text under one of",
    ),
    "document missing": (
        lambda path: load_documents(path, ["1", "2"]),
        '{"docid": "1", "text": "x"}\n',
        r"lacks 1 document of the run, such as 2",
    ),
    "run with a document twice": (load_run, "1 Q0 a 1 2 t\n1 Q0 a 2 1 t\n", r"f:line 2: document 'a' is repeated"),
    "empty run": (load_run, "", "the file is empty; expected a first-stage run"),
    "run with a bad line": (load_run, "1 Q0 b 1 2 t\n1 Q0 a 1\n", r"f:line 2: '1 Q0 a 1' has 4 fields"),
    "judgments for a run": (
        load_run,
        "1 Q0 a 1\n",
        r"f:line 1: found TREC judgments, read as judgments; expected a first",
    ),
    "contradiction": (load_judgments, "1 0 a 1\n1 0 a 2\n", r"f:line 2: document 'a' has grade 2 here and 1 before"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_named_with_their_line(case, tmp_path):
    read, content, message = BAD_FILES[case]
    (tmp_path / "f").write_text(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "f")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"queries": "x\tanother\n"}, "run and queries share no query id: run has '1', queries has 'x'"),
        ({"judgments": "9 0 a 1\n"}, "judgments and run share no query id: judgments has '9', run has '1'"),
        ({"judgments": "1 0 A 1\n"}, "judgments and run share no document id: judgments has 'A', run has 'a'"),
        ({"documents": "A\tone\n"}, "the run and documents share no document id: the run has 'a', documents has 'A'"),
        ({"run": "1 Q0 a 1 2 t\n1 Q0 a 2 1 t\n"}, "run:line 2: document 'a' is repeated for query '1', also in line 1"),
        (
            {"queries": None},
            "queries is not given, and run holds no queries; expected a file, a BEIR folder or irds:ID",
        ),
    ],
)
def test_files_that_do_not_belong_together_are_refused_before_a_model_is_loaded(changed, message, tmp_path):
    contents = {"run": "1 Q0 a 1 2 t\n", "queries": "1\theat\n", "documents": "a\tone\n", "judgments": "1 0 a 1\n"}
    files = {}
    for name, content in (contents | changed).items():
        if content is not None:
            files["first_stage" if name == "run" else name] = tmp_path / name
            (tmp_path / name).write_text(content)
    with pytest.raises(SourceError) as caught:
        rerank_files(tmp_path / "no model", RerankFiles(**files, output=tmp_path / "out.trec"))
    assert message in str(caught.value)


def test_a_bad_beir_line(tmp_path):
    (tmp_path / "f.tsv").write_text("query-id\tcorpus-id\tscore\n1 a 2\n")
    with pytest.raises(
        SourceError, match=r"f\.tsv:line 2: '1 a 2' has 1 column; expected 3: query-id, corpus-id, score"
    ):
        load_judgments(tmp_path / "f.tsv")


def test_run_order_is_by_score_and_the_disagreement_is_said(tmp_path):
    (tmp_path / "f").write_text("1 Q0 a 3 9 t\n1 Q0 b 1 1 t\n2 Q0 a 1 1 t\n1 Q0 c 2 5 t\n")
    notes = []
    assert load_run(tmp_path / "f", notes=notes.append) == {"1": ["a", "c", "b"], "2": ["a"]}
    assert notes == [
        "f: 1 of 2 queries with ranks that disagree with the scores; the order is by score, as in trec_eval"
    ]


# Comparison


def test_comparison_equals_our_metrics():
    first = {"a": ["1", "2", "3"], "b": ["1", "2"], "c": ["9"], "unjudged": ["1"]}
    second = {"a": ["3", "1", "2"], "b": ["1", "2"], "c": ["9"], "unjudged": ["1"]}
    judgments = {"a": {"3": 2, "2": 1, "7": 1}, "b": {"2": 1}, "c": {"8": 1}, "not in the run": {"1": 1}}
    rows = {row.measure: row for row in compare_runs(first, second, judgments, ["nDCG@10", "RR@10", "P@1"])}
    for name, run in (("first_stage", first), ("reranked", second)):
        for qid in "abc":
            grades = [judgments[qid].get(docid, 0) for docid in run[qid]]
            assert getattr(rows["nDCG@10"], name)[qid] == pytest.approx(ndcg(grades, list(judgments[qid].values())))
    row = rows["RR@10"].comparison
    assert (row.first_mean, row.second_mean) == pytest.approx(((1 / 2 + 1 / 2 + 0) / 3, (1 + 1 / 2 + 0) / 3))
    assert (row.wins, row.ties, row.losses) == (1, 2, 0)
    assert row.p_value == 1.0  # one query that differs has either sign half of the time
    table = comparison_table(list(rows.values()))
    assert "RR@10" in table and "0.3333 → 0.5000" in table and "+0.1667" in table and "1/2/0" in table


def test_ties_of_the_run_keep_their_order():
    """Scores are made from places, so that trec_eval's order of equal scores, by id, changes nothing."""
    rows = compare_runs({"a": ["x", "y"]}, {"a": ["y", "x"]}, {"a": {"y": 1}}, ["RR@10"])
    assert (rows[0].first_stage["a"], rows[0].reranked["a"]) == (0.5, 1.0)


def test_the_queries_that_changed_most_are_listed():
    first = {f"q{i}": 0.5 for i in range(9)}
    second = first | {"q1": 0.75, "q3": 1.0, "q2": 0.75, "q7": 0.0, "q8": 0.5 - 1e-9}
    row = MeasureComparison("RR@10", compare(first, second), first, second)
    assert list(query_lines(row, 2)) == [
        "RR@10  gained  0.5000 → 1.0000  +0.5000  query q3",
        "RR@10  gained  0.5000 → 0.7500  +0.2500  query q1",
        "RR@10  lost    0.5000 → 0.0000  -0.5000  query q7",
        "RR@10  lost    0.5000 → 0.5000  -0.0000  query q8",
    ]
    assert list(query_lines(MeasureComparison("RR@10", compare(first, first), first, first))) == []


def test_runs_that_cannot_be_compared_are_refused():
    with pytest.raises(RunError, match=r"measure is 'nGCG@10'; expected a name of ir-measures"):
        compare_runs({"a": ["1"]}, {"a": ["1"]}, {"a": {"1": 1}}, ["nGCG@10"])
    with pytest.raises(RunError, match="none of the 1 reranked"):
        compare_runs({"a": ["1"]}, {"a": ["1"]}, {"b": {"1": 1}})


@pytest.mark.parametrize("name", ["ERR@10", "nDCG(dcg='exp-log2')@10", "nERR@5", "P(rel=2)@3"])
def test_ids_of_any_kind_are_measured(name):
    """Providers that read only numbers, or files with spaces between ids, give what they give for plain numbers."""
    first, second = {"7": ["1", "2", "3"], "8": ["4", "1"]}, {"7": ["3", "1", "2"], "8": ["4", "1"]}
    judgments = {"7": {"3": 2, "2": 1, "9": 1}, "8": {"1": 3, "4": 0}}
    if name == "nERR@5":
        with pytest.raises(RunError, match="measure is 'nERR@5'; expected a name of ir-measures"):
            compare_runs(first, second, judgments, [name])
        return

    def renamed(texts):
        return f"q {texts} é>|" if isinstance(texts, str) else [f"doc #{text}\t{{" for text in texts]

    strange = [{renamed(qid): renamed(docids) for qid, docids in run.items()} for run in (first, second)]
    grades = {renamed(qid): dict(zip(renamed(judged), judged.values())) for qid, judged in judgments.items()}
    (plain, *_), (odd, *_) = compare_runs(first, second, judgments, [name]), compare_runs(*strange, grades, [name])
    measure = ir_measures.parse_measure(name)
    for values, own, run in ((plain.first_stage, odd.first_stage, first), (plain.reranked, odd.reranked, second)):
        scores = {qid: {docid: -float(i) for i, docid in enumerate(docids)} for qid, docids in run.items()}
        theirs = {row.query_id: row.value for row in ir_measures.iter_calc([measure], judgments, scores)}
        assert values == theirs and own == {renamed(qid): value for qid, value in theirs.items()}
    assert plain.comparison.second_mean > 0


@pytest.mark.parametrize(
    "name",
    [
        "nDCG@0",
        "P@-1",
        "RR@5.5",
        "Judged@0",
        "alpha_nDCG@10",
        "INST",
        "BPM",
        "SetF(beta=0)",
        "P(rel=0)@5",
        "AP@x",
        "R@True",
    ],
)
def test_measures_that_no_provider_computes_are_said_in_words(name):
    with pytest.raises(RunError, match=r"^measure is .*\. (Correct|Use) "):
        compare_runs({"a": ["1"]}, {"a": ["1"]}, {"a": {"1": 1}}, [name])


# From an exported folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A folder as it is exported: a random model, its tokenizer and its decoding contract."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = new_tokenizer()
    new_model(seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "reranker.json").write_text(new_contract(tokenizer, window_size=6, stride=3).to_json())
    return folder


def test_a_job_from_files_to_report(exported, tmp_path):
    files = write_files(tmp_path)
    with files["queries"].open("a") as file:
        file.write('{"qid": "extra", "text": "no candidates"}\n')
    with files["first_stage"].open("a") as file:
        file.write("nobody Q0 one-0 1 1 t\n")
    with files["judgments"].open("a") as file:
        file.write("absent 0 x 1\n")
    job = RerankFiles(**files, output=tmp_path / "out.trec")
    report = rerank_files(exported, job, measures=("nDCG@10", "AP"), progress_bar=False)
    assert load_run(tmp_path / "out.trec") == {query.qid: list(query.docids) for query in report.queries}
    assert "7 queries reranked by first_token" in report.text
    assert "as the model's first token" not in report.text  # it is appended
    with pytest.warns(UserWarning, match=r"client_version is 0\.25\.7, which shows up to 1000 words of a passage"):
        older_job = RerankFiles(**files, output=tmp_path / "older.trec")
        older = rerank_files(exported, older_job, RerankOptions(client_version="0.25.7"), progress_bar=False)
    assert "windows have '[' as the model's first token" in older.text
    assert "1 query without candidates in the run, such as extra" in report.text
    assert "1 query of the run without text, such as nobody" in report.text
    assert "1 judged query not reranked, such as absent" in report.text
    assert [row.measure for row in report.comparisons] == ["nDCG@10", "Judged@10", "AP"]
    assert comparison_table(report.comparisons) in report.text
    assert "run: 7 queries" in report.text  # the set has the run's name
    kept = read_rerank_result(tmp_path / "out.trec.figures.json")
    assert kept == report.result and (kept.name, kept.model) == ("run", str(exported))
    told = [line for line in report.text.splitlines() if "  query " in line]
    assert told == list(query_lines(report.comparisons[0])) and len(told) > 2
    job = RerankFiles(**files, output=tmp_path / "again.trec")
    again = rerank_files(exported, job, RerankOptions(batch_tokens=300), progress_bar=False)
    assert again.queries == report.queries

    written = rerank_files(
        exported,
        RerankFiles(**{**files, "judgments": None}, output=tmp_path / "written.trec"),
        RerankOptions(decoding="generation", window_size=4, stride=2),
        progress_bar=False,
    )
    assert "answers deviate from the requested format" in written.text and written.comparisons == ()
    assert not (tmp_path / "written.trec.figures.json").exists()  # nothing was measured


def test_the_command_measures_and_adds_to_the_card(exported, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    published = {"dl19-bm25/nDCG@10": 0.7294, "dl20-bm25/nDCG@10": 0.7043}
    facts = CardFacts("first_mistral", None, read_contract(folder), published=published)
    (folder / "README.md").write_text(render_card(facts))
    files = write_files(tmp_path, {"a": 9, "b": 5})
    arguments = ["rerank", "--model", str(folder), "--output", str(tmp_path / "out.trec")]
    for name, key in (("queries", "queries"), ("docs", "documents"), ("run", "first_stage")):
        arguments += [f"--{name}", str(files[key])]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--card"])
    assert ended.value.code == 2 and "--card, --name and --measure need --qrels" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--qrels", str(files["judgments"]), "--name", "dl20-bm25", "--card"])
    assert not ended.value.code
    told = capsys.readouterr().out
    value = read_rerank_result(tmp_path / "out.trec.figures.json").figures()["dl20-bm25/nDCG@10"]
    assert "dl20-bm25: 2 queries" in told and f"→ {value:.4f}" in told
    side = "above" if value > 0.7043 * 1.025 else "below" if value < 0.7043 * 0.975 else "within tolerance"
    card = (folder / "README.md").read_text()
    before = read_rerank_result(tmp_path / "out.trec.figures.json").first_stage()["dl20-bm25/nDCG@10"]
    assert f"| dl20-bm25/nDCG@10 | {before:.4f} | {value:.4f} | 0.7043 | {side} |" in card
    assert "| dl19-bm25/nDCG@10 | – | not measured |" in card


def test_invalid_measures_and_options_stop_before_the_work(exported, tmp_path):
    job = RerankFiles(**write_files(tmp_path), output=tmp_path / "out.trec")
    with pytest.raises(RunError, match="nGCG"):
        rerank_files(exported, job, measures=("nGCG@10",))
    with pytest.raises(ModelError, match="window_size is 27"):
        rerank_files(exported, job, RerankOptions(window_size=27))
    assert not (tmp_path / "out.trec.progress.jsonl").exists()


def test_loading_a_reranker(exported, tmp_path):
    reranker = Reranker.from_pretrained(exported)
    model, tokenizer, contract = reranker.model, reranker.tokenizer, reranker.contract
    assert not model.training and contract.window_size == 6
    assert Reranker.from_pretrained(exported, RerankOptions(dtype="bfloat16")).model.dtype == torch.bfloat16
    with pytest.raises(RunError, match=r"has no reranker\.json"):
        new_tokenizer().save_pretrained(tmp_path)
        Reranker.from_pretrained(tmp_path)
    (tmp_path / "reranker.json").write_text(contract.to_json())
    with pytest.raises(ModelError, match="cannot load"):
        Reranker.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="chat template is not the one that the model was trained with"):
        Reranker.from_pretrained(tmp_path)
    tokenizer.chat_template = tokenizer.chat_template[:-1]
    tokenizer.save_pretrained(tmp_path)
    before = Reranker.from_pretrained(tmp_path).name
    assert before != reranker.name
    (tmp_path / "further.txt").write_text("")
    assert Reranker.from_pretrained(tmp_path).name != before


def test_cranfield_first_stage_is_measured_as_published(shared):
    """The BM25 run of Cranfield has nDCG@10 0.358 (known independently)."""
    folder = shared / "data" / "cranfield"
    queries, run = load_queries(folder / "queries.jsonl"), load_run(folder / "bm25_top100.trec")
    judgments = load_judgments(folder / "qrels.trec")
    row, judged = compare_runs(run, run, judgments, ["nDCG@10"])
    assert judged.measure == "Judged@10"
    assert row.comparison.first_mean == pytest.approx(0.3576, abs=5e-5)
    assert len(load_documents(folder / "docs.jsonl", {docid for docids in run.values() for docid in docids})) <= 1400
    assert queries.keys() == run.keys()
