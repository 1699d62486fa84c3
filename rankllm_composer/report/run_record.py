"""Read what a training run recorded in its folder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankllm_composer.errors import RunError
from rankllm_composer.export.model_card import published_figures
from rankllm_composer.options import DECODINGS
from rankllm_composer.ranking.comparison import RerankResult
from rankllm_composer.recipe.resume import RECIPE_NAME
from rankllm_composer.redaction import redact
from rankllm_composer.training.progress import LOSS_PREFIX, read_metrics
from rankllm_composer.training.validation import EVALUATIONS_FILE, PREFIX, read_details

LARGEST = 1e100
"""Numbers beyond it are taken for damage; figures cannot show them."""

_COUNTS = ("epoch", "samples", "tokens")
_FIGURES = ("lr", "batch_seconds", "tokens_per_second")
_PREFIXES = (LOSS_PREFIX, PREFIX, "data/")


@dataclass(frozen=True)
class RunRecord:
    """What a training run recorded, with its resolved recipe as text without secrets."""

    name: str
    recipe: str
    batches: tuple[dict[str, Any], ...]  # lines of metrics.jsonl: numbers, or None for NaN
    evaluations: tuple[tuple[int, dict[str, float | None]], ...]  # (batch, metrics without their prefix), oldest first
    details: tuple[dict[str, Any], ...]  # as `training.validation.read_details` returns them
    tokens_per_list: tuple[int, ...] = ()  # empty if unknown
    published: tuple[tuple[str, float], ...] = ()  # results of the recipe: (metric, value)
    reranked: tuple[RerankResult, ...] = ()
    num_damaged: int = 0  # lines and values of both files that are left out


def read_run(folder: str | Path, tokens_per_list: Sequence[int] = ()) -> RunRecord:
    """Read the folder of a run, which may still be training; raise RunError if it contains no metrics.

    Lines and values that are not what a run writes are left out and counted.
    """
    folder = Path(folder)
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        remedy = "Pass one, or train with logging.metrics_file=true."
        raise RunError(f"{folder} contains no metrics.jsonl; expected the folder of a training run. {remedy}")
    read = read_metrics(metrics)
    found = [_known(line) for line in read]
    lines = [line for line, _ in found if line]
    evaluations: dict[int, dict[str, float | None]] = {}
    for line in lines:
        figures = {name.removeprefix(PREFIX): value for name, value in line.items() if name.startswith(PREFIX)}
        if figures:
            evaluations[line["batch"]] = figures
    recipe, details = folder / RECIPE_NAME, folder / EVALUATIONS_FILE
    evaluated = [_known_details(one) for one in read_details(details)] if details.exists() else []
    num_damaged = metrics.read_bytes().count(b"\n") - len(read) + sum(num for _, num in [*found, *evaluated])
    text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else ""
    return RunRecord(
        name=folder.resolve().name,
        recipe=redact(text),
        batches=tuple(line for line in lines if line["event"] == "batch"),
        evaluations=tuple(sorted(evaluations.items())),
        details=tuple(one for one, _ in evaluated),
        tokens_per_list=tuple(tokens_per_list),
        published=tuple(published_figures(_run_name(text)).items()),
        num_damaged=num_damaged,
    )


def _known(line: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """What a run writes into a line of metrics.jsonl, empty without event and batch, and the number of other values."""
    if line.get("event") not in ("batch", "eval", "epoch") or not _is_count(line["batch"]):
        return {}, 1
    counts = {name: line[name] for name in _COUNTS if name in line}
    figures = {name: value for name, value in line.items() if name in _FIGURES or name.startswith(_PREFIXES)}
    clean = {name: value for name, value in counts.items() if _is_count(value)}
    clean |= {name: value for name, value in figures.items() if value is None or _is_number(value)}
    num_other = len(counts) + len(figures) - len(clean)
    return {"event": line["event"], "batch": line["batch"], **clean}, num_other


def _known_details(details: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """What a run writes into a line of evaluations.jsonl, and the number of other values."""
    windows, positions = (details.get(name) for name in ("ndcg@10", "positions"))
    num_other = sum(not isinstance(part, dict) for part in (windows, positions))
    clean: dict[str, Any] = {"batch": details["batch"], "ndcg@10": {}, "positions": {}}
    for window, figures in windows.items() if isinstance(windows, dict) else ():
        if isinstance(figures, dict):
            known = {name: value for name, value in figures.items() if _is_number(value)}
            clean["ndcg@10"][window] = known
            num_other += len(figures) - len(known)
        else:
            num_other += 1
    for name, counts in positions.items() if isinstance(positions, dict) else ():
        if name in DECODINGS and _is_matrix(counts):
            clean["positions"][name] = counts
        else:
            num_other += 1
    return clean, num_other


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and not (isinstance(value, float) and math.isnan(value)) and abs(value) <= LARGEST  # type: ignore[arg-type]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_matrix(counts: object) -> bool:
    if not isinstance(counts, list) or not counts or not all(isinstance(row, list) for row in counts):
        return False
    return all(len(row) == len(counts) and all(map(_is_count, row)) for row in counts)


def _run_name(recipe: str) -> str:
    import yaml

    try:
        return str(yaml.safe_load(recipe)["run"]["name"])
    except (yaml.YAMLError, KeyError, IndexError, TypeError, ValueError, RecursionError):
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
