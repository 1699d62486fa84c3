"""Text from outside (records, files, names, errors of libraries), escaped for the screen, for Markdown and for figures.

`for_screen` leaves text that it escaped unchanged; `from_markdown` inverts `for_markdown`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

# Characters that move the cursor, change the terminal, reorder or hide text, or cannot be encoded: controls except tab
# and line break, soft hyphen, marks and overrides of direction, separators of lines, interlinear and tag characters,
# the byte-order mark, and halves of surrogate pairs. Joiners stay: scripts and emoji need them.
_UNSAFE = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\U000e0000-\U000e0fff\ud800-\udfff"
)
_IN_LINES = re.compile(f"[{_UNSAFE}]")
_IN_ONE_LINE = re.compile(rf"[\t\n{_UNSAFE}]")
_MARKDOWN = re.compile(r"[\\`*|~]|(?<![^\W_])_|_(?![^\W_])|(?<=\])\(|(?<=\])\[")
_ESCAPED_MARKDOWN = re.compile(r"\\([\\`*|~_(\[])")
MAX_FIGURE_CHARS = 60


def for_screen(text: object, *, one_line: bool = False) -> str:
    """Text for a terminal or a log: control characters and the like as escapes such as `\\x1b`.

    Args:
        one_line: escape line breaks and tabs too, for a value inside a line.
    """
    pattern = _IN_ONE_LINE if one_line else _IN_LINES
    return pattern.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), str(text))


def in_one_line(texts: Iterable[object]) -> str:
    """Texts with commas between them, each without line breaks."""
    return ", ".join(for_screen(text, one_line=True) for text in texts)


def for_markdown(text: object, *, code: bool = False) -> str:
    """Text for a line or a table cell of a Markdown page: no HTML, no markup, no line breaks.

    Args:
        code: return a code span.
    """
    plain = for_screen(" ".join(str(text).split()))
    if code:
        fence = "`" * (max(map(len, re.findall("`+", plain)), default=0) + 1)
        space = " " if plain.startswith("`") or plain.endswith("`") or not plain else ""
        return f"{fence}{space}{plain}{space}{fence}"
    return _MARKDOWN.sub(r"\\\g<0>", html.escape(plain, quote=False))


def from_markdown(text: str) -> str:
    """The text that `for_markdown` escaped."""
    return html.unescape(_ESCAPED_MARKDOWN.sub(r"\1", text))


def for_figure(text: object) -> str:
    """Text for a label of a Matplotlib figure: in one line of at most 60 characters, without TeX.

    A leading underscore, which would hide a label from the legend, follows a space.
    """
    plain = for_screen(text, one_line=True)
    short = plain if len(plain) <= MAX_FIGURE_CHARS else f"{plain[: MAX_FIGURE_CHARS - 1]}…"
    return re.sub(r"^_", " _", re.sub(r"(?<!\\)\$", r"\\$", short))
