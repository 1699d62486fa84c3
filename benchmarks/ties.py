"""Is a list with equal grades better learned as ties or in the order in which it is written?

    python benchmarks/ties.py [--updates 1250] [--seeds 1] [--threads N] [--runs NAME;…] [key=value …]

Trains the demo's model from random weights. Its training lists have two grades, relevant and not, so that a third of
the pairs is tied. Their equals are in the order of the first stage, which is random here: with `ties: ordered` the
model has to learn what nothing on the page decides. Held-out windows keep their four grades.
"""

from __future__ import annotations

from pathlib import Path

from report import restart_with_one_heap
from trained import compare

OBJECTIVES = ("combined", "generation", "ranking")
RUNS = {
    f"{name}, {ties}": [f"objective.name={name}", f"objective.ties={ties}", "evaluation.num_shuffles=4"]
    for name in OBJECTIVES
    for ties in ("tied", "ordered")
}
METRICS = ("first_token/ndcg@10", "first_token/shuffled/tau", "generation/ndcg@10", "generation/malformed")
NUM_GRADES = 2


def merge_grades(judgments: Path) -> None:
    """Rewrite the judgments of training queries with two grades: the upper half is relevant."""
    lines = []
    for line in judgments.read_text().splitlines():
        qid, iteration, docid, grade = line.split()
        merged = int(int(grade) >= NUM_GRADES) if docid.startswith("train") else grade
        lines.append(f"{qid} {iteration} {docid} {merged}")
    judgments.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Print the table."""
    compare(__doc__, "objective, ties", RUNS, METRICS, lambda files: merge_grades(files.judgments))


if __name__ == "__main__":
    restart_with_one_heap()
    main()
