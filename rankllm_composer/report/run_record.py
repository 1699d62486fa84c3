"""Read what a training run recorded in its folder."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeGuard

from rankllm_composer.errors import ModelError, RunError
from rankllm_composer.options import DECODINGS
from rankllm_composer.ranking.comparison import FIGURES_SUFFIX, RerankResult, read_rerank_result
from rankllm_composer.recipe.resume import RECIPE_NAME
from rankllm_composer.redaction import redact
from rankllm_composer.report.wording import decoding_name, duration
from rankllm_composer.storage.content import EXPORT_FILE, read_content
from rankllm_composer.training.run_files import (
    EVALUATIONS_FILE,
    HISTORY_FILE,
    LOSS_PREFIX,
    METRICS_FILE,
    PREFIX,
    read_details,
    read_history,
    read_metrics,
)

LARGEST = 1e100
"""Numbers beyond it are taken for damage; figures cannot show them."""

_EXPORT = re.compile(r"(epoch|batch)_\d+|best")
_COUNTS = ("epoch", "samples", "tokens")
_FIGURES = ("lr", "batch_seconds", "tokens_per_second")
_PREFIXES = (LOSS_PREFIX, PREFIX, "data/")


@dataclass(frozen=True)
class Origin:
    """Where a run comes from, by its history; empty where that does not say."""

    date: str = ""  # of its start
    took: str = ""  # from its starts to its ends, in words
    machine: str = ""
    num_ranks: int = 1
    num_starts: int = 1
    versions: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    parameters: int = 0
    trained_parameters: int = 0
    data: tuple[str, ...] = ()
    lists_per_epoch: int = 0


@dataclass(frozen=True)
class RunRecord:
    """What a training run recorded, with its resolved recipe as text without secrets."""

    name: str
    recipe: str
    batches: tuple[dict[str, Any], ...]  # lines of metrics.jsonl: numbers, or None for NaN
    evaluations: tuple[tuple[int, dict[str, float | None]], ...]  # (batch, metrics without their prefix), oldest first
    details: tuple[dict[str, Any], ...]  # as `training.validation.read_details` returns them
    origin: Origin = field(default_factory=Origin)
    objective: str = ""  # in words; empty if the recipe does not say
    tokens_per_list: tuple[int, ...] = ()  # empty if unknown
    published: tuple[tuple[str, float], ...] = ()  # results of such a model: (metric, value)
    reranked: tuple[RerankResult, ...] = ()
    exports: frozenset[str] = frozenset()  # names of folders with a model that the run trained
    best_export: str = ""  # name of the one that was chosen; empty if none was
    num_damaged: int = 0  # lines, values and results that are left out

    @property
    def training_seconds(self) -> float:
        """Duration of all updates."""
        return sum(line.get("batch_seconds") or 0.0 for line in self.batches)

    def is_trained(self, measured: RerankResult) -> bool:
        """Whether a result is of a model that the run trained, and not of a baseline such as its untrained model."""
        return _EXPORT.fullmatch(Path(measured.model).name) is not None or Path(measured.model).name in self.exports

    def model_name(self, measured: RerankResult) -> str:
        """The model of a result and its decoding, in words."""
        return f"{Path(measured.model).name}, {decoding_name(measured.decoding)}"


def read_run(folder: str | Path) -> RunRecord:
    """Read the folder of a run, which may still be training, or a copy; raise RunError if it contains no metrics.

    Lines and values that are not what a run writes are left out and counted. Results of `rerank --qrels` in the folder,
    or up to two folders further down, belong to the run.
    """
    folder = Path(folder)
    metrics = folder / METRICS_FILE
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
    reranked, num_other = _results_in(folder)
    num_damaged = metrics.read_bytes().count(b"\n") - len(read) + sum(num for _, num in [*found, *evaluated])
    text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else ""
    history = list(read_history(folder / HISTORY_FILE))
    best = folder / "hf" / "best"
    return RunRecord(
        name=folder.resolve().name,
        recipe=redact(text),
        batches=tuple(line for line in lines if line["event"] == "batch"),
        evaluations=tuple(sorted(evaluations.items())),
        details=tuple(one for one, _ in evaluated),
        origin=_origin(history),
        objective=_objective(text),
        tokens_per_list=_lengths(history),
        published=tuple(_published(history)),
        reranked=reranked,
        exports=frozenset(_exports_in(folder)),
        best_export=best.resolve().name if best.is_symlink() else "",
        num_damaged=num_damaged + num_other,
    )


def _results_in(folder: Path) -> tuple[tuple[RerankResult, ...], int]:
    """Results of reranking in a folder and up to two below it, and the number of files that are none."""
    found, num_other = [], 0
    for depth in ("", "*/", "*/*/"):
        for path in sorted(folder.glob(f"{depth}*{FIGURES_SUFFIX}")):
            try:
                found.append(read_rerank_result(path))
            except RunError:
                num_other += 1
    return tuple(found), num_other


def _exports_in(folder: Path) -> Iterator[str]:
    """Names of the folders with a trained model, in a run's folder and one below it."""
    for depth in ("*", "*/*"):
        for path in folder.glob(f"{depth}/{EXPORT_FILE}"):
            with suppress(ModelError):
                content = read_content(path.parent)
                if content is not None and content.batch > 0:
                    yield path.parent.name


