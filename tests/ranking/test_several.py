"""`rerank --beir`: several test collections with one model, in one table with its mean."""

from __future__ import annotations

import json

import pytest
from support.tiny_rerankers import new_contract, new_model, new_tokenizer

from rankllm_composer.cli import main
from rankllm_composer.errors import RunError
from rankllm_composer.ranking.several import BEIR_SPLITS, collections_of
from rankllm_composer.sources.retrieval_files import load_run

SIZES = {"left": 5, "right": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = new_tokenizer()
    new_model(seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "reranker.json").write_text(new_contract(tokenizer, window_size=6, stride=3).to_json())
    return folder


@pytest.fixture
def folders(tmp_path):
    """Two BEIR folders and a folder of their first-stage runs, as Anserini names them."""
    (tmp_path / "runs").mkdir()
    for name, size in SIZES.items():
        folder = tmp_path / name
        (folder / "qrels").mkdir(parents=True)
        docids = [f"{name}-{number}" for number in range(size)]
        (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "one two"}) + "\n")
        rows = ({"_id": docid, "title": "", "text": f"word{number}"} for number, docid in enumerate(docids))
        (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\nq\t{docids[2]}\t1\n")
        lines = (f"q Q0 {docid} {rank} {-rank} t\n" for rank, docid in enumerate(docids, start=1))
        (tmp_path / "runs" / f"run.beir-v1.0.0-{name}.bm25.txt").write_text("".join(lines))
    return tmp_path


def run(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["rerank", *map(str, arguments)])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def test_one_table_and_its_mean(model, folders, capsys):
    sets = ",".join(str(folders / name) for name in SIZES)
    given = ("--model", model, "--beir", sets, "--first-stage", folders / "runs", "-o", folders / "out")
    code, out, _ = run(capsys, *given)
    assert code == 0
    lines = out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("nDCG@10  first stage"))
    left, right, mean = (line.split() for line in lines[start + 1 : start + 4])
    assert (left[0], right[0], mean[0]) == ("left", "right", "mean") and left[1] == right[1] == mean[1] == "0.5000"
    assert float(mean[3]) == pytest.approx((float(left[3]) + float(right[3])) / 2, abs=1e-4)
    assert any(line.startswith("Judged@10  first stage") for line in lines)
    apart = [word for name in SIZES for word in ("--beir", f"{folders / name},")]
    given = (*given[:2], *apart, *given[4:])
    code, out, err = run(capsys, *given, "--json", "-m", "RR")
    found = json.loads(out)
    assert code == 0 and "left: 1 query\n" in err and "mean" in err
    assert [one["name"] for one in found["collections"]] == list(SIZES)
    values = [one["measures"][0]["second_mean"] for one in found["collections"]]
    assert found["means"]["RR"] == {"first_stage": pytest.approx(1 / 3), "reranked": pytest.approx(sum(values) / 2)}
    for name, size in SIZES.items():
        assert len(load_run(folders / "out" / f"{name}.trec")["q"]) == size
        assert (folders / "out" / f"{name}.trec.figures.json").is_file()


def test_a_repeated_command_takes_finished_collections_from_the_stopped_job(model, folders, capsys):
    sets = ",".join(str(folders / name) for name in SIZES)
    given = ("--model", model, "--beir", sets, "--first-stage", folders / "runs", "-o", folders / "out")
    broken = folders / "right" / "corpus.jsonl"
    content = broken.read_text()
    broken.write_text("{")
    code, _, err = run(capsys, *given)
    assert code == 2 and "corpus.jsonl:line 1: invalid JSON" in err
    written = folders / "out" / "left.trec"
    kept = written.with_name("left.trec.progress.jsonl")
    first, known = written.read_bytes(), kept.read_bytes()
    lines = [json.loads(line) for line in known.splitlines()]
    lines[1]["docids"] = lines[1]["docids"][::-1]  # what no model decodes
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    broken.write_text(content)
    code, out, err = run(capsys, *given)
    assert code == 0 and f"{written}: 1 query of 1 taken from the stopped job" in err
    assert "right.trec: 1 query of 1" not in err and "mean" in out
    assert load_run(written)["q"] == lines[1]["docids"] and written.read_bytes() != first
    assert not [*(folders / "out").glob("*.progress.jsonl")]
    assert run(capsys, *given)[2].count("taken from the stopped") == 0 and written.read_bytes() == first
    kept.write_bytes(known)
    code, _, err = run(capsys, *given, "--passes", "2")
    assert code == 2 and "is from a stopped job with other settings (passes)" in err


def test_one_collection_as_json(model, folders, capsys):
    place = folders / "left"
    given = ("--queries", place, "--docs", place, "--run", folders / "runs" / "run.beir-v1.0.0-left.bm25.txt")
    code, out, err = run(capsys, "--model", model, *given, "--qrels", place, "-o", folders / "x.trec", "--json")
    found = json.loads(out)
    assert (code, found["num_queries"], found["output"]) == (0, 1, str(folders / "x.trec"))
    assert [row["measure"] for row in found["measures"]] == ["nDCG@10", "Judged@10", "RR@10"]
    assert "1 query reranked by first_token" in err


def test_names_of_collections_and_their_runs(tmp_path):
    for name in ("run.beir.bm25-flat.climate-fever.txt", "run.beir.bm25-flat.fever.txt", "scidocs-a", "scidocs-b"):
        (tmp_path / name).touch()
    fever, climate, pattern = (
        *collections_of(["fever", "climate-fever"], tmp_path),
        *collections_of(["irds:antique/test"], tmp_path / "{}.trec"),
    )
    assert (fever.source, fever.run.name) == ("irds:beir/fever/test", "run.beir.bm25-flat.fever.txt")
    assert (climate.source, climate.run.name) == ("irds:beir/climate-fever", "run.beir.bm25-flat.climate-fever.txt")
    assert (pattern.name, pattern.run) == ("antique-test", tmp_path / "antique-test.trec")
    (forum,) = collections_of(["cqadupstack/android"], tmp_path / "{}")
    assert (forum.name, forum.source) == ("cqadupstack-android", "irds:beir/cqadupstack/android")
    (own,) = collections_of(["irds:a/b"], None)
    assert own.run == own.source == "irds:a/b"
    for names, runs, message in (
        (["nfcorpu"], None, "Did you mean nfcorpus"),
        (["cqadupstack"], None, "cqadupstack/FORUM"),
        (["fever", "fever"], None, "Name each once"),
        (["scidocs"], tmp_path, r"holds 2 files with scidocs in their names \(scidocs-a, scidocs-b\)"),
        (["nq"], tmp_path, "holds 0 files with nq in their names"),
        (["nq"], tmp_path / "absent", "which is no folder"),
        (["nq"], None, "run is missing, and nq has no first-stage run of its own; expected a folder"),
    ):
        with pytest.raises(RunError, match=message):
            collections_of(names, runs)


def test_ir_datasets_knows_every_collection():
    registry = pytest.importorskip("ir_datasets").registry
    for name, part in BEIR_SPLITS.items():
        forum = "android" if name == "cqadupstack" else None
        known = "/".join(filter(None, ("beir", name, forum, part)))
        assert known in registry and not registry[known].has_scoreddocs(), name


def test_what_contradicts_is_refused(model, folders, capsys):
    code, _, err = run(capsys, "--model", model, "--beir", "nq", "--run", folders, "-o", "x", "--qrels", "y")
    assert code == 2 and "--beir names queries, documents and judgments" in err
    code, _, err = run(capsys, "--model", model, "-o", "x")
    assert code == 2 and "--run is missing" in err
