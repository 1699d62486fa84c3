"""Write the report on training runs: one HTML file that contains its figures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rankllm_composer.escaping import for_screen
from rankllm_composer.export.model_card import TOLERANCE, verdict
from rankllm_composer.options import DECODINGS
from rankllm_composer.report.pictures import CAPTIONS, draw, gains
from rankllm_composer.report.run_record import RunRecord, with_distinct_names
from rankllm_composer.storage.atomic import write_atomic
from rankllm_composer.training.progress import LOSS_PREFIX

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FULL_WIDTH = {"quality", "gains", "reranked", "positions", "losses"}
NUM_LISTED_WINDOWS = 3  # with the largest gains, and with the largest losses
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "h1{margin-bottom:.2rem}h2{margin:2rem 0 .3rem;border-bottom:2px solid #ddd}p{margin:.2rem 0 .6rem;color:#555}"
    "table{border-collapse:collapse;margin:.4rem 0 1rem}th,td{padding:.15rem .8rem;border-bottom:1px solid #ddd;"
    "text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}th:first-child,td:first-child{text-align:left}"
    "th{background:#f2f2f2}.pair{display:flex;flex-wrap:wrap;gap:1rem}.pair section{flex:1 1 28rem;min-width:0}"
    "img{max-width:100%}summary{cursor:pointer}pre{background:#f6f6f6;padding:1rem;overflow:auto;font-size:13px}"
)
Rows = list[tuple[str, ...]]


def write_report(runs: Sequence[RunRecord], output: str | Path, pictures: str | Path | None = None) -> list[str]:
    """Write the report on runs side by side to an HTML file, and its figures to a folder too; return their names."""
    runs = with_distinct_names(runs)
    drawn = {name: _png(figure) for name, figure in draw(runs).items()}
    if pictures is not None:
        Path(pictures).mkdir(parents=True, exist_ok=True)
        for name, content in drawn.items():
            write_atomic(Path(pictures, f"{name}.png"), content)
    write_atomic(Path(output), _page(runs, drawn))
    return list(drawn)


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def _page(runs: Sequence[RunRecord], drawn: Mapping[str, bytes]) -> str:
    names = _html(", ".join(run.name for run in runs))
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{names}</title><style>{STYLE}</style></head>',
        f"<body><h1>{names}</h1>",
        _side_by_side("Training", runs, [dict(_training(run)) for run in runs]),
        _side_by_side("Data", runs, [dict(_lists(run)) for run in runs]),
        _published(runs),
    ]
    tables = {"quality": _evaluated(runs), "gains": _most_changed(runs), "reranked": _reranked(runs)}
    narrow: list[str] = []
    for name in CAPTIONS:
        if name in drawn or tables.get(name):
            title, caption = CAPTIONS[name]
            section = f"<section><h2>{title}</h2><p>{_html(caption)}</p>{_image(name, drawn)}"
            section += tables.get(name, "") + "</section>"
            (parts if name in FULL_WIDTH else narrow).append(section)
    parts.append(f'<div class="pair">{"".join(narrow)}</div>')
    for run in runs:
        summary = f"Recipe of {_html(run.name)}"
        parts.append(f"<details><summary>{summary}</summary><pre>{_html(run.recipe)}</pre></details>")
    return "\n".join([*filter(None, parts), "</body></html>\n"])


def _html(text: str) -> str:
    return html.escape(for_screen(text))


def _image(name: str, drawn: Mapping[str, bytes]) -> str:
    if name not in drawn:
        return ""
    source = base64.b64encode(drawn[name]).decode()
    return f'<img id="{name}" alt="{CAPTIONS[name][0]}" src="data:image/png;base64,{source}">'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{_html(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{_html(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "<table>" + "\n".join(lines) + "</table>" if rows else ""


def _side_by_side(title: str, runs: Sequence[RunRecord], figures: Sequence[Mapping[str, str]]) -> str:
    names = dict.fromkeys(name for of_run in figures for name in of_run)
    rows = [[name, *(of_run.get(name, "–") for of_run in figures)] for name in names]
    return _table([title, *(run.name for run in runs)], rows)


def _training(run: RunRecord) -> Iterator[tuple[str, str]]:
    """Progress and latest losses."""
    if run.batches:
        last = run.batches[-1]
        yield "batches", f"{last['batch']:,}"
        yield "tokens", f"{last['tokens']:,}" if "tokens" in last else "–"
        for name, value in sorted(last.items()):
            if name.startswith(LOSS_PREFIX):
                yield name, "NaN" if value is None else f"{value:,.5g}"


def _lists(run: RunRecord) -> Iterator[tuple[str, str]]:
    """Counts of lists that were trained on and dropped."""
    for name, value in sorted(run.batches[-1].items()) if run.batches else ():
        if name.startswith("data/"):
            yield name, "NaN" if value is None else f"{value:,.5g}" if isinstance(value, float) else f"{value:,}"
    if run.num_damaged:
        yield "damaged lines and values, left out", f"{run.num_damaged:,}"


def _evaluated(runs: Sequence[RunRecord]) -> str:
    def show(value: float | None) -> str:
        return "NaN" if value is None else f"{value:.4f}".removesuffix(".0000")

    last = [run.evaluations[-1][1] if run.evaluations else {} for run in runs]
    return _side_by_side("Last evaluation", runs, [{name: show(value) for name, value in one.items()} for one in last])


def _most_changed(runs: Sequence[RunRecord]) -> str:
    rows: Rows = []
    for run in runs:
        for decoding in DECODINGS:
            if found := gains(run, decoding):
                most = [pair for pair in reversed(found) if pair[1] > 0], [pair for pair in found if pair[1] < 0]
                cells = [", ".join(f"{name} {gain:+.3f}" for name, gain in one[:NUM_LISTED_WINDOWS]) for one in most]
                rows.append((f"{run.name}, {decoding.replace('_', ' ')}", *(cell or "none" for cell in cells)))
    return _table(("Windows with the largest changes", "gained", "lost"), rows)


def _reranked(runs: Sequence[RunRecord]) -> str:
    rows: Rows = []
    for run in runs:
        for measured in run.reranked:
            for row in measured.comparisons:
                result = row.comparison
                name = f"{run.name}, {Path(measured.model).name}, {measured.decoding.replace('_', ' ')}"
                means = f"{result.first_mean:.4f} → {result.second_mean:.4f}"
                counts = f"{result.wins}/{result.ties}/{result.losses}"
                p_value = "< 0.001" if result.p_value < 0.001 else f"{result.p_value:.3f}"
                difference = f"{result.difference:+.4f}"
                rows.append((f"{measured.name}/{row.measure}", name, means, difference, counts, p_value))
    head = ("Metric", "run, model, decoding", "first stage → reranked", "difference", "wins/ties/losses", "p")
    return _table(head, rows)


def _published(runs: Sequence[RunRecord]) -> str:
    """Published results of each recipe beside the last measurement of the same metric."""
    rows: Rows = []
    for run in runs:
        measured = {name: value for one in run.reranked for name, value in one.figures().items()}
        for name, published in run.published:
            ours = measured.get(name)
            cell = "–" if ours is None else f"{ours:.4f}"
            rows.append((name, run.name, cell, f"{published:.4f}", verdict(ours, published)))
    return _table((f"Published result, ±{TOLERANCE:.1%}", "run", "measured", "published", "verdict"), rows)
