"""Which objective and which ranking loss are best with equal compute?

    python benchmarks/objectives.py [--updates 1250] [--seeds 1] [--threads N] [--runs NAME;…] [key=value …]

Trains the demo's model from random weights on the demo's lists, once per objective and loss: the same lists in the same
order, the same number of updates and the same learning rate, which was chosen for combined training with weighted
RankNet. Metrics are of held-out windows after the last update. Losses differ in scale; the weight of each is one choice
(ListNet's 0.1 is the published one), without a search. `ranking` alone does not learn to generate a ranking, nor to
write the `[` that the first-token decoding of rank_llm 0.25.7 needs; 0.26.0 appends it.

Each `key=value` overrides the recipe of every run.
"""

from __future__ import annotations

from report import restart_with_one_heap
from trained import compare

# name: objective, ranking loss, weight of the loss, options of the loss
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
METRICS = ("first_token/ndcg@10", "first_token/tau", "generation/ndcg@10", "generation/malformed", "agreement/tau")


def overrides(objective: str, loss: str, weight: float, options: str) -> list[str]:
    """Return the recipe overrides of a run."""
    return [
        f"objective.name={objective}",
        f"objective.ranking_loss={loss}",
        f"objective.ranking_weight={weight}",
        f"objective.ranking_loss_options={{{options}}}",
    ]


def main() -> None:
    """Print the table."""
    compare(__doc__, "objective and loss", {name: overrides(*settings) for name, settings in RUNS.items()}, METRICS)


if __name__ == "__main__":
    restart_with_one_heap()
    main()
