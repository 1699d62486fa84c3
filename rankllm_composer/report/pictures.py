"""Draw the figures of the report: metrics over batches, windows, queries and positions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rankllm_composer.escaping import for_figure
from rankllm_composer.options import DECODINGS
from rankllm_composer.training.progress import LOSS_PREFIX

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from rankllm_composer.report.run_record import RunRecord

COLORS = ("#1f6fb4", "#d1600d", "#2a8a3e", "#b5332e", "#7a55b0", "#7d5a4f")
GREY = "#555555"
STYLES = {"first_token": "-", "generation": "--"}
BOUNDS = {"presented": ":", "chance": (0, (1, 4)), "oracle": "-."}
HALF_PAGE, FULL_PAGE = 4.6, 9.3  # width in inches
MIN_BATCHES_TO_SMOOTH = 100
MAX_PANELS = 60  # of a figure: the first ones, because an image has a largest size

# Name → (title, caption), in the order of the page.
CAPTIONS = {
    "quality": (
        "Ranking quality",
        "nDCG@10 of held-out windows by decoding. Gray: the presented, a random and the best possible order.",
    ),
    "gains": (
        "Gain per window",
        "nDCG@10 of each held-out window minus that of the presented order, at the last evaluation, sorted.",
    ),
    "reranked": ("Gain per query", "Metric of each reranked query minus that of the first stage, sorted."),
    "positions": (
        "Position bias",
        "Share of the candidates presented at a position (row) that are ranked at a position (column), at the last "
        "evaluation with shuffled windows. Uniform: no bias. Diagonal: the model repeats the presented order.",
    ),
    "losses": ("Losses", "Parts of the loss, unweighted, and their weighted total. Thick: running mean."),
    "learning_rate": ("Learning rate", "Learning rate per update."),
    "throughput": ("Throughput", "Training tokens per second, over all ranks."),
    "lengths": ("List lengths", "Tokens per training list, prompt and response."),
}


def draw(runs: Sequence[RunRecord]) -> dict[str, Figure]:
    """Draw the figures of CAPTIONS for which there are measurements."""
    runs = [replace(run, name=for_figure(run.name)) for run in runs]
    parts = sorted({name for run in runs for line in run.batches for name in line if name.startswith(LOSS_PREFIX)})
    losses = {part: for_figure(part.removeprefix(LOSS_PREFIX).replace("_", " ")) for part in parts[:MAX_PANELS]}
    figures = {
        "quality": _quality(runs),
        "gains": _gains(runs),
        "reranked": _reranked(runs),
        "positions": _positions(runs),
        "losses": _over_batches(runs, losses),
        "learning_rate": _over_batches(runs, {"lr": "learning rate"}),
        "throughput": _over_batches(runs, {"tokens_per_second": "tokens per second"}),
        "lengths": _lengths(runs),
    }
    return {name: figures[name] for name in CAPTIONS if figures[name] is not None}  # type: ignore[misc]


def _new_figure(num_panels: int, columns: int, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """Create panels in rows of `columns`; a single panel is half a page wide if rows have two."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = math.ceil(num_panels / columns)
    width = HALF_PAGE if num_panels == 1 and columns == 2 else FULL_PAGE
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, min(columns, num_panels), squeeze=False).flat)
    for panel in panels[num_panels:]:
        panel.remove()
    return figure, panels[:num_panels]


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _over_batches(runs: Sequence[RunRecord], titles: Mapping[str, str]) -> Figure | None:
    """Draw one panel per metric and one line per run; NaN is a gap."""
    known = {name for run in runs for line in run.batches for name, value in line.items() if value is not None}
    titles = {name: title for name, title in titles.items() if name in known}
    if not titles:
        return None
    figure, panels = _new_figure(len(titles), 3 if len(titles) > 2 else 2)
    for panel, (name, title) in zip(panels, titles.items()):
        for index, run in enumerate(runs):
            points = [(line["batch"], line[name]) for line in run.batches if name in line]
            batches = [batch for batch, _ in points]
            values = np.array([np.nan if value is None else value for _, value in points], float)
            smooth = len(points) >= MIN_BATCHES_TO_SMOOTH and name != "lr"
            style: dict[str, Any] = {"alpha": 0.3, "linewidth": 0.8} if smooth else {"label": run.name}
            panel.plot(batches, values, color=_color(index), **style)
            if smooth:
                mean = running_mean(values, len(points) // 25)
                panel.plot(batches, mean, color=_color(index), linewidth=1.8, label=run.name)
        panel.set(title=title, xlabel="batch")
        if name == "tokens_per_second":
            panel.set_ylim(bottom=0)
    if len(runs) > 1:
        panels[0].legend(fontsize="small")
    return figure


def running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Mean of the `width` values around each value (plus 1 if even), fewer at the ends, without NaN."""
    known = ~np.isnan(values)
    window = np.ones(max(1, width) | 1)
    num = np.convolve(known, window, "same")
    sums = np.convolve(np.where(known, values, 0.0), window, "same")
    return np.where(known, sums / np.maximum(num, 1), np.nan)


def _quality(runs: Sequence[RunRecord]) -> Figure | None:
    names = [f"{decoding}/ndcg@10" for decoding in DECODINGS]
    if not any(figures.get(name) is not None for run in runs for _, figures in run.evaluations for name in names):
        return None
    figure, (panel,) = _new_figure(1, 1, 3.6)
    for index, run in enumerate(runs):
        for decoding in DECODINGS:
            name = f"{decoding}/ndcg@10"
            points = [(batch, figures[name]) for batch, figures in run.evaluations if figures.get(name) is not None]
            if points:
                label = f"{run.name}, {decoding.replace('_', ' ')}"
                panel.plot(*zip(*points), linestyle=STYLES[decoding], marker="o", color=_color(index), label=label)
    for name, style in BOUNDS.items():
        last = [(i, run.evaluations[-1][1].get(f"{name}/ndcg@10")) for i, run in enumerate(runs) if run.evaluations]
        known = [(index, value) for index, value in last if value is not None]
        if len({value for _, value in known}) == 1:  # of the same windows
            panel.axhline(known[0][1], linestyle=style, color=GREY, label=name)
            continue
        for index, value in known:
            panel.axhline(value, linestyle=style, color=_color(index), alpha=0.6, label=f"{runs[index].name}, {name}")
    lowest = min((float(np.min(line.get_ydata())) for line in panel.lines), default=0.0)
    panel.set(title="held-out windows", xlabel="batch", ylabel="nDCG@10")
    panel.set_ylim(max(0.0, math.floor(10 * lowest - 0.5) / 10), 1.02)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def gains(run: RunRecord, decoding: str) -> list[tuple[str, float]]:
    """(window, nDCG@10 of a decoding minus that of the presented order) at the last evaluation, ascending."""
    if not run.details:
        return []
    windows = run.details[-1]["ndcg@10"].items()
    found = [
        (name, figures[decoding] - figures["presented"])
        for name, figures in windows
        if decoding in figures and "presented" in figures
    ]
    return sorted(found, key=lambda pair: pair[1])


def _gains(runs: Sequence[RunRecord]) -> Figure | None:
    shown = [
        (index, f"{run.name}, {name.replace('_', ' ')}", [gain for _, gain in found])
        for index, run in enumerate(runs)
        for name in DECODINGS
        if (found := gains(run, name))
    ]
    return _sorted_bars(shown, "window", "gain in nDCG@10")


def _reranked(runs: Sequence[RunRecord]) -> Figure | None:
    shown = []
    for index, run in enumerate(runs):
        for measured in run.reranked:
            row = measured.comparisons[0]
            values = sorted(row.reranked[qid] - row.first_stage[qid] for qid in row.reranked)
            title = f"{run.name}, {for_figure(measured.name)}, {for_figure(measured.decoding.replace('_', ' '))}"
            shown.append((index, title, values))
    return _sorted_bars(shown, "query", "gain over the first stage")


def _sorted_bars(shown: Sequence[tuple[int, str, Sequence[float]]], xlabel: str, ylabel: str) -> Figure | None:
    """Draw one panel of bars per (color index, title, ascending values), on a common scale."""
    if not shown:
        return None
    shown = shown[:MAX_PANELS]
    figure, panels = _new_figure(len(shown), 2)
    most = 1.05 * max(max(map(abs, values)) for _, _, values in shown) or 1.0
    for panel, (index, title, values) in zip(panels, shown):
        panel.bar(range(1, len(values) + 1), values, color=_color(index), width=1.0)
        better, worse = sum(value > 0 for value in values), sum(value < 0 for value in values)
        panel.set_title(f"{title}\n{better} better, {worse} worse of {len(values)}", fontsize="medium")
        panel.set(xlabel=xlabel, ylabel=ylabel, ylim=(-most, most))
        panel.axhline(0, color="black", linewidth=0.8)
        _use_integer_ticks(panel, "x")
    return figure


def _lengths(runs: Sequence[RunRecord]) -> Figure | None:
    known = [(index, run) for index, run in enumerate(runs) if run.tokens_per_list]
    if not known:
        return None
    figure, (panel,) = _new_figure(1, 2)
    bins = np.histogram_bin_edges([length for _, run in known for length in run.tokens_per_list], 30).tolist()
    for index, run in known:
        panel.hist(run.tokens_per_list, bins=bins, color=_color(index), alpha=0.6, label=run.name)
    panel.set(title="list length", xlabel="tokens", ylabel="lists")
    if len(runs) > 1:
        panel.legend(fontsize="small")
    return figure


def _positions(runs: Sequence[RunRecord]) -> Figure | None:
    shown = []
    for run in runs:
        for decoding in DECODINGS:
            found = [details["positions"][decoding] for details in run.details if decoding in details["positions"]]
            if found:
                shown.append((f"{run.name}, {decoding.replace('_', ' ')}", np.asarray(found[-1], float)))
    if not shown:
        return None
    shown = shown[:MAX_PANELS]
    figure, panels = _new_figure(len(shown), 2, 3.9)
    shares = [counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) for _, counts in shown]
    most = max(max(float(share.max()) for share in shares), 1e-9)
    for panel, (title, _), share in zip(panels, shown, shares):
        end = len(share) + 0.5
        image = panel.imshow(share, cmap="viridis", vmin=0, vmax=most, extent=(0.5, end, end, 0.5))
        panel.set_title(title, fontsize="medium")
        panel.set(xlabel="ranked position", ylabel="presented position")
        for axis in "xy":
            _use_integer_ticks(panel, axis)
        figure.colorbar(image, ax=panel, label="share", shrink=0.85)
    return figure


def _use_integer_ticks(panel: Axes, axis: str) -> None:
    from matplotlib.ticker import MaxNLocator

    {"x": panel.xaxis, "y": panel.yaxis}[axis].set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
