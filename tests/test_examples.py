"""examples/: each is short, is on a page, and runs as its first lines say; the notebook does what it shows."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from support.launching import REPOSITORY, metrics, run_python, succeeded
from support.s3_server import s3_server
from support.small_run import small_run

from rankllm_composer.sources.retrieval_files import load_run

EXAMPLES = REPOSITORY / "examples"
NOTEBOOK = EXAMPLES / "demo.ipynb"


def run(name: str, *arguments: str, folder: Path) -> str:
    """Run an example in a folder; it must print no warning."""
    printed = succeeded(run_python([EXAMPLES / name, *arguments], folder=folder, environment=os.environ))
    assert "Warning" not in printed and "deprecated" not in printed, printed
    return printed


def test_every_example_is_short_and_on_its_page():
    page = (REPOSITORY / "docs" / "examples.md").read_text()
    tests = Path(__file__).read_text()
    for path in set(EXAMPLES.glob("*.py")) - {EXAMPLES / "demo.py"}:
        lines = path.read_text().splitlines()
        assert len(lines) < 40, path.name
        assert lines[0].startswith('"""') and f"python examples/{path.name}" in "\n".join(lines[:8]), path.name
        assert f"](../examples/{path.name})" in page, path.name
        assert f'run("{path.name}"' in tests, path.name


def test_own_jsonl(tmp_path):
    printed = run("own_jsonl.py", folder=tmp_path)
    folder = tmp_path / "runs" / "own_jsonl"
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert {key for record in records for key in record} == {"id", "query", "passages", "ranking", "grades", "scores"}
    assert len(metrics(folder / "run" / "metrics.jsonl")) == 10
    assert printed.count("RankedPassage(index=") == 2


def test_bm25_qrels(tmp_path):
    printed = run("bm25_qrels.py", folder=tmp_path)
    folder = tmp_path / "runs" / "bm25_qrels"
    built = [json.loads((folder / name / "build.json").read_text()) for name in ("lists", "lists-held-out")]
    trained_on, held_out = (report["counts"]["records"] for report in built)
    assert trained_on + held_out == 64 and 8 <= held_out <= 24
    assert len((folder / "run" / "evaluations.jsonl").read_text().splitlines()) >= 4
    before, after = load_run(folder / "collection" / "test_run.trec"), load_run(folder / "reranked.trec")
    assert {qid: set(docs) for qid, docs in before.items()} == {qid: set(docs) for qid, docs in after.items()}
    assert "nDCG@10" in printed and "first stage" in printed


def slow_hinge(scores: list[float], ranks: list[int], margin: float) -> float:
    count = range(len(scores))
    pairs = [(i, j) for i in count for j in count if ranks[i] < ranks[j]]
    return sum(max(0.0, margin - (scores[i] - scores[j])) for i, j in pairs) / len(pairs)


def test_custom_loss(tmp_path, monkeypatch):
    run("custom_loss.py", folder=tmp_path)
    folder = tmp_path / "runs" / "custom_loss" / "run"
    objective = yaml.safe_load((folder / "recipe.yaml").read_text())["objective"]
    assert objective["ranking_loss"] == "custom_loss:hinge" and objective["ranking_loss_options"] == {"margin": 2.0}
    assert all(line["loss/train/ranking"] > 0 for line in metrics(folder / "metrics.jsonl"))

    namespace: dict = {"__name__": "custom_loss"}
    exec((EXAMPLES / "custom_loss.py").read_text(), namespace)
    scores, ranks = torch.tensor([[0.5, 2.0, -1.0], [1.0, 0.0, 99.0]]), torch.tensor([[1, 0, 1], [0, 1, 2]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    expected = [slow_hinge([0.5, 2.0, -1.0], [1, 0, 1], 2.0), slow_hinge([1.0, 0.0], [0, 1], 2.0)]
    assert namespace["hinge"](scores, ranks, mask=mask, margin=2.0).tolist() == pytest.approx(expected)


def test_lora_one_gpu(tmp_path, mistral_v3_folder):
    small = [value for value in small_run(tmp_path, mistral_v3_folder) if not value.startswith("data.train.")]
    small += ["run.max_duration=1ep", "checkpoint.export={interval: 1ep}", "model.lora.frozen_precision=fp32"]
    printed = run("lora_one_gpu.py", "records.json", *small, folder=tmp_path)
    (export,) = (tmp_path / "runs" / "lora_one_gpu" / "hf").glob("epoch_0")
    assert (export / "model.safetensors").exists() and not (export / "adapter_config.json").exists()
    assert printed.count("RankedPassage(index=") == 2


def test_s3(tmp_path):
    with s3_server() as server:
        server.client().create_bucket(Bucket="lists")
        run("s3.py", "s3://lists/demo", folder=tmp_path)
        keys = server.keys("lists")
    assert {"demo/lists/index.json", "demo/lists/build.json"} <= set(keys)
    assert any(key.startswith("demo/checkpoints/ep2-") for key in keys), sorted(keys)
    assert (tmp_path / "runs" / "s3" / "cache").is_dir()


def test_python_only(tmp_path):
    printed = run("python_only.py", folder=tmp_path)
    assert "32 lists of 4 passages in runs/python_only/lists" in printed
    assert "RerankedQuery(" in printed


def test_the_notebook_runs(tmp_path):
    """`make notebook`, at a size too small to learn anything: every code cell prints or draws, and none warns."""
    sizes = {"num_train_queries": 64, "num_test_queries": 10}
    small = ["run.max_duration=2ba", "schedule.warmup=1ba", "evaluation.interval=2ba"]
    environment = os.environ | {"DEMO_SIZES": json.dumps(sizes), "DEMO_OVERRIDES": " ".join(small), "MPLBACKEND": "agg"}
    command = [REPOSITORY / "docs" / "notebook.py", "--output", tmp_path / "demo.ipynb"]
    succeeded(run_python(command, folder=tmp_path, environment=environment))
    notebook = json.loads((tmp_path / "demo.ipynb").read_text())
    outputs = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(outputs) and [output["output_type"] for cell in outputs for output in cell].count("display_data") == 2
    text = json.dumps(outputs)
    assert "Warning" not in text and str(tmp_path) not in text
    for name in ("first stage", "untrained", "trained"):
        assert re.search(rf"{name} +0\.\d{{3}}\\n", text), name
    stored = json.loads(NOTEBOOK.read_text())
    assert [cell["source"] for cell in stored["cells"]] == [cell["source"] for cell in notebook["cells"]]


def test_the_figures_of_the_stored_notebook_are_those_of_the_readme():
    assert NOTEBOOK.stat().st_size < 300_000
    readme = (REPOSITORY / "README.md").read_text()
    rows = (rf"{name} +(0\.\d{{3}})\\n.*?" for name in ("first stage", "untrained", "trained"))
    table = re.search("".join(rows), NOTEBOOK.read_text(), re.DOTALL)
    assert table is not None
    first_stage, untrained, trained = table.groups()
    assert first_stage[1:] in readme and untrained[1:] in readme
    assert any(abs(float(figure) - float(trained)) < 0.02 for figure in re.findall(r"\.9\d\d\b", readme))
