"""Write the report on training runs: one HTML file that contains its pictures."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rankllm_composer.errors import counted, shell_line
from rankllm_composer.escaping import for_screen
from rankllm_composer.export.published import TOLERANCE, verdict
from rankllm_composer.options import DECODINGS
from rankllm_composer.report.headline import Headline, headlines
from rankllm_composer.report.pictures import Panel, draw, titled, window_gains, with_short_names
from rankllm_composer.report.run_record import RunRecord, with_distinct_names
from rankllm_composer.report.svg import svg_of
from rankllm_composer.report.theme import SCRIPT, STYLE
from rankllm_composer.report.wording import amount, decoding_name, duration, loss_name, metric_name
from rankllm_composer.storage.atomic import write_atomic
from rankllm_composer.training.run_files import LOSS_PREFIX

NUM_LISTED_WINDOWS = 3  # with the largest gains, and with the largest losses
SECTIONS = {  # name → (title, caption), in the order of the page
    "gains": ("Queries", "Each query's gain over the first stage, from the largest loss to the largest gain."),
    "quality": (
        "Quality while training",
        "Held-out windows, ranked while the model trained. Solid: decoded from the first token; dashed: from generated "
        "answers. Dotted: the order of the first stage, and the best possible one.",
    ),
    "windows": ("Held-out windows", "Each window's gain over the order of the first stage, at the last evaluation."),
    "positions": (
        "Position bias",
        "How often a candidate that was presented at a position (row) is ranked at a position (column), in shuffled "
        "windows. Evenly gray: no bias. A dark diagonal: the model repeats the order that it is shown.",
    ),
    "losses": ("Losses", "Parts of the loss, without their weights, and their weighted total. Bold: running mean."),
    "learning_rate": ("Pace", ""),
    "throughput": ("", ""),
    "lengths": ("", ""),
}
Rows = list[tuple[str, ...]]


def write_report(runs: Sequence[RunRecord], output: str | Path, pictures: str | Path | None = None) -> list[str]:
    """Write the report on runs side by side to an HTML file, and its pictures to a folder too; return their names."""
    runs = with_short_names(with_distinct_names(runs))
    drawn = draw(runs)
    page = _page(runs, {name: [svg_of(panel) for panel in panels] for name, panels in drawn.items()}, drawn)
    if pictures is not None:
        Path(pictures).mkdir(parents=True, exist_ok=True)
        for name, panels in drawn.items():
            for number, panel in enumerate(panels, start=1):
                file = f"{name}.png" if len(panels) == 1 else f"{name}-{number}.png"
                write_atomic(Path(pictures, file), _png(panel, len(runs)))
    write_atomic(Path(output), page)
    return list(drawn)


def _png(panel: Panel, num_runs: int) -> bytes:
    content = io.BytesIO()
    titled(panel, num_runs).savefig(content, format="png", dpi=160)
    return content.getvalue()


def _page(runs: Sequence[RunRecord], pictures: Mapping[str, Sequence[str]], drawn: Mapping[str, list[Panel]]) -> str:
    names = _html(", ".join(run.name for run in runs))
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{names}: training report</title><style>{STYLE}</style></head>",
        f'<body><header><p class="kicker">Training report</p><h1>{names}</h1>{_subtitle(runs)}</header>',
        *_headline_cards(runs),
        _reranked(runs),
        _published(runs),
    ]
    tables = {"quality": _evaluated(runs), "windows": _most_changed(runs), "losses": _last_losses(runs)}
    pace = [name for name in ("learning_rate", "throughput", "lengths") if name in pictures]
    for name, (title, caption) in SECTIONS.items():
        shown = pace if name == "learning_rate" else [name] if name not in ("throughput", "lengths") else []
        figures = [_figure(name, drawn[name][i], one) for name in shown for i, one in enumerate(pictures.get(name, ()))]
        if figures or tables.get(name):
            parts.append(f"<section><h2>{title}</h2>" + (f"<p>{_html(caption)}</p>" if caption else ""))
            parts.append(_legend(runs) if figures and name not in ("gains", "windows", "positions") else "")
            kind = "panels" if len(figures) > 1 else "panels alone"
            parts.append(f'<div class="{kind}">{"".join(figures)}</div>' if figures else "")
            parts.append(f"{tables.get(name, '')}</section>")
    parts.append(f"<section><h2>Run{'s' * (len(runs) > 1)}</h2>{_facts(runs)}</section>")
    for run in runs:
        summary = f"Recipe of {_html(run.name)}"
        parts.append(f"<details><summary>{summary}</summary><pre>{_html(run.recipe)}</pre></details>")
    return "\n".join([*filter(None, parts), f"<script>{SCRIPT}</script></body></html>\n"])


def _html(text: str) -> str:
    return html.escape(for_screen(text))


def _figure(name: str, panel: Panel, picture: str) -> str:
    return f'<figure class="{name}"><figcaption>{_html(panel.title)}</figcaption>{picture}</figure>'


def _legend(runs: Sequence[RunRecord]) -> str:
    if len(runs) == 1:
        return ""
    items = [f'<li style="--c:var(--s{index % 6})">{_html(run.name)}</li>' for index, run in enumerate(runs)]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    if not rows:
        return ""
    lines = ["<tr>" + "".join(f"<th>{_html(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{_html(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="scroll"><table class="{kind}">' + "\n".join(lines) + "</table></div>"


def _side_by_side(title: str, runs: Sequence[RunRecord], figures: Sequence[Mapping[str, str]], kind: str = "") -> str:
    names = dict.fromkeys(name for of_run in figures for name in of_run)
    rows = [[name, *(of_run.get(name, "–") for of_run in figures)] for name in names]
    return _table([title, *(run.name for run in runs)], rows, kind)


# --- top --------------------------------------------------------------------------------------------------------------


def _subtitle(runs: Sequence[RunRecord]) -> str:
    """Date, duration and machine, where they are the same for all runs or there is one."""
    parts = [[run.origin.date, run.origin.took, run.origin.machine] for run in runs]
    shown = [values[0] for values in zip(*parts) if values[0] and len(set(values)) == 1]
    return f"<p>{_html(' · '.join(shown))}</p>" if shown else ""


def _headline_cards(runs: Sequence[RunRecord]) -> Iterator[str]:
    """What each run gained, the most important of all."""
    cards = [_card(index, run, one, len(runs)) for index, run in enumerate(runs) for one in headlines(run)]
    if cards:
        yield f'<div class="cards">{"".join(cards)}</div>'
    else:
        command = shell_line("rankllm-composer", "rerank", "--model", "RUN/hf/epoch_K", "--output", "RUN/reranked.trec")
        yield (
            "<p>No ranking was measured. Results that are written into the run's folder are shown here: "
            f"<code>{_html(command)} --qrels … --run … --queries … --docs …</code></p>"
        )


def _card(index: int, run: RunRecord, one: Headline, num_runs: int) -> str:
    result = one.comparison
    what = " · ".join([*([run.name] if num_runs > 1 else []), f"{one.measure} on {one.where}"])
    change = f'<span class="{"up" if result.difference >= 0 else "down"}">{result.difference:+.3f}</span>'
    counts = f"{result.wins:,} better, {result.ties:,} equal, {result.losses:,} worse"
    return (
        f'<div class="card" style="--c:var(--s{index % 6})"><p>{_html(what)}</p>'
        f'<p class="figure">{result.first_mean:.3f} → <strong>{result.second_mean:.3f}</strong></p>'
        f"<p>{change} over the first stage; {_html(counts)}; p {_html(_p_value(result.p_value))}</p>"
        f"<p>{_html(one.model)}</p></div>"
    )


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


# --- tables -----------------------------------------------------------------------------------------------------------


def _facts(runs: Sequence[RunRecord]) -> str:
    return _side_by_side("", runs, [dict(_facts_of(run)) for run in runs], "words")


def _facts_of(run: RunRecord) -> Iterator[tuple[str, str]]:
    """Model, data, progress, time, machine and versions, as far as the run recorded them."""
    origin, last = run.origin, run.batches[-1] if run.batches else {}
    if origin.model:
        sizes = f", {amount(origin.parameters)} parameters" if origin.parameters else ""
        if origin.trained_parameters < origin.parameters:
            sizes += f", {amount(origin.trained_parameters)} of them trained"
        yield "Model", origin.model + sizes
    if origin.data:
        per_epoch = f"; {counted(origin.lists_per_epoch, 'list')} per epoch" if origin.lists_per_epoch else ""
        yield "Data", ", ".join(origin.data) + per_epoch
    if run.objective:
        yield "Objective", run.objective
    if last:
        tokens = f", {amount(last['tokens'])} tokens" if "tokens" in last else ""
        yield "Trained", f"{counted(last['batch'], 'batch')}{tokens}"
    for name in ("data/lists_trained", "data/lists_too_long"):
        if (value := last.get(name)) is not None:
            yield metric_name(name).capitalize(), f"{value:,.0f}"
    if origin.date:
        resumed = f"; resumed {counted(origin.num_starts - 1, 'time')}" if origin.num_starts > 1 else ""
        yield "Started", origin.date + resumed
    training = f"{duration(run.training_seconds)} in updates" if run.training_seconds else ""
    if origin.took or training:
        yield "Duration", ", of which ".join(filter(None, [origin.took, training]))
    if origin.machine:
        ranks = f"; {origin.num_ranks} ranks" if origin.num_ranks > 1 else ""
        yield "Machine", origin.machine + ranks
    if origin.versions:
        yield "Versions", ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    if run.num_damaged:
        yield "Damaged lines and values, left out", f"{run.num_damaged:,}"


def _last_losses(runs: Sequence[RunRecord]) -> str:
    def show(value: float | None) -> str:
        return "NaN" if value is None else f"{value:,.5g}"

    last = [run.batches[-1] if run.batches else {} for run in runs]
    named = [sorted(name for name in one if name.startswith(LOSS_PREFIX)) for one in last]
    losses = [{loss_name(name): show(one[name]) for name in names} for one, names in zip(last, named)]
    return _side_by_side("Last batch", runs, losses)


def _evaluated(runs: Sequence[RunRecord]) -> str:
    def show(value: float | None) -> str:
        return "NaN" if value is None else f"{round(value, 4) + 0.0:.4f}".removesuffix(".0000")  # no -0

    last = [run.evaluations[-1][1] if run.evaluations else {} for run in runs]
    figures = [{metric_name(name): show(value) for name, value in one.items()} for one in last]
    table = _side_by_side("Last evaluation", runs, figures)
    return f"<details><summary>All figures of the last evaluation</summary>{table}</details>" if table else ""


def _most_changed(runs: Sequence[RunRecord]) -> str:
    rows: Rows = []
    for run in runs:
        for decoding in DECODINGS:
            if found := window_gains(run, decoding):
                most = [pair for pair in reversed(found) if pair[1] > 0], [pair for pair in found if pair[1] < 0]
                cells = [", ".join(f"{name} {gain:+.3f}" for name, gain in one[:NUM_LISTED_WINDOWS]) for one in most]
                name = decoding_name(decoding) if len(runs) == 1 else f"{run.name}, {decoding_name(decoding)}"
                rows.append((name, *(cell or "none" for cell in cells)))
    return _table(("Windows with the largest changes", "gained", "lost"), rows, "words")


def _reranked(runs: Sequence[RunRecord]) -> str:
    rows: Rows = []
    for run in runs:
        for measured in run.reranked:
            for row in measured.comparisons:
                result = row.comparison
                model = run.model_name(measured) if len(runs) == 1 else f"{run.name}, {run.model_name(measured)}"
                means = f"{result.first_mean:.4f} → {result.second_mean:.4f}"
                counts = f"{result.wins}/{result.ties}/{result.losses}"
                cells = (means, f"{result.difference:+.4f}", counts, _p_value(result.p_value).removeprefix("= "))
                rows.append((f"{measured.name}, {row.measure}", model, *cells))
    head = ("Reranked", "model", "first stage → reranked", "difference", "wins/ties/losses", "p")
    return _table(head, rows)


def _published(runs: Sequence[RunRecord]) -> str:
    """Published results of such models beside the last measurement of the same metric."""
    rows: Rows = []
    for run in runs:
        measured = {name: value for one in run.reranked for name, value in one.figures().items()}
        for name, published in run.published:
            ours = measured.get(name)
            cell = "–" if ours is None else f"{ours:.4f}"
            rows.append((name, run.name, cell, f"{published:.4f}", verdict(ours, published)))
    return _table((f"Published, ±{TOLERANCE:.1%}", "run", "measured", "published", "verdict"), rows)
