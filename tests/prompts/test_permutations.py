"""Permutations: the strict and the lenient reader, the writers, and what each refuses."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankllm_composer.errors import PromptError
from rankllm_composer.prompts.permutations import (
    MAX_CANDIDATES,
    ParsedAnswer,
    format_permutation,
    identifier_style,
    identifiers,
    parse_answer,
    parse_permutation,
    permutation_from_scores,
    ranks_from_permutation,
)

STYLES = tuple(MAX_CANDIDATES)
styles = st.sampled_from(STYLES)
permutations = st.integers(1, 26).flatmap(lambda n: st.permutations(range(n)).map(tuple))
# Texts made of what answers are made of, and of what breaks parsers.
answer_texts = st.lists(
    st.one_of(
        st.sampled_from("[]ABC120> -é²Ⅷ፩②中\n\x00\ud800"),
        st.sampled_from(["[A]", "[B]", "[1]", "[2]", "[10]", " > ", "</think>", "rank", "9" * 5000, "A" * 3000]),
    ),
    max_size=12,
).map("".join)


def test_identifiers() -> None:
    assert identifiers(3) == ("A", "B", "C")
    assert identifiers(26)[-1] == "Z"
    assert identifiers(3, "numbers") == ("1", "2", "3")
    assert identifiers(99, "numbers")[8:11] == ("9", "10", "11")


@pytest.mark.parametrize(
    ("num_candidates", "style", "message"),
    [
        (0, "letters", "is 0; expected 1 to 26 with letters"),
        (27, "letters", "is 27; expected 1 to 26 with letters. Use a shorter window, or numbers"),
        (-1, "numbers", "is -1; expected 1 to 99 with numbers"),
        (100, "numbers", "is 100; expected 1 to 99 with numbers. Use a shorter window"),
        (3, "roman", "is 'roman'; expected one of letters, numbers"),
    ],
)
def test_identifiers_refuse(num_candidates: int, style: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        identifiers(num_candidates, style)


@pytest.mark.parametrize(
    ("text", "permutation", "style"),
    [
        ("[A]", (0,), "letters"),
        ("[B] > [A]", (1, 0), "letters"),
        ("[C] > [A] > [B]", (2, 0, 1), "letters"),
        ("[2] > [1]", (1, 0), "numbers"),
        ("[10] > [9] > [8] > [7] > [6] > [5] > [4] > [3] > [2] > [1]", tuple(range(9, -1, -1)), "numbers"),
    ],
)
def test_text_and_permutation(text: str, permutation: tuple[int, ...], style: str) -> None:
    assert parse_permutation(text, len(permutation), style) == permutation
    assert format_permutation(permutation, style) == text
    assert identifier_style(text) == style


@given(permutations, styles)
def test_permutation_round_trips(permutation: tuple[int, ...], style: str) -> None:
    text = format_permutation(permutation, style)
    assert parse_permutation(text, len(permutation), style) == permutation
    assert parse_answer(text, len(permutation), style) == ParsedAnswer(permutation, 0, 0, 0, True)


@pytest.mark.parametrize(
    ("text", "num_candidates", "style", "message"),
    [
        ("[A] > [A] > [B]", 3, "letters", ("repeated: 'A'", "missing: 'C'")),
        ("[B] > [A]", 4, "letters", ("missing: 'C, D'",)),
        ("[B] > [A] > [C]", 2, "letters", ("beyond the list: 'C'", "expected each of [A] to [B] once")),
        ("[A] > [1]", 2, "letters", ("unknown: '1'", "missing: 'B'")),
        ("[a] > [B]", 2, "letters", ("unknown: 'a'",)),
        ("[AB] > [A]", 2, "letters", ("unknown: 'AB'",)),
        ("[А] > [B]", 2, "letters", ("unknown: 'А'",)),  # a Cyrillic А
        ("[01] > [2]", 2, "numbers", ("unknown: '01'",)),
        ("[100] > [1]", 2, "numbers", ("unknown: '100'",)),
        ("[3] > [1]", 2, "numbers", ("beyond the list: '3'", "missing: '2'")),
        ("[] > [A]", 1, "letters", ("unknown: ''",)),
        ("[A]>[B]", 2, "letters", ("joined by ' > ' and nothing else, e.g. '[B] > [A]'",)),
        ("[A] > [B] ", 2, "letters", ("joined by ' > '",)),
        ("\n[A] > [B]", 2, "letters", ("joined by ' > '",)),
        ("[A] > [B] > ", 2, "letters", ("joined by ' > '",)),
        ("A > B", 2, "letters", ("joined by ' > '",)),
        ("", 2, "letters", ("permutation is ''", "missing: 'A, B'")),
        ("[A] > [B]", 27, "letters", ("1 to 26",)),
    ],
)
def test_strict_reader_refuses(text: str, num_candidates: int, style: str, message: tuple[str, ...]) -> None:
    with pytest.raises(PromptError) as refusal:
        parse_permutation(text, num_candidates, style)
    for part in message:
        assert part in str(refusal.value)


@given(
    st.lists(st.sampled_from(["[A]", "[B]", "[C]", "[D]", " > ", ">", " ", "[", "]", "A"]), max_size=7).map("".join),
    st.integers(1, 3),
)
def test_strict_reader_accepts_the_permutations_and_nothing_else(text: str, num_candidates: int) -> None:
    allowed = {
        " > ".join(f"[{'ABC'[i]}]" for i in order): order for order in itertools.permutations(range(num_candidates))
    }
    if text in allowed:
        assert parse_permutation(text, num_candidates) == allowed[text]
    else:
        with pytest.raises(PromptError):
            parse_permutation(text, num_candidates)


@pytest.mark.parametrize("text", ["", "A > B", "[AB]", "[a]", "[100]", "[]", "[[", "[Ａ]", "[²]"])
def test_no_style_where_no_candidate_is_named(text: str) -> None:
    with pytest.raises(PromptError, match="names no candidate"):
        identifier_style(text)


@pytest.mark.parametrize(
    ("text", "num_candidates", "style", "expected"),
    [
        # permutation, repeated, out of range, missing, well formed
        ("[C] > [A] > [B]", 3, "letters", ((2, 0, 1), 0, 0, 0, True)),
        (" [B] > [A]\n", 2, "letters", ((1, 0), 0, 0, 0, True)),
        ("[B]>[A]", 2, "letters", ((1, 0), 0, 0, 0, False)),
        ("B, A", 2, "letters", ((1, 0), 0, 0, 0, False)),
        ("[C] > [C] > [A]", 3, "letters", ((2, 0, 1), 1, 0, 1, False)),
        ("[D] > [B] > [D]", 3, "letters", ((1, 0, 2), 0, 2, 2, False)),
        ("", 3, "letters", ((0, 1, 2), 0, 0, 3, False)),
        ("[2] > [1]", 3, "letters", ((0, 1, 2), 0, 0, 3, False)),
        ("b > a", 2, "letters", ((0, 1), 0, 2, 2, False)),  # small letters are numbers 34 and 33
        ("AB", 12, "letters", ((11, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10), 0, 0, 11, False)),  # 1 and 2 joined: the 12th
        ("I think [B] > [A]", 9, "letters", ((8, 1, 0, 2, 3, 4, 5, 6, 7), 0, 1, 6, False)),  # I is the ninth
        ("<think>[A] > [B]</think>[B] > [A]", 2, "letters", ((1, 0), 0, 0, 0, False)),
        ("[2] > [1]", 2, "numbers", ((1, 0), 0, 0, 0, True)),
        ("2 1", 2, "numbers", ((1, 0), 0, 0, 0, False)),
        ("[12] > [3] > [0] > [3]", 3, "numbers", ((2, 0, 1), 1, 2, 2, False)),
        ("[②] > [¹]", 2, "numbers", ((1, 0), 0, 0, 0, False)),
        ("[２] > [₁]", 2, "numbers", ((1, 0), 0, 0, 0, False)),
        ("[٢] > [١]", 2, "numbers", ((1, 0), 0, 0, 0, False)),  # Arabic digits are decimals
        ("[2] > [፩]", 2, "numbers", ((0, 1), 0, 2, 2, False)),  # an Ethiopic digit is none: nothing is read
        ("9" * 5000, 2, "numbers", ((0, 1), 0, 1, 2, False)),
        ("[B] > [A]", 2, "numbers", ((0, 1), 0, 0, 2, False)),
    ],
)
def test_lenient_reader(text: str, num_candidates: int, style: str, expected: tuple) -> None:
    assert parse_answer(text, num_candidates, style) == ParsedAnswer(*expected)


@given(st.one_of(st.text(), answer_texts), st.integers(1, 26), styles)
def test_lenient_reader_always_gives_a_whole_permutation(text: str, num_candidates: int, style: str) -> None:
    parsed = parse_answer(text, num_candidates, style)
    assert sorted(parsed.permutation) == list(range(num_candidates))
    appended = parsed.permutation[num_candidates - parsed.num_missing :]
    assert list(appended) == sorted(appended)
    if parsed.is_well_formed:
        assert (parsed.num_repeated, parsed.num_out_of_range, parsed.num_missing) == (0, 0, 0)
        assert parse_permutation(text.strip(), num_candidates, style) == parsed.permutation


@given(st.one_of(st.text(), answer_texts), st.integers(-3, 120), styles)
def test_strict_readers_raise_nothing_else(text: str, num_candidates: int, style: str) -> None:
    try:
        assert format_permutation(parse_permutation(text, num_candidates, style), style) == text
    except PromptError as error:
        assert len(str(error)) < 1000  # however long the text
    try:
        assert identifier_style(text) in STYLES
    except PromptError as error:
        assert len(str(error)) < 1000


def test_ranks() -> None:
    # The best is candidate 1, then 2, then 0: candidate 0 is at place 2, 1 at 0, 2 at 1.
    assert ranks_from_permutation((1, 2, 0)) == (2, 0, 1)


@given(permutations)
def test_ranks_invert_permutations(permutation: tuple[int, ...]) -> None:
    ranks = ranks_from_permutation(permutation)
    assert [ranks[candidate] for candidate in permutation] == list(range(len(permutation)))


@pytest.mark.parametrize("values", [(0, 0), (1, 2), (0, 2), (-1, 0), (0.5, 1.5)])
@pytest.mark.parametrize("function", [ranks_from_permutation, format_permutation])
def test_no_permutation(function, values: tuple[int, ...]) -> None:
    with pytest.raises(PromptError, match="expected each of 0 to 1 exactly once"):
        function(values)


def test_format_refuses_what_the_style_cannot_name() -> None:
    with pytest.raises(PromptError, match="1 to 26"):
        format_permutation(range(27))
    with pytest.raises(PromptError, match="candidates is 0"):
        format_permutation(())


@pytest.mark.parametrize(
    ("scores", "permutation"),
    [
        ((0.1, 0.9, 0.5), (1, 2, 0)),
        ((0.5, 0.5, 0.5), (0, 1, 2)),
        ((0.0, 1.0, -0.0, 1.0), (1, 3, 0, 2)),
        ((-math.inf, 0.0, math.inf, -math.inf), (2, 1, 0, 3)),
        ((), ()),
    ],
)
def test_permutation_from_scores(scores: tuple[float, ...], permutation: tuple[int, ...]) -> None:
    assert permutation_from_scores(scores) == permutation


def test_permutation_from_scores_refuses_nan() -> None:
    with pytest.raises(PromptError, match="NaN at candidate 1"):
        permutation_from_scores((0.0, math.nan))


@given(st.lists(st.floats(allow_nan=False), max_size=30))
def test_permutation_from_scores_descends_and_keeps_ties(scores: list[float]) -> None:
    permutation = permutation_from_scores(scores)
    assert sorted(permutation) == list(range(len(scores)))
    for better, worse in itertools.pairwise(permutation):
        assert scores[better] > scores[worse] or (scores[better] == scores[worse] and better < worse)
