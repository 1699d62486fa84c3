"""Draw the pictures of the report: metrics over batches, windows, queries and positions; one panel per picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rankllm_composer.errors import counted
from rankllm_composer.escaping import for_figure
from rankllm_composer.options import DECODINGS
from rankllm_composer.report.wording import decoding_name, loss_name
from rankllm_composer.training.run_files import LOSS_PREFIX

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from rankllm_composer.report.run_record import RunRecord

COLORS = ("#1f6fb4", "#c4560a", "#2a8a3e", "#8e44ad", "#0f8b8d", "#7d5a4f")
WORSE = "#b5332e"
INK, MUTED, GRID = "#1c2430", "#5b6675", "#dfe4ea"
STYLES = {"first_token": "-", "generation": "--"}
BOUNDS = {"presented": "first stage", "oracle": "best possible", "chance": "random order"}
SIZE, LARGE = (4.4, 2.6), (5.6, 2.9)  # inches, of 72 points
MIN_BATCHES_TO_SMOOTH = 100
MAX_PANELS = 60  # of a section: the first ones
MAX_AREAS = 120  # of a panel that show a value when they are pointed at
MAX_CELLS = 40  # rows of a matrix whose cells do
MIN_APART = 0.03  # of two bounds that are both shown, in nDCG
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rankllm-composer",
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.6,
}


class Area(NamedTuple):
    """A part of a panel, in its coordinates, and what is shown when it is pointed at."""

    left: float
    bottom: float
    right: float
    top: float
    text: str


@dataclass(frozen=True)
class Panel:
    """A picture with one title; `figure` has one pair of axes and no title."""

    title: str
    figure: Figure
    areas: tuple[Area, ...] = ()


def draw(runs: Sequence[RunRecord]) -> dict[str, list[Panel]]:
    """Draw the panels of each section of the report for which there are measurements."""
    from matplotlib import rc_context

    parts = sorted({name for run in runs for line in run.batches for name in line if name.startswith(LOSS_PREFIX)})
    losses = {part: loss_name(part) for part in sorted(parts, key=lambda part: not part.endswith("/total"))}
    with rc_context(_STYLE):
        panels = {
            "gains": list(_query_gains(runs)),
            "quality": list(_quality(runs)),
            "windows": list(_window_gains(runs)),
            "positions": list(_positions(runs)),
            "losses": list(_over_batches(runs, losses)),
            "learning_rate": list(_over_batches(runs, {"lr": "Learning rate"})),
            "throughput": list(_over_batches(runs, {"tokens_per_second": "Tokens per second"})),
            "lengths": list(_lengths(runs)),
        }
    return {name: drawn[:MAX_PANELS] for name, drawn in panels.items() if drawn}


def _new_axes(xlabel: str, ylabel: str = "", size: tuple[float, float] = SIZE) -> Axes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=72)
    FigureCanvasAgg(figure)
    axes: Axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return axes


def _panel(title: str, axes: Axes, areas: Sequence[Area] = ()) -> Panel:
    return Panel(title, axes.figure, tuple(areas))  # type: ignore[arg-type]


def _titled(title: str, run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """A title, with the run's name in front if there are several."""
    return f"{run.name}, {title}" if len(runs) > 1 else title[:1].upper() + title[1:]


def color_of(index: int) -> str:
    """The color of a run."""
    return COLORS[index % len(COLORS)]


def _strips(axes: Axes, texts: Mapping[float, str]) -> list[Area]:
    """Areas over the whole height of a panel, one around each place."""
    places = sorted(texts)
    places = [places[i] for i in np.unique(np.linspace(0, len(places) - 1, min(len(places), MAX_AREAS)).astype(int))]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    edges = [left, *((one + other) / 2 for one, other in itertools.pairwise(places)), right]
    return [Area(start, bottom, end, top, texts[place]) for place, start, end in zip(places, edges, edges[1:])]


