"""A finished or running run as a page one can look at: one HTML file, with its pictures in it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankllm_composer.evaluation import DECODINGS
from rankllm_composer.progress import LOSS_PREFIX, read_metrics
from rankllm_composer.redaction import redact
from rankllm_composer.run_folder import RECIPE_NAME
from rankllm_composer.validation import EVALUATIONS_FILE, PREFIX, read_details

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f6fb4", "#d1600d", "#2a8a3e", "#b5332e", "#7a55b0", "#7d5a4f")
STYLES = {"first_token": "-", "generation": "--"}
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}th,td{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:right}"
    "th:first-child,td:first-child{text-align:left}img{max-width:100%}pre{background:#f6f6f6;padding:1rem;overflow:auto}"
)


class ReportError(ValueError):
    """A folder that holds no run."""


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
    """

    name: str
    recipe: str
    batches: tuple[dict[str, Any], ...]
    evaluations: tuple[tuple[int, dict[str, float]], ...]
    details: tuple[dict[str, Any], ...]
    tokens_per_list: tuple[int, ...] = ()


def read_run(folder: str | Path, tokens_per_list: Sequence[int] = ()) -> RunRecord:
    """Read a run's folder.

    Args:
        folder: of a run, also of one that is still training.
        tokens_per_list: of its training lists, where they are known.
    Raises:
        ReportError: no metrics there.
    """
    folder = Path(folder)
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        raise ReportError(
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
    return RunRecord(
        name=folder.resolve().name,
        recipe=redact(recipe.read_text()) if recipe.exists() else "",
        batches=tuple(line for line in lines if line["event"] == "batch"),
        evaluations=tuple(sorted(evaluations.items())),
        details=tuple(read_details(details)) if details.exists() else (),
        tokens_per_list=tuple(tokens_per_list),
    )


def write_report(runs: Sequence[RunRecord], output: str | Path, pictures: str | Path | None = None) -> list[str]:
    """Write the page.

    Args:
        runs: shown side by side.
        output: HTML file; it needs no other file and no network.
        pictures: folder for the same pictures as PNG files. None = in the page only.
    Returns:
        Names of the pictures.
    """
    drawn = {name: _png(figure) for name, figure in draw(runs).items()}
    if pictures is not None:
        Path(pictures).mkdir(parents=True, exist_ok=True)
        for name, content in drawn.items():
            _write_whole(Path(pictures, f"{name}.png"), content)
    _write_whole(Path(output), _page(runs, drawn).encode())
    return list(drawn)


def draw(runs: Sequence[RunRecord]) -> dict[str, Figure]:
    """The pictures by name; one that nothing was measured for is left out.

    losses, learning_rate, throughput: over batches. quality: nDCG@10 over batches by each decoding, beside the order as
    presented and the oracle. gains: nDCG@10 of each window above that of the order as presented, at the last
    evaluation, sorted. lengths: tokens a list. positions: share of the candidates shown at a place that are ranked at
    another, at the last evaluation with shuffled windows.
    """
    parts = sorted({name for run in runs for line in run.batches for name in line if name.startswith(LOSS_PREFIX)})
    figures = {
        "losses": _over_batches(runs, {part: part.removeprefix(LOSS_PREFIX) for part in parts}),
        "learning_rate": _over_batches(runs, {"lr": "learning rate"}),
        "throughput": _over_batches(runs, {"tokens_per_second": "tokens a second"}),
        "quality": _quality(runs),
        "gains": _gains(runs),
        "lengths": _lengths(runs),
        "positions": _positions(runs),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _new_figure(columns: int, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 4.2 * columns), height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _over_batches(runs: Sequence[RunRecord], titles: Mapping[str, str]) -> Figure | None:
    """A panel a metric, a line a run; what is no number is a gap."""
    titles = {
        name: title
        for name, title in titles.items()
        if any(line.get(name) is not None for run in runs for line in run.batches)
    }
    if not titles:
        return None
    figure, panels = _new_figure(len(titles))
    for panel, (name, title) in zip(panels, titles.items()):
        for index, run in enumerate(runs):
            points = [(line["batch"], line[name]) for line in run.batches if name in line]
            values = [float("nan") if value is None else value for _, value in points]
            panel.plot([batch for batch, _ in points], values, color=_colour(index), label=run.name)
        panel.set(title=title, xlabel="batch")
    panels[0].legend()
    return figure


def _quality(runs: Sequence[RunRecord]) -> Figure | None:
    if not any(run.evaluations for run in runs):
        return None
    figure, (panel,) = _new_figure(1, 4.0)
    for index, run in enumerate(runs):
        for decoding in DECODINGS:
            name = f"{decoding}/ndcg@10"
            points = [(batch, figures[name]) for batch, figures in run.evaluations if figures.get(name) is not None]
            if points:
                label = f"{run.name}, {decoding.replace('_', ' ')}"
                panel.plot(*zip(*points), STYLES[decoding], marker="o", color=_colour(index), label=label)
        last = run.evaluations[-1][1] if run.evaluations else {}
        for name, style in (("presented", ":"), ("oracle", "-.")):
            if (value := last.get(f"{name}/ndcg@10")) is not None:
                panel.axhline(value, linestyle=style, color=_colour(index), alpha=0.6, label=f"{run.name}, {name}")
    panel.set(title="nDCG@10 of held-out windows", xlabel="batch", ylim=(0, 1.02))
    panel.legend(fontsize="small")
    return figure


def gains(run: RunRecord, decoding: str) -> list[float]:
    """nDCG@10 by a decoding minus that of the order as presented, of each window of the last evaluation, rising."""
    if not run.details:
        return []
    windows = run.details[-1]["ndcg@10"].values()
    return sorted(window[decoding] - window["presented"] for window in windows if decoding in window)


def _gains(runs: Sequence[RunRecord]) -> Figure | None:
    shown = [(i, run, name, found) for i, run in enumerate(runs) for name in DECODINGS if (found := gains(run, name))]
    if not shown:
        return None
    figure, panels = _new_figure(len(shown))
    for panel, (index, run, decoding, values) in zip(panels, shown):
        panel.bar(range(len(values)), values, color=_colour(index), width=1.0)
        wins, losses = sum(value > 0 for value in values), sum(value < 0 for value in values)
        title = f"{run.name}, {decoding.replace('_', ' ')}: {wins} better, {losses} worse"
        panel.set(title=title, xlabel="window", ylabel="nDCG@10 above as presented")
        panel.axhline(0, color="black", linewidth=0.8)
    return figure


def _lengths(runs: Sequence[RunRecord]) -> Figure | None:
    known = [(index, run) for index, run in enumerate(runs) if run.tokens_per_list]
    if not known:
        return None
    figure, (panel,) = _new_figure(1)
    for index, run in known:
        panel.hist(run.tokens_per_list, bins=30, color=_colour(index), alpha=0.6, label=run.name)
    panel.set(title="tokens a list", xlabel="tokens", ylabel="lists")
    panel.legend()
    return figure


def _positions(runs: Sequence[RunRecord]) -> Figure | None:
    import numpy as np

    shown = []
    for run in runs:
        for decoding in DECODINGS:
            found = [details["positions"][decoding] for details in run.details if decoding in details["positions"]]
            if found:
                shown.append((f"{run.name}, {decoding.replace('_', ' ')}", np.asarray(found[-1], float)))
    if not shown:
        return None
    figure, panels = _new_figure(len(shown), 4.0)
    for panel, (title, counts) in zip(panels, shown):
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        image = panel.imshow(shares, cmap="viridis", vmin=0, vmax=max(float(shares.max()), 1e-9))
        panel.set(title=title, xlabel="ranked at place", ylabel="shown at place")
        figure.colorbar(image, ax=panel, label="share", shrink=0.8)
    return figure


def _write_whole(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def _page(runs: Sequence[RunRecord], drawn: Mapping[str, bytes]) -> str:
    names = ", ".join(run.name for run in runs)
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(names)}</title><style>{STYLE}</style></head>',
        f"<body><h1>{html.escape(names)}</h1>",
        _table(runs),
    ]
    for name, content in drawn.items():
        title = name.replace("_", " ")
        source = base64.b64encode(content).decode()
        parts.append(f'<h2>{title}</h2><img id="{name}" alt="{title}" src="data:image/png;base64,{source}">')
    for run in runs:
        summary = f"recipe of {html.escape(run.name)}"
        parts.append(f"<details><summary>{summary}</summary><pre>{html.escape(run.recipe)}</pre></details>")
    return "\n".join([*parts, "</body></html>\n"])


def _table(runs: Sequence[RunRecord]) -> str:
    rows = {run.name: dict(_last_figures(run)) for run in runs}
    columns = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    cells = [["", *rows], *([name, *(figures.get(name, "–") for figures in rows.values())] for name in columns)]
    head, *body = cells
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return "<table>" + "\n".join(lines) + "</table>"


def _last_figures(run: RunRecord) -> Iterator[tuple[str, str]]:
    """What the table tells of a run: its last batch, what was dropped, its last evaluation."""
    if run.batches:
        last = run.batches[-1]
        yield "batches", f"{last['batch']:,}"
        yield "tokens", f"{last['tokens']:,}"
        for name, value in sorted(last.items()):
            if name.startswith((LOSS_PREFIX, "data/")):
                yield name, "not a number" if value is None else f"{value:,.5g}"
    if run.evaluations:
        for name, value in run.evaluations[-1][1].items():
            yield name, "not a number" if value is None else f"{value:.4f}".removesuffix(".0000")
