"""Read what a training run recorded in its folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankllm_composer.errors import RunError
from rankllm_composer.export.model_card import published_figures
from rankllm_composer.ranking.comparison import RerankResult
from rankllm_composer.recipe.resume import RECIPE_NAME
from rankllm_composer.redaction import redact
from rankllm_composer.training.progress import read_metrics
from rankllm_composer.training.validation import EVALUATIONS_FILE, PREFIX, read_details


@dataclass(frozen=True)
class RunRecord:
    """What a training run recorded, with its resolved recipe as text without secrets."""

    name: str
    recipe: str
    batches: tuple[dict[str, Any], ...]  # lines of metrics.jsonl
    evaluations: tuple[tuple[int, dict[str, float]], ...]  # (batch, metrics without their prefix), oldest first
    details: tuple[dict[str, Any], ...]  # as `training.validation.read_details` returns them
    tokens_per_list: tuple[int, ...] = ()  # empty if unknown
    published: tuple[tuple[str, float], ...] = ()  # results of the recipe: (metric, value)
    reranked: tuple[RerankResult, ...] = ()


def read_run(folder: str | Path, tokens_per_list: Sequence[int] = ()) -> RunRecord:
    """Read the folder of a run, which may still be training; raise RunError if it contains no metrics."""
    folder = Path(folder)
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        remedy = "Pass one, or train with logging.metrics_file=true."
        raise RunError(f"{folder} contains no metrics.jsonl; expected the folder of a training run. {remedy}")
    lines = read_metrics(metrics)
    evaluations: dict[int, dict[str, float]] = {}
    for line in lines:
        figures = {name.removeprefix(PREFIX): value for name, value in line.items() if name.startswith(PREFIX)}
        if figures:
            evaluations[line["batch"]] = figures
    recipe, details = folder / RECIPE_NAME, folder / EVALUATIONS_FILE
    text = recipe.read_text(encoding="utf-8") if recipe.exists() else ""
    return RunRecord(
        name=folder.resolve().name,
        recipe=redact(text),
        batches=tuple(line for line in lines if line["event"] == "batch"),
        evaluations=tuple(sorted(evaluations.items())),
        details=tuple(read_details(details)) if details.exists() else (),
        tokens_per_list=tuple(tokens_per_list),
        published=tuple(published_figures(_run_name(text)).items()),
    )


def _run_name(recipe: str) -> str:
    import yaml

    try:
        return str(yaml.safe_load(recipe)["run"]["name"])
    except (yaml.YAMLError, KeyError, TypeError):
        return ""


def with_reranked(
    runs: Sequence[RunRecord], folders: Sequence[str | Path], measured: Iterable[RerankResult]
) -> list[RunRecord]:
    """Assign reranking results to the runs in whose folders their models are; a single run gets all of them.

    Raises:
        RunError: a model is in the folder of no run.
    """
    found: list[list[RerankResult]] = [[] for _ in runs]
    for one in measured:
        places = [i for i, folder in enumerate(folders) if Path(one.model).is_relative_to(Path(folder).resolve())]
        if not places and len(runs) > 1:
            raise RunError(
                f"{one.name} contains results of the model {one.model}; expected a model in the folders of the runs "
                f"{', '.join(map(str, folders))}. Add its run, or report on one run only."
            )
        found[places[0] if places else 0].append(one)
    return [replace(run, reranked=tuple(several)) for run, several in zip(runs, found)]


def with_distinct_names(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Number runs that have the same name."""
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.name} ({names[: i + 1].count(run.name)})") if names.count(run.name) > 1 else run
        for i, run in enumerate(runs)
    ]
