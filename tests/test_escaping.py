"""Text from outside on the screen, in Markdown and in figures: nothing in it acts there, and nothing is lost."""

from __future__ import annotations

import logging
import unicodedata
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from rankllm_composer.errors import RecordError, RunError, first_line
from rankllm_composer.escaping import for_figure, for_markdown, for_screen, from_markdown, in_one_line
from rankllm_composer.screen import get_logger, report, say, warn

ESCAPE = "\x1b]0;owned\x07\x1b[31mred\x1b[0m"
ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=60)  # with halves of surrogate pairs
MARKUP = st.lists(
    st.sampled_from([*"\\`*_|~<>&[](){}!#-$^\n\t \x1b", "a", "b_c", "](", "&amp;", "&lt", "<img src=x>", "javascript:"])
).map("".join)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (ESCAPE, "\\x1b]0;owned\\x07\\x1b[31mred\\x1b[0m"),
        ("a\rb\x00\x7f\x9b2J", "a\\rb\\x00\\x7f\\x9b2J"),
        ("\u202eabc\u2066\u200f\ufeff", "\\u202eabc\\u2066\\u200f\\ufeff"),
        ("\ud800 \U000e0041", "\\ud800 \\U000e0041"),
        ("two\nlines\tand \\x1b", "two\nlines\tand \\x1b"),
        ("日本語 é 👩\u200d🔬 → …", "日本語 é 👩\u200d🔬 → …"),
    ],
)
def test_what_acts_on_a_terminal_is_shown_as_an_escape(text, shown):
    assert for_screen(text) == shown
    assert for_screen(text, one_line=True) == shown.replace("\n", "\\n").replace("\t", "\\t")
    assert in_one_line([text, "x"]) == f"{for_screen(text, one_line=True)}, x"


@given(ANY_TEXT)
def test_text_for_the_screen_has_no_controls_and_is_not_escaped_twice(text):
    shown = for_screen(text)
    assert {unicodedata.category(char) for char in shown if char not in "\n\t"}.isdisjoint({"Cc", "Cs", "Zl", "Zp"})
    assert for_screen(shown) == shown
    assert for_screen(text, one_line=True).isprintable() or not text.isprintable()
    shown.encode()


def test_errors_output_warnings_and_logs_are_escaped(capsys, caplog):
    place = f"file {ESCAPE}"
    for error in (RunError(f"{place} is wrong"), RecordError(place, ESCAPE, ESCAPE)):
        assert "\x1b" not in str(error) and "\\x1b]0;owned" in str(error)
    assert "\x1b" not in first_line(OSError(ESCAPE))
    say(ESCAPE)
    report(f"{ESCAPE} password=hunter2")
    say("\x1b[32mours\x1b[0m", escaped=True)
    out, err = capsys.readouterr()
    assert out == f"{for_screen(ESCAPE)}\n\x1b[32mours\x1b[0m\n"
    assert err == f"{for_screen(ESCAPE)} password=[redacted]\n"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn(f"{ESCAPE} hf_token: abc", RuntimeWarning)
    (warning,) = caught
    assert "\x1b" not in str(warning.message) and "abc" not in str(warning.message)
    assert warning.filename == __file__ and warning.category is RuntimeWarning
    log = get_logger("rankllm_composer.tests")
    with caplog.at_level(logging.WARNING, log.name):
        log.warning("%s of 100%%", ESCAPE)
    assert caplog.messages == [f"{for_screen(ESCAPE)} of 100%"]


@given(st.one_of(ANY_TEXT, MARKUP))
def test_markdown_shows_the_text_and_nothing_else(text):
    """An independent parser of Markdown finds one paragraph, or table cell, of exactly this text."""
    plain = for_screen(" ".join(text.split()))
    escaped = for_markdown(text)
    assert from_markdown(escaped) == plain
    page = MarkdownIt("commonmark").enable("table").enable("strikethrough")
    (_, inline, _) = page.parse(f"x {escaped}")
    assert {token.type for token in inline.children} <= {"text", "text_special"}
    assert "".join(token.content for token in inline.children) == f"x {plain}".rstrip()
    cells = [token for token in page.parse(f"| a | b |\n| --- | --- |\n| x{escaped} | y |\n") if token.type == "inline"]
    assert len(cells) == 4
    assert "".join(token.content for token in cells[2].children) == f"x{plain}"
    (_, inline, _) = page.parse(f"x {for_markdown(text, code=True)}")
    code = [token for token in inline.children if token.type == "code_inline"]
    assert [token.content.strip() for token in code] == [plain] and len(inline.children) == 2


@given(st.one_of(ANY_TEXT, st.text("$\\_^{}a", max_size=30), st.just("x" * 300), st.just("$\\frac{")))
def test_labels_of_figures_are_drawn_as_text(text):
    from matplotlib.cbook import is_math_text

    label = for_figure(text)
    assert not is_math_text(label)
    assert len(label.replace("\\$", "$")) <= 61 and "\n" not in label and not label.startswith("_")
