"""How do shuffled passages and other identifiers change quality and position bias?

    python benchmarks/augmentation.py [--updates 1250] [--seeds 1] [--threads N] [key=value …]

Trains the demo's model from random weights. Its training lists are in a good order, like that of a first stage: sorted
by grade, then neighbors swapped with probability 0.3. A model can copy that order instead of reading the passages.
Held-out windows are in random order; each is ranked by its first token as presented, reversed, and in 4 more random
orders. Rows: lists as in the shards, and with `data.train.shuffle_passages`, each with letters, as in the shards, and
with numbers, converted when they are read. The tokenizer has one token per letter and per number.
"""

from __future__ import annotations

import random
from pathlib import Path

from report import restart_with_one_heap
from trained import compare

from rankllm_composer.sources.retrieval_files import load_judgments, load_run

SHUFFLED = "data.train.shuffle_passages=true"
NUMBERS = ["data.train.identifiers=numbers", "data.eval.identifiers=numbers"]
RUNS = {
    "as in the shards": [],
    "passages shuffled": [SHUFFLED],
    "letters to numbers": NUMBERS,
    "passages shuffled, letters to numbers": [SHUFFLED, *NUMBERS],
}
METRICS = (
    "first_token/ndcg@10",
    "first_token/shuffled/ndcg@10",
    "first_token/shuffled/ndcg@10_deviation",
    "first_token/shuffled/tau",
    "first_token/reversed/tau",
    "generation/ndcg@10",
)
SWAP_PROBABILITY = 0.3


def sort_by_grade(run: Path, judgments: Path, seed: int) -> None:
    """Rewrite a first-stage run in the order of the grades, with random swaps of neighbors."""
    rng, grades = random.Random(seed), load_judgments(judgments)
    lines = []
    for qid, docids in load_run(run).items():
        ordered = sorted(docids, key=lambda docid: -grades[qid][docid])
        for i in range(len(ordered) - 1):
            if rng.random() < SWAP_PROBABILITY:
                ordered[i : i + 2] = reversed(ordered[i : i + 2])
        lines += [f"{qid} Q0 {docid} {i + 1} {len(ordered) - i} ordered" for i, docid in enumerate(ordered)]
    run.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Print the table."""
    variants = {name: [*keys, "evaluation.num_shuffles=4"] for name, keys in RUNS.items()}
    compare(
        __doc__,
        "training lists",
        variants,
        METRICS,
        lambda files: sort_by_grade(files.train_run, files.judgments, seed=42),
        with_numbers=True,
    )


if __name__ == "__main__":
    restart_with_one_heap()
    main()
