"""Assembly of a run from a recipe, and errors before training starts."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.launching import ON_CPU, REPOSITORY, TRAIN, metrics, succeeded, train
from support.small_run import mark_trained

from rankllm_composer.errors import RunError
from rankllm_composer.prompts.contract import read_contract
from rankllm_composer.recipe.load import load_recipe, recipe_to_yaml
from rankllm_composer.recipe.resume import check_same_recipe, read_changes
from rankllm_composer.train import main
from rankllm_composer.training.assembly import build_optimizer, choose_device
from rankllm_composer.training.run import claim_run_folder, prepare_shards

FIRST_MISTRAL = REPOSITORY / "yamls" / "first_mistral.yaml"


@pytest.fixture()
def model_folder(tmp_path, golden, mistral_v3_folder):
    """The golden tiny Mistral with its tokenizer."""
    folder = tmp_path / "base"
    shutil.copytree(mistral_v3_folder, folder)
    for path in (golden / "tiny_mistral").iterdir():
        shutil.copy(path, folder)
    return folder


def test_help_shows_every_key():
    shown = subprocess.run([sys.executable, TRAIN, "--help"], capture_output=True, text=True, check=True).stdout
    assert "rankllm-composer train RECIPE [-n PROCESSES]" in shown and "composer -n PROCESSES train.py RECIPE " in shown
    for key in ("run.max_duration", "objective.ranking_weight", "parallelism.fsdp", "data.train.source"):
        assert key in shown
    assert main([]) == 2


def test_errors_are_one_readable_message(tmp_path, capsys):
    assert main([str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml" in capsys.readouterr().err
    assert main([str(FIRST_MISTRAL), "optimizer.lt=1"]) == 2
    assert "Did you mean" in capsys.readouterr().err


def test_a_missing_gpu_is_an_error():
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(RunError, match=r"parallelism\.device is gpu, but this machine has no CUDA device"):
        choose_device("gpu")


def test_missing_shards_name_the_command_that_builds_them(tmp_path):
    recipe = load_recipe(FIRST_MISTRAL, [f"data.train.local={tmp_path / 'shards'}", "data.train.source=null"])
    with pytest.raises(RunError, match=r"data\.train: no shards in .*rankllm-composer shards build --input"):
        prepare_shards(recipe.data.train, "data.train")


def test_the_optimizer_is_the_one_in_the_recipe(monkeypatch):
    recipe = load_recipe(FIRST_MISTRAL)
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer(recipe, model)
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW and group["params"] == [model.weight]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (5e-6, (0.9, 0.999), 1e-8, 0.0)
    eight_bit = dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, name="adamw_8bit"))
    installed = SimpleNamespace(AdamW8bit=lambda weights, **options: (weights, options))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=installed))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", installed)
    weights, options = build_optimizer(eight_bit, model)
    assert weights == [model.weight]
    assert options == {"lr": 5e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def test_only_one_run_can_lock_a_run_folder(tmp_path):
    text = recipe_to_yaml(load_recipe(FIRST_MISTRAL))
    with (
        claim_run_folder(tmp_path / "run", text),
        pytest.raises(RunError, match="another process is training in"),
        claim_run_folder(tmp_path / "run", text),
    ):
        pass
    with claim_run_folder(tmp_path / "run", text):
        assert (tmp_path / "run" / "recipe.yaml").read_text() == text
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == load_recipe(FIRST_MISTRAL)


def test_a_run_folder_refuses_another_recipe(tmp_path):
    with claim_run_folder(tmp_path, recipe_to_yaml(load_recipe(FIRST_MISTRAL, ["optimizer.lr=1"]))):
        pass  # leaves nothing that another recipe would mix with
    with claim_run_folder(tmp_path, recipe_to_yaml(load_recipe(FIRST_MISTRAL))):
        mark_trained(tmp_path)
    longer = load_recipe(FIRST_MISTRAL, ["run.max_duration=4ep", "logging.progress=false", "data.num_workers=5"])
    with claim_run_folder(tmp_path, recipe_to_yaml(longer)):
        pass
    other = load_recipe(FIRST_MISTRAL, ["optimizer.lr=1e-4", "objective.ranking_weight=3"])
    with (
        pytest.raises(RunError, match=r"ranking_weight was 10\.0, is now 3\.0; optimizer\.lr was 5e-06"),
        claim_run_folder(tmp_path, recipe_to_yaml(other)),
    ):
        pass
    accepted = load_recipe(FIRST_MISTRAL, ["optimizer.lr=1e-4", "run.accept_changes=[optimizer.lr]"])
    with claim_run_folder(tmp_path, recipe_to_yaml(accepted)):
        assert read_changes(tmp_path) == ("after batch 0: optimizer.lr was 5e-06, is now 0.0001",)


@given(text=st.text(max_size=40) | st.sampled_from(["", "[]", "a: [", "a: &x [*x]", "${a}", "run: 3", "? [1]", "\0"]))
def test_any_damaged_recipe_in_a_run_folder_is_a_run_error(text):
    with pytest.raises(RunError, match=r"^here holds a (damaged recipe\.yaml|run of another recipe)"):
        check_same_recipe(text, "run:\n  name: x\n", "here")


@pytest.mark.slow
def test_one_rank_without_sharding_builds_its_shards_from_retrieval_files(tmp_path, model_folder):
    """From a first-stage run, judgments, queries and documents to an exported folder, in one command."""
    rows = [
        {"docid": f"d{i}", "title": "", "text": f"passage {i} about {'boats' if i % 3 else 'trams'}"} for i in range(12)
    ]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    queries = [{"qid": f"q{i}", "text": f"query {i} on trams"} for i in range(8)]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    (tmp_path / "run.trec").write_text(
        "\n".join(f"q{q} Q0 d{(q + r) % 12} {r + 1} {12 - r} bm25" for q in range(8) for r in range(12))
    )
    (tmp_path / "qrels.trec").write_text("\n".join(f"q{q} 0 d{3 * d} {d % 3 + 1}" for q in range(8) for d in range(4)))
    source = textwrap.dedent("""{run: run.trec, judgments: qrels.trec, queries: queries.jsonl, docs: docs.jsonl,
        window: 5, stride: 3, lists_per_query: 2}""").replace("\n", "")
    overlay = [
        *ON_CPU,
        "run.folder=run",
        f"model.name_or_path={model_folder}",
        "data.train.local=shards",
        f"data.train.source={source}",
        "data.max_length_tokens=1024",
        "batch.global_lists=4",
        "batch.microbatch_tokens=1024",
        "parallelism.fsdp=false",
        "parallelism.precision=amp_bf16",
        "run.max_duration=1ep",
        "schedule.warmup=1ba",
    ]
    output = succeeded(train(FIRST_MISTRAL, *overlay, folder=tmp_path, ranks=1))
    assert "epoch 1/1  batch 4/4" in output
    assert len(metrics(tmp_path / "run" / "metrics.jsonl")) == 4
    exported = load_file(tmp_path / "run" / "hf" / "epoch_0" / "model.safetensors")
    assert {weight.dtype for weight in exported.values()} == {torch.bfloat16}
    contract = read_contract(tmp_path / "run" / "hf" / "epoch_0")
    assert (contract.identifiers, contract.window_size, contract.stride) == (tuple("ABCDE"), 5, 3)
    card = (tmp_path / "run" / "hf" / "epoch_0" / "README.md").read_text()
    assert "| lists trained | 16 in epochs of 16; 0 too long in the last epoch |" in card
    assert "| data | run.trec |" in card
    assert "epoch 1: 16 lists trained, 0 left out as longer than data.max_length_tokens" in output

    refused = train(FIRST_MISTRAL, *overlay, "optimizer.lr=1e-4", folder=tmp_path, ranks=1)
    assert refused.returncode != 0 and "holds a run of another recipe" in refused.stdout + refused.stderr


@pytest.mark.slow
def test_cranfield_through_two_sharded_ranks(tmp_path, shared, model_folder):
    """Real abstracts, queries, judgments and BM25 lists: shards, FSDP2 on two ranks, export."""
    cranfield = shared / "data" / "cranfield"
    files = {"run": "bm25_top100.trec", "judgments": "qrels.trec", "queries": "queries.jsonl", "docs": "docs.jsonl"}
    source = ", ".join(f"{key}: {cranfield / name}" for key, name in files.items())
    overlay = [
        *ON_CPU,
        "run.folder=run",
        f"model.name_or_path={model_folder}",
        "data.train.local=shards",
        f"data.train.source={{{source}, window: 5, stride: 5, max_passage_words: 60}}",
        "data.max_length_tokens=2048",
        "batch.global_lists=32",
        "batch.microbatch_tokens=4096",
        "run.max_duration=3ba",
        "schedule.warmup=1ba",
    ]
    succeeded(train(FIRST_MISTRAL, *overlay, folder=tmp_path))
    losses = [line["loss/train/total"] for line in metrics(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    (exported,) = Path(tmp_path, "run", "hf").iterdir()
    assert (exported / "reranker.json").exists() and exported.name == "batch_3"
