"""The rules between the keys of `evaluation`, and of the exports that it chooses from."""

from __future__ import annotations

from collections.abc import Iterator

from rankllm_composer.errors import Problem
from rankllm_composer.recipe.keys import show
from rankllm_composer.recipe.sections import Evaluation, Export


def evaluation_problems(evaluation: Evaluation, export: Export | None) -> Iterator[Problem]:
    """Yield what contradicts in the section `evaluation`."""
    key = "evaluation.decodings"
    if not evaluation.decodings:
        yield Problem(
            "evaluation.decodings", "[]", "first_token, generation or both", "Name one, or set evaluation: null."
        )
    for name, value, needed, expected in (
        ("num_shuffles", evaluation.num_shuffles, "first_token", "0"),
        ("constrained", evaluation.constrained, "generation", "false"),
    ):
        if value and needed not in evaluation.decodings:
            found = f"{show(value)} without {needed} in {key}"
            yield Problem(f"evaluation.{name}", found, expected, f"Remove it, or add {needed}.", (key,))
    if evaluation.best_by is None:
        if evaluation.patience is not None:
            yield Problem("evaluation.patience", show(evaluation.patience), "null without best_by", "Set best_by.")
        return
    metrics = [f"{name}/{metric}" for name in evaluation.decodings for metric in ("ndcg@10", "mrr@10", "tau")]
    if evaluation.best_by not in metrics:
        expected = f"one of {', '.join(metrics)}, or null" if metrics else "null"
        yield Problem("evaluation.best_by", f"'{evaluation.best_by}'", expected, "Choose one, or null.", (key,))
    if export is None or export.interval != evaluation.interval:
        found = "set, but exports and evaluations are at different times" if export else "set without exports"
        expected = "null, or checkpoint.export.interval equal to evaluation.interval"
        involved = ("checkpoint.export.interval", "evaluation.interval")
        yield Problem("evaluation.best_by", found, expected, "Export when the model is evaluated.", involved)