def _origin(history: Sequence[Mapping[str, Any]]) -> Origin:
    """What the lines of a history say, each where it is of the right kind."""
    starts = [line for line in history if line.get("event") == "start"]
    if not starts:
        return Origin()

    def text(value: object) -> str:
        return value if isinstance(value, str) else ""

    last, first = starts[-1], _time(starts[0])
    seconds, open_since, is_whole = 0.0, None, True
    for line in history:
        if line.get("event") == "start":
            is_whole = is_whole and open_since is None  # the one before ended without a line: it was killed
            open_since = _time(line)
        elif line.get("event") == "end" and open_since is not None and (end := _time(line)) is not None:
            seconds += (end - open_since).total_seconds()
            open_since = None
    named, data = last.get("versions"), last.get("data")
    numbers = {name: last.get(name) for name in ("parameters", "trained_parameters", "lists_per_epoch", "ranks")}
    count = {name: value if _is_count(value) else 0 for name, value in numbers.items()}
    return Origin(
        date="" if first is None else f"{first:%-d %B %Y, %H:%M} UTC",
        took=duration(seconds) if seconds > 0 and is_whole and open_since is None else "",
        machine=text(last.get("machine")),
        num_ranks=count["ranks"] or 1,
        num_starts=len(starts),
        versions={str(name): text(one) for name, one in named.items()} if isinstance(named, dict) else {},
        model=text(last.get("model")) or ("trained from random weights" if "model" in last else ""),
        parameters=count["parameters"],
        trained_parameters=count["trained_parameters"],
        data=tuple(filter(None, map(text, data))) if isinstance(data, list) else (),
        lists_per_epoch=count["lists_per_epoch"],
    )


def _time(line: Mapping[str, Any]) -> datetime | None:
    """Time of a line of a history, in UTC."""
    try:
        return datetime.fromisoformat(line["time"]).astimezone(timezone.utc)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _lengths(history: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    lines = [line.get("tokens") for line in history if line.get("event") == "lengths"]
    found = [tokens for tokens in lines if isinstance(tokens, list)]
    return tuple(length for length in found[-1] if _is_count(length)) if found else ()


def _objective(recipe: str) -> str:
    """Objective and ranking loss of a recipe, in words."""
    import yaml

    try:
        objective = yaml.safe_load(recipe)["objective"]
        name, loss = objective["name"], objective["ranking_loss"]
        options = ", ".join(f"{key}={value}" for key, value in (objective.get("ranking_loss_options") or {}).items())
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, ValueError, RecursionError):
        return ""
    if name == "generation":
        return f"{name}: language modeling of the permutation"
    return f"{name}, with {loss}{f' ({options})' if options else ''}"


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


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_matrix(counts: object) -> bool:
    if not isinstance(counts, list) or not counts or not all(isinstance(row, list) for row in counts):
        return False
    return all(len(row) == len(counts) and all(map(_is_count, row)) for row in counts)


def _published(history: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Published results of such a model, as the run recorded them when it started."""
    starts = [line for line in history if line.get("event") == "start"]
    known = starts[-1].get("published") if starts else None
    for name, value in known.items() if isinstance(known, dict) else ():
        if _is_number(value):
            yield name, value


def with_reranked(
    runs: Sequence[RunRecord], folders: Sequence[str | Path], measured: Iterable[RerankResult]
) -> list[RunRecord]:
    """Assign reranking results to the runs in whose folders their models are; a single run gets all of them.

    Raises:
        RunError: a model is in the folder of no run.
    """
    found = [list(run.reranked) for run in runs]
    for one in measured:
        places = [i for i, folder in enumerate(folders) if Path(one.model).is_relative_to(Path(folder).resolve())]
        if not places and len(runs) > 1:
            raise RunError(
                f"{one.name} contains results of the model {one.model}; expected a model in the folders of the runs "
                f"{', '.join(map(str, folders))}. Add its run, or report on one run only."
            )
        mine = found[places[0] if places else 0]
        if one not in mine:
            mine.append(one)
    return [replace(run, reranked=tuple(several)) for run, several in zip(runs, found)]


def with_distinct_names(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Number runs that have the same name."""
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.name} ({names[: i + 1].count(run.name)})") if names.count(run.name) > 1 else run
        for i, run in enumerate(runs)
    ]
