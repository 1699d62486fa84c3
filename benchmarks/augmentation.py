"""What does showing lists otherwise change: in quality, and in how much the order shown decides?

    python benchmarks/augmentation.py [--updates 1250] [--seeds 1] [--threads N]

The demo's model from random weights. Its training lists come in a good order, as a first stage gives them: sorted by
grade, then neighbours swapped with probability 0.3. A model can copy that order instead of reading. Held-out windows
come in an order drawn by chance; each is ranked by the first token as shown, reversed, and in 4 more random orders.
Rows: as the shards hold the lists, and with `data.train.shuffle_passages`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path

from report import NUM_CORES, on_one_heap, print_columns, print_head, print_row
from trained import LISTS, places, prepare, train_once

from rankllm_composer.retrieval import load_judgments, load_run

RUNS = {
    "as the shards hold them": [],
    "passages shuffled": ["data.train.shuffle_passages=true"],
}
FIGURES = (
    "first_token/ndcg@10",
    "first_token/shuffled/ndcg@10",
    "first_token/shuffled/ndcg@10_deviation",
    "first_token/shuffled/tau",
    "first_token/reversed/tau",
    "generation/ndcg@10",
)
SWAP = 0.3


def order_well(run: Path, judgments: Path, seed: int) -> None:
    """Rewrite a run so that its order is that of the grades, but for swaps of neighbours."""
    source, grades = random.Random(seed), load_judgments(judgments)
    lines = []
    for qid, docids in load_run(run).items():
        ordered = sorted(docids, key=lambda docid: -grades[qid][docid])
        for place in range(len(ordered) - 1):
            if source.random() < SWAP:
                ordered[place : place + 2] = reversed(ordered[place : place + 2])
        lines += [f"{qid} Q0 {docid} {i + 1} {len(ordered) - i} ordered" for i, docid in enumerate(ordered)]
    run.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=1250)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    parser.add_argument("--queries", type=int, default=20000)
    parser.add_argument("--runs", default=";".join(RUNS))
    options = parser.parse_args()
    print_head(options.threads)
    print(f"{options.updates} updates of {LISTS} lists, {options.seeds} seeds, 200 held-out windows of 4 candidates\n")
    print_columns(["training lists", "presented nDCG", *FIGURES])
    for name in options.runs.split(";"):
        found: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            files = prepare(folder, options.queries)
            order_well(files.train_run, files.judgments, seed=42)
            given = [
                *places(folder, files),
                f"data.train.local={folder / 'shards'}",
                f"run.max_duration={options.updates}ba",
                f"schedule.warmup={min(100, options.updates // 2)}ba",
                f"evaluation.interval={options.updates}ba",
                "evaluation.num_shuffles=4",
                *RUNS[name],
            ]
            for seed in range(options.seeds):
                figures = train_once(f"seed-{seed}", folder, [*given, f"run.seed={seed}"], options.threads)
                for key in ("presented/ndcg@10", *FIGURES):
                    if key in figures:
                        found.setdefault(key, []).append(figures[key])
        cells = [
            f"{statistics.mean(found[key]):.3f}" if key in found else "–" for key in ("presented/ndcg@10", *FIGURES)
        ]
        print_row([name, *cells])


if __name__ == "__main__":
    on_one_heap()
    main()