def _over_batches(runs: Sequence[RunRecord], titles: Mapping[str, str]) -> Iterator[Panel]:
    """One panel per metric and one line per run; NaN is a gap."""
    known = {name for run in runs for line in run.batches for name, value in line.items() if value is not None}
    for name, title in list(titles.items())[:MAX_PANELS]:
        if name not in known:
            continue
        axes, texts = _new_axes("batch"), dict[float, str]()
        for index, run in enumerate(runs):
            points = {line["batch"]: line[name] for line in run.batches if name in line}
            batches = sorted(points)
            values = np.array([np.nan if points[batch] is None else points[batch] for batch in batches], float)
            smooth = len(points) >= MIN_BATCHES_TO_SMOOTH and name != "lr"
            style: dict[str, Any] = {"alpha": 0.3, "linewidth": 0.8} if smooth else {"label": for_figure(run.name)}
            axes.plot(batches, values, color=color_of(index), **style)
            if smooth:
                mean = running_mean(values, len(points) // 25)
                axes.plot(batches, mean, color=color_of(index), label=for_figure(run.name))
            _note(texts, run, runs, {batch: f"{value:,.4g}" for batch, value in zip(batches, values)}, "batch ")
        _use_integer_ticks(axes, "x")
        if name == "tokens_per_second":
            axes.set_ylim(bottom=0)
        yield _panel(title, axes, _strips(axes, texts))


def _note(
    texts: dict[float, str], run: RunRecord, runs: Sequence[RunRecord], values: Mapping[Any, str], place: str
) -> None:
    """Add the values of a run to what is shown at each place."""
    name = f"{run.name} " if len(runs) > 1 else ""
    for where, value in values.items():
        texts[where] = f"{texts.get(where, f'{place}{where:,}')} · {name}{value}"


def running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Mean of the `width` values around each value (plus 1 if even), fewer at the ends, without NaN."""
    known = ~np.isnan(values)
    window = np.ones(max(1, width) | 1)
    num = np.convolve(known, window, "same")
    sums = np.convolve(np.where(known, values, 0.0), window, "same")
    return np.where(known, sums / np.maximum(num, 1), np.nan)


def _quality(runs: Sequence[RunRecord]) -> Iterator[Panel]:
    names = [f"{decoding}/ndcg@10" for decoding in DECODINGS]
    if not any(figures.get(name) is not None for run in runs for _, figures in run.evaluations for name in names):
        return
    axes, texts = _new_axes("batch", "nDCG@10", LARGE), dict[float, str]()
    for index, run in enumerate(runs):
        for decoding in DECODINGS:
            name = f"{decoding}/ndcg@10"
            measured = ((batch, figures.get(name)) for batch, figures in run.evaluations)
            points = {batch: value for batch, value in measured if value is not None}
            if points:
                label = for_figure(f"{run.name}, {decoding_name(decoding)}")
                style: dict[str, Any] = {"linestyle": STYLES[decoding], "marker": "o", "markersize": 3.5}
                axes.plot([*points], [*points.values()], color=color_of(index), label=label, **style)
                shown = {batch: f"{decoding_name(decoding)} {value:.4f}" for batch, value in points.items()}
                _note(texts, run, runs, shown, "batch ")
    lowest = min(float(np.min(line.get_ydata())) for line in axes.lines)
    named: list[float] = []
    for name, meaning in BOUNDS.items():
        last = [run.evaluations[-1][1].get(f"{name}/ndcg@10") for run in runs if run.evaluations]
        values = sorted({value for value in last if value is not None})
        for value in values if len(values) == 1 else ():  # of the same windows
            if all(abs(value - other) >= MIN_APART for other in named):
                named.append(value)
                lowest = min(lowest, value)
                axes.axhline(value, linestyle=":", linewidth=1.0, color=MUTED)
                style = {"transform": axes.get_yaxis_transform(), "color": MUTED, "fontsize": 8}
                axes.text(0.01, value, meaning, va="bottom", **style)
    axes.set_ylim(max(0.0, math.floor(10 * lowest - 0.5) / 10), 1.04)
    axes.set_xlim(left=0)
    _use_integer_ticks(axes, "x")
    yield _panel("nDCG@10 of held-out windows", axes, _strips(axes, texts))


def window_gains(run: RunRecord, decoding: str) -> list[tuple[str, float]]:
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


def _window_gains(runs: Sequence[RunRecord]) -> Iterator[Panel]:
    shown = [
        (index, _titled(decoding_name(name), run, runs), [(f"window {window}", gain) for window, gain in found])
        for index, run in enumerate(runs)
        for name in DECODINGS
        if (found := window_gains(run, name))
    ]
    yield from _sorted_bars(shown, "held-out windows", "gain in nDCG@10")


def _query_gains(runs: Sequence[RunRecord]) -> Iterator[Panel]:
    shown = []
    for index, run in enumerate(runs):
        for measured in run.reranked:
            row = measured.comparisons[0]
            gains = sorted((row.reranked[qid] - row.first_stage[qid], qid) for qid in row.reranked)
            texts = [
                (f"query {qid}: {row.first_stage[qid]:.3f} → {row.reranked[qid]:.3f}", gain) for gain, qid in gains
            ]
            title = f"{measured.name}, {run.model_name(measured)}"
            shown.append((index, f"{run.name}, {title}" if len(runs) > 1 else title, texts))
    yield from _sorted_bars(shown, "queries", "gain over the first stage")


def _sorted_bars(
    shown: Sequence[tuple[int, str, Sequence[tuple[str, float]]]], xlabel: str, ylabel: str
) -> Iterator[Panel]:
    """One panel of bars per (color index, title, ascending (text, value)), on a common scale."""
    shown = shown[:MAX_PANELS]
    most = max((1.05 * max(abs(value) for _, value in bars) for _, _, bars in shown), default=0.0) or 1.0
    for index, title, bars in shown:
        axes = _new_axes(f"{len(bars):,} {xlabel}, sorted", ylabel)
        values = [value for _, value in bars]
        edges = np.arange(len(values) + 1) + 0.5
        for color, part in ((color_of(index), np.maximum(values, 0)), (WORSE, np.minimum(values, 0))):
            axes.stairs(part, edges, fill=True, color=color)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.set(ylim=(-most, most), xlim=(0.5, len(values) + 0.5))
        axes.grid(False, axis="x")
        _use_integer_ticks(axes, "x")
        better, worse = sum(value > 0 for value in values), sum(value < 0 for value in values)
        texts = {float(place): f"{text} ({value:+.3f})" for place, (text, value) in enumerate(bars, start=1)}
        yield _panel(f"{title}: {better:,} better, {worse:,} worse of {len(bars):,}", axes, _strips(axes, texts))


def _lengths(runs: Sequence[RunRecord]) -> Iterator[Panel]:
    known = [(index, run) for index, run in enumerate(runs) if run.tokens_per_list]
    if not known:
        return
    axes, texts = _new_axes("tokens of prompt and answer", "lists"), dict[float, str]()
    bins = np.histogram_bin_edges([length for _, run in known for length in run.tokens_per_list], 30)
    for index, run in known:
        style: dict[str, Any] = {"color": color_of(index), "alpha": 0.6, "label": for_figure(run.name)}
        counts, *_ = axes.hist(run.tokens_per_list, bins=bins.tolist(), **style)
        centers = ((bins[:-1] + bins[1:]) / 2).tolist()
        notes = {round(place): counted(round(count), "list") for place, count in zip(centers, counts)}
        _note(texts, run, runs, notes, "about ")
    axes.set_xlim(float(bins[0]), float(bins[-1]))
    yield _panel("Tokens per training list", axes, _strips(axes, texts))


def _positions(runs: Sequence[RunRecord]) -> Iterator[Panel]:
    shown = []
    for index, run in enumerate(runs):
        for decoding in DECODINGS:
            found = [details["positions"][decoding] for details in run.details if decoding in details["positions"]]
            if found:
                title = _titled(decoding_name(decoding), run, runs)
                shown.append((index, title, np.asarray(found[-1], float)))
    shares = [counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) for _, _, counts in shown]
    most = max((float(share.max()) for share in shares), default=0.0) or 1.0
    for (index, title, _), share in zip(shown, shares):
        from matplotlib.colors import to_rgba

        axes, size = _new_axes("ranked position", "presented position"), len(share)
        cells = np.tile(np.array(to_rgba(color_of(index))), (size, size, 1))
        cells[..., 3] = share / most  # transparent = never, so that it can be read on any background
        edges = np.arange(size + 1) + 0.5
        axes.pcolormesh(edges, edges, cells, linewidth=0)
        axes.set(ylim=(size + 0.5, 0.5), aspect="equal")
        axes.grid(False)
        for axis in "xy":
            _use_integer_ticks(axes, axis)
        areas = [
            Area(x + 0.5, y + 1.5, x + 1.5, y + 0.5, f"presented {y + 1} → ranked {x + 1}: {share[y, x]:.0%}")
            for y in range(size)
            for x in range(size)
        ]
        yield _panel(f"{title}; darkest: {most:.0%}", axes, areas if size <= MAX_CELLS else ())


def _use_integer_ticks(axes: Axes, axis: str) -> None:
    from matplotlib.ticker import MaxNLocator

    {"x": axes.xaxis, "y": axes.yaxis}[axis].set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))


def titled(panel: Panel, num_runs: int) -> Figure:
    """The figure of a panel with its title, and with a legend if there are several runs: for a file of its own."""
    (axes,) = panel.figure.axes
    axes.set_title(for_figure(panel.title), fontsize=9, loc="left")
    if num_runs > 1 and axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")
    return panel.figure


def with_short_names(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Runs whose names fit into a title."""
    return [replace(run, name=for_figure(run.name).replace("\\$", "$").strip()) for run in runs]
