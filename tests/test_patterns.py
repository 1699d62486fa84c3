"""Every regular expression of the package takes time linear in the text, counted in steps of the search."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.regex_steps import StepCounter, literal_runs

import rankllm_composer
from rankllm_composer import redaction

PACKAGE = Path(rankllm_composer.__file__).parent
SEARCHES = {"search", "sub", "subn", "split", "findall", "finditer"}
ANCHORED = {"match", "fullmatch"}
PUMPED = [
    "a",
    "a=",
    ".",
    "a.",
    "Aa1+/",
    "word ",
    "x://",
    "x://a?",
    "\\",
    "[",
    "1",
    " ",
    "\n",
    "-",
    '"',
    "secret=",
    "eyJ-",
]
SIZE = 96  # three times the largest bound of a repetition


def patterns() -> Iterator[tuple[str, re.Pattern[str], bool]]:
    """(place, pattern, anchored) of every constant pattern in the package, compiled or in a call of `re`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        used: dict[str, set[str]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner, method = node.func.value, node.func.attr
                if isinstance(owner, ast.Name):
                    used.setdefault(owner.id, set()).add(method)
                    constant = node.args[0] if node.args else None
                    is_text = isinstance(constant, ast.Constant) and isinstance(constant.value, str)
                    if owner.id == "re" and is_text and method in SEARCHES | ANCHORED:
                        yield f"{path.stem}:{node.lineno}", re.compile(constant.value), method in ANCHORED
        for node in tree.body:
            value = getattr(node, "value", None)
            if isinstance(node, ast.Assign) and isinstance(value, ast.Call) and ast.unparse(value.func) == "re.compile":
                constant_name = node.targets[0].id
                methods = used.get(constant_name, set())
                pattern = getattr(importlib.import_module(name), constant_name)
                yield f"{path.stem}.{constant_name}", pattern, bool(methods) and methods <= ANCHORED


PATTERNS = list(patterns())


def steps(pattern: re.Pattern[str], text: str, anchored: bool) -> int:
    counter = StepCounter(pattern)
    list(counter.spans(text, anchored=anchored))
    return counter.steps


def worst_growth(pattern: re.Pattern[str], anchored: bool) -> tuple[float, str]:
    """Largest ratio of the steps for twice the text, and the repeated part; 2 is linear and 4 quadratic."""
    own = sorted(literal_runs(pattern), key=len)[-4:]
    worst = (0.0, "")
    for pumped in dict.fromkeys([*PUMPED, *own]):
        for before in ("", *own[-1:]):
            once, twice = (before + pumped * (size // len(pumped)) + "\x00" for size in (SIZE, 2 * SIZE))
            ratio = steps(pattern, twice, anchored) / steps(pattern, once, anchored)
            worst = max(worst, (ratio, f"{before!r}, {pumped!r}"))
    return worst


@pytest.mark.parametrize(("place", "pattern", "anchored"), PATTERNS, ids=[place for place, *_ in PATTERNS])
def test_steps_grow_with_the_length_of_the_text(place, pattern, anchored):
    ratio, text = worst_growth(pattern, anchored)
    assert ratio < 2.6, text


def test_the_count_finds_patterns_that_grow_faster():
    assert len(PATTERNS) > 20
    slow = {r"[\w.-]*secret=": "a", r"\b[a-z][a-z0-9+.-]*://": "a.", r"(\\*)\$\{": "\\", r"\s*end": " "}
    for pattern, pumped in slow.items():
        once, twice = (steps(re.compile(pattern), pumped * size, False) for size in (SIZE, 2 * SIZE))
        assert twice > 3.4 * once, pattern
    once, twice = (steps(re.compile(r"\s*end"), " " * size, True) for size in (SIZE, 2 * SIZE))
    assert twice < 2.6 * once


@settings(max_examples=40)
@given(st.lists(st.sampled_from([*PUMPED, "password: ", "hf_" + "a" * 16, "'", "?sig=", "@", "null"])).map("".join))
def test_the_count_follows_the_search_of_python(text):
    for pattern in (redaction._NAMED, redaction._URL, redaction._USER_IN_URL, redaction._SHAPES):
        assert list(StepCounter(pattern).spans(text)) == [match.span() for match in pattern.finditer(text)]


@pytest.mark.parametrize("part", ["a=", ".", "QUJD", "word ", "https://a.b/c?d=e&", "secret", "-----BEGIN ", "x:"])
def test_redaction_of_long_text_takes_steps_in_proportion(part):
    """The sum over all patterns of `redact`, on the texts that took 8 to over 20 s for 10,000 characters."""
    found = [pattern for pattern in vars(redaction).values() if isinstance(pattern, re.Pattern)]
    once, twice = (sum(steps(pattern, part * (size // len(part)), False) for pattern in found) for size in (150, 300))
    assert twice < 2.6 * once
    assert twice < 100 * 300
