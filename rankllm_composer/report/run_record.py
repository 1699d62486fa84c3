"""What a run wrote down, read back for whoever wants to look at it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankllm_composer.errors import RunError
from rankllm_composer.export.model_card import published_figures
from rankllm_composer.ranking.comparison import RerankResult
from rankllm_composer.recipe.load import RECIPE_NAME
from rankllm_composer.redaction import redact
from rankllm_composer.training.progress import read_metrics
from rankllm_composer.training.validation import EVALUATIONS_FILE, PREFIX, read_details


@dataclass(frozen=True)
class RunRecord:
    """What a run wrote down.

    Attributes:
        name: of its folder.
        recipe: its resolved recipe, without secrets.
        batches: lines of `metrics.jsonl`, one a batch.
        evaluations: (batch, figures without their prefix), oldest first.
        details: see `validation.read_details`.
        tokens_per_list: of the training lists, prompt and response; empty = not known here.
        published: see `published.published_figures`.
        reranked: what its models were measured to be worth since, on whole lists.
    """

    name: str
    recipe: str
    batches: tuple[dict[str, Any], ...]
    evaluations: tuple[tuple[int, dict[str, float]], ...]
    details: tuple[dict[str, Any], ...]
    tokens_per_list: tuple[int, ...] = ()
    published: tuple[tuple[str, float], ...] = ()
    reranked: tuple[RerankResult, ...] = ()


def read_run(folder: str | Path, tokens_per_list: Sequence[int] = ()) -> RunRecord:
    """Read a run's folder.

    Args:
        folder: of a run, also of one that is still training.
        tokens_per_list: of its training lists, where they are known.
    Raises:
        RunError: no metrics there.
    """
    folder = Path(folder)
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        raise RunError(
            f"{folder}: found no metrics.jsonl, allowed is the folder of a run; name one, or train with "
            "logging.metrics_file=true"
        )
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
    """The runs, each with what was measured of its models.

    Args:
        runs: as read.
        folders: of the runs, in the same order.
        measured: each of a model in one of the folders; where there is one run, all are its.
    Raises:
        RunError: the model is in none of several runs.
    """
    found: list[list[RerankResult]] = [[] for _ in runs]
    for one in measured:
        places = [i for i, folder in enumerate(folders) if Path(one.model).is_relative_to(Path(folder).resolve())]
        if not places and len(runs) > 1:
            raise RunError(
                f"{one.name}: found figures of the model {one.model}, allowed are models in the folders of the runs "
                f"{', '.join(map(str, folders))}; name its run, or show one run alone"
            )
        found[places[0] if places else 0].append(one)
    return [replace(run, reranked=tuple(several)) for run, several in zip(runs, found)]


def with_distinct_names(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs, those of one name numbered."""
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.name} ({names[: i + 1].count(run.name)})") if names.count(run.name) > 1 else run
        for i, run in enumerate(runs)
    ]
