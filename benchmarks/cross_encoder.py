"""How good is a cross-encoder of sentence-transformers around the same model, on the same lists, in the same time?

    python benchmarks/cross_encoder.py --folder runs/smollm2 --minutes M [--seeds 1 2] [--lr 2e-5] [--tested]

Requires sentence-transformers 6 (pip install sentence-transformers accelerate) and the folder that `smollm2.py`
wrote: its model, collections and shards of judged lists. The cross-encoder is made from the same model, and scores a
query and a passage by themselves, by the logits of "yes" and "no" after them, as the library reads causal language
models. It is trained with LambdaLoss (NDCG-Loss2++), which by the documentation generally outperforms the other
listwise losses, for `--minutes` minutes: what both trainings of a seed take in `smollm2.py`. Then it reranks the same
candidates of the development queries, by which `--lr` is to be chosen, and with `--tested` those of the test sets.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from report import NUM_CORES, print_header, print_machine, restart_with_one_heap
from smollm2 import CHOSEN, COMPARISON, RECIPE, TESTED, print_comparison

from rankllm_composer.recipe.load import load_recipe
from rankllm_composer.shards.read import SplitRecords
from rankllm_composer.sources.retrieval_files import load_documents, load_queries, load_run

MAX_TOKENS = 96


def read_lists(folder: Path) -> dict[str, list[Any]]:
    """The lists of a folder of shards as the columns that the trainer of sentence-transformers expects."""
    columns: dict[str, list[Any]] = {"query": [], "docs": [], "labels": []}
    for record in SplitRecords([(str(folder), None)]):
        assert record.grades is not None
        columns["query"].append(record.turn.query)
        columns["docs"].append(list(record.turn.passages))
        columns["labels"].append([float(grade or 0) for grade in record.grades])
    return columns


def train(folder: Path, model: Any, lists: dict[str, list[Any]], lr: float, minutes: float, seed: int) -> float:
    """Train for a number of minutes, and return the number of epochs that they were enough for."""
    from datasets import Dataset
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import LambdaLoss
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Ends the training; the learning rate falls with the share of the time."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            share = (time.monotonic() - self.began) / (60 * minutes)
            for group in given["optimizer"].param_groups:
                group["lr"] = lr * min(1.0, 10 * share) * max(0.1, 1 - 0.9 * share)
            control.should_training_stop = share >= 1

    arguments = CrossEncoderTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=100,
        per_device_train_batch_size=16,
        learning_rate=lr,
        lr_scheduler_type="constant",
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=20,
    )
    trainer = CrossEncoderTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(lists),
        loss=LambdaLoss(model, mini_batch_size=16),
        callbacks=[Clock()],
    )
    trainer.train()
    return float(trainer.state.epoch or 0)


def rerank(model: Any, collection: Path, prefix: str, top_k: int) -> dict[str, list[str]]:
    """Sort the first candidates of BM25 by the model's scores."""
    first = load_run(collection / f"{prefix}bm25_top100.trec")
    texts = load_documents(collection / "docs.jsonl", {docid for docids in first.values() for docid in docids[:top_k]})
    queries, ranked = load_queries(collection / f"{prefix}queries.jsonl"), {}
    for qid, docids in first.items():
        scores = model.predict([(queries[qid], texts[docid]) for docid in docids[:top_k]], show_progress_bar=False)
        order = sorted(range(len(scores)), key=lambda place: -scores[place])
        ranked[qid] = [docids[place] for place in order] + docids[top_k:]
    return ranked


def main() -> None:
    """Train every seed, rerank, print the table."""
    from sentence_transformers import CrossEncoder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tested", action="store_true", help="rerank the test sets, once everything is chosen")
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    options = parser.parse_args()
    print_machine(options.threads, "fp32")
    torch.set_num_threads(options.threads)
    lists, config = read_lists(options.folder / "train"), load_recipe(RECIPE).model.config_overrides
    sets = {"NFCorpus, dev": CHOSEN} | (TESTED if options.tested else {})
    print_header(["queries", "system", "epochs", *COMPARISON], num_text=2)
    for seed in options.seeds:
        torch.manual_seed(seed)
        model = CrossEncoder(
            str(options.folder / "model"), num_labels=1, max_length=MAX_TOKENS, config_kwargs=config, device="cpu"
        )
        epochs = train(options.folder / f"cross-encoder-{seed}", model, lists, options.lr, options.minutes, seed)
        for label, (name, prefix) in sets.items():
            collection = options.folder / "collections" / name
            ranked = rerank(model, collection, prefix, options.top_k)
            print_comparison([label, f"cross-encoder, seed {seed}", f"{epochs:.1f}"], collection, prefix, ranked)


if __name__ == "__main__":
    restart_with_one_heap()
    main()
