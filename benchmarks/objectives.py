"""Which objective and which ranking loss, on equal compute?

    python benchmarks/objectives.py [--updates 1250] [--seeds 1] [--threads N] [--runs NAME,…]

The demo's model from random weights, on the demo's lists, once for each objective and loss: the same lists in the same
order, the same number of updates and the same learning rate, which was chosen for combined training with weighted
RankNet. Figures are of held-out windows after the last update. Losses have scales of their own and a weight each,
which is one choice (ListNet's 0.1 is the published one), not searched. What `ranking` alone writes is not a
ranking: it never learns to generate, and the client's first-token reading needs the `[` that it does not write.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from report import NUM_CORES, on_one_heap, print_columns, print_head, print_row
from trained import LISTS, places, prepare, train_once

# name: objective, ranking loss, its weight, its options
RUNS = {
    "generation": ("generation", "ranknet", 1.0, ""),
    "ranking, weighted RankNet": ("ranking", "ranknet", 1.0, "weighted: true"),
    "combined, weighted RankNet": ("combined", "ranknet", 1.0, "weighted: true"),
    "combined, RankNet": ("combined", "ranknet", 0.3, "weighted: false"),
    "combined, LambdaRank": ("combined", "lambdarank", 3.0, ""),
    "combined, ListNet": ("combined", "listnet", 0.1, ""),
    "combined, ListMLE": ("combined", "listmle", 0.1, ""),
    "combined, ADR-MSE": ("combined", "adr_mse", 0.1, ""),
}
FIGURES = ("first_token/ndcg@10", "first_token/tau", "generation/ndcg@10", "generation/malformed", "agreement/tau")


def overrides(name: str, updates: int) -> list[str]:
    """What is laid over the demo's recipe for a run."""
    objective, loss, weight, options = RUNS[name]
    return [
        f"run.max_duration={updates}ba",
        f"schedule.warmup={min(100, updates // 2)}ba",
        f"objective.name={objective}",
        f"objective.ranking_loss={loss}",
        f"objective.ranking_weight={weight}",
        f"objective.ranking_loss_options={{{options}}}",
        f"evaluation.interval={updates}ba",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=1250)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    parser.add_argument("--runs", default=";".join(RUNS))
    parser.add_argument("--queries", type=int, default=20000)
    options = parser.parse_args()
    print_head(options.threads)
    print(f"{options.updates} updates of {LISTS} lists, {options.seeds} seeds, 200 held-out windows of 4 candidates\n")
    print_columns(["objective and loss", "presented nDCG", *FIGURES])
    for name in options.runs.split(";"):
        found: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            files = prepare(folder, options.queries)
            shards = f"data.train.local={folder / 'shards'}"
            for seed in range(options.seeds):
                given = [*places(folder, files), shards, *overrides(name, options.updates), f"run.seed={seed}"]
                figures = train_once(f"seed-{seed}", folder, given, options.threads)
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
