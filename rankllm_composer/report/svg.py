"""A panel as SVG inside a page: colors of the page's theme, text as text, and values that show when pointed at."""

from __future__ import annotations

import html
import io
import re

from rankllm_composer.escaping import for_screen
from rankllm_composer.report.pictures import COLORS, GRID, INK, MUTED, WORSE, Panel

_THEME = {color: f"var(--s{index})" for index, color in enumerate(COLORS)}
_THEME |= {WORSE: "var(--worse)", INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}


def svg_of(panel: Panel) -> str:
    """The picture of a panel as an SVG element."""
    content = io.StringIO()
    figure = panel.figure
    figure.savefig(content, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = content.getvalue()
    text = text[text.index("<svg") :]
    text = _without(_without(text, "<metadata>", "</metadata>"), "<!--", "-->")
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", text)
    for color, variable in _THEME.items():
        text = text.replace(color, variable)
    opening = re.match(r"<svg[^>]*>", text)
    width, height = (float(value) * 72 for value in figure.get_size_inches())
    name = html.escape(for_screen(panel.title, one_line=True))
    start = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{name}">'
    assert opening is not None
    return start + text[opening.end() :].rstrip().removesuffix("</svg>") + _areas(panel, height) + "</svg>"


def _without(text: str, start: str, end: str) -> str:
    """A text without its parts from `start` to `end`."""
    first, *others = text.split(start)
    return first + "".join(other.partition(end)[2].lstrip() for other in others)


def _areas(panel: Panel, height: float) -> str:
    to_points = panel.figure.axes[0].transData.transform
    parts = []
    for left, bottom, right, top, text in panel.areas:
        (x0, y0), (x1, y1) = to_points([(left, bottom), (right, top)])
        place = f'x="{x0:.1f}" y="{height - y1:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"'
        parts.append(f"<rect {place}><title>{html.escape(for_screen(text, one_line=True))}</title></rect>")
    return f'<g class="areas">{"".join(parts)}</g>' if parts else ""
