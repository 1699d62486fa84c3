"""The user turn: the client's template to the letter, and back to its parts only where there is one reading."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankllm_composer.permutations import MAX_CANDIDATES, PermutationError, identifiers
from rankllm_composer.user_turn import (
    SYSTEM_MESSAGE,
    PromptError,
    UserTurn,
    clean_query,
    document_text,
    num_announced,
    parse_user_turn,
    passage_word_limit,
    render_user_turn,
    truncate_passage,
)

STYLES = tuple(MAX_CANDIDATES)
LETTERS_TURN = (
    "I will provide you with 2 passages, each indicated by an alphabetical identifier []. Rank the passages based on "
    "their relevance to the search query: who was first.\n"
    "[A] One passage.\n"
    "[B] Another passage.\n"
    "Search Query: who was first.\n"
    "Rank the 2 passages above based on their relevance to the search query. All the passages should be included and "
    "listed using identifiers, in descending order of relevance. The output format should be [] > [], e.g., [B] > [A], "
    "Answer concisely and directly and only respond with the ranking results, do not say any word or explain."
)
NUMBERS_TURN = (
    LETTERS_TURN.replace("an alphabetical", "a numerical")
    .replace("\n[A]", "\n[1]")
    .replace("\n[B]", "\n[2]")
    .replace("[B] > [A]", "[2] > [1]")
)
# Texts made of what the layout is made of.
ATOMS = [
    "\n",
    "[A] ",
    "[B] ",
    "[C] ",
    "[1] ",
    "\n[A] ",
    "\n[B] ",
    "\n[C] ",
    ".",
    "q",
    " ",
    ".\n[A] ",
    "\nSearch Query: q.",
]
tricky_texts = st.lists(st.sampled_from(ATOMS), max_size=4).map("".join)
any_texts = st.one_of(tricky_texts, st.text(max_size=20), st.text(st.characters(), max_size=5))


def test_template_is_the_clients() -> None:
    passages = ("One passage.", "Another passage.")
    assert render_user_turn("who was first", passages) == LETTERS_TURN
    assert render_user_turn("who was first", passages, "numbers") == NUMBERS_TURN
    assert SYSTEM_MESSAGE == (
        "You are RankLLM, an intelligent assistant that can rank passages based on their relevancy to the query"
    )


def test_published_records_round_trip(golden: Path) -> None:
    for record in json.loads((golden / "records.json").read_text(encoding="utf-8")):
        system, user, response = (turn["value"] for turn in record["conversations"])
        parts = parse_user_turn(user)
        assert system == SYSTEM_MESSAGE
        assert len(parts.passages) == num_announced(user) == response.count("[")
        assert render_user_turn(parts.query, parts.passages, parts.style) == user


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("num_passages", [1, 2, 9, 10, 26])
def test_round_trip_of_every_length(style: str, num_passages: int) -> None:
    passages = tuple(f"passage {i} has [A], [B] [{i + 1}] and [10] in it" for i in range(num_passages))
    user = render_user_turn("a query. with [B] in it?", passages, style)
    assert num_announced(user) == num_passages
    assert parse_user_turn(user) == UserTurn("a query. with [B] in it?", passages, style)


@pytest.mark.parametrize(
    "passages",
    [
        ("see [B] below", "[A] is above"),
        ("one\ntwo\nthree", "four"),
        ("", ""),
        ("[B] opens a passage", "[A] too"),  # not a line: its own identifier stands before it
        ("lists\n[C] maps\n[A] tables", "and\n[A] again"),  # out of their turn, so no marks
        ("lists\n[B]without a space", "end"),
        ("a", "b\nSearch Query: another."),
        (" spaces ", "\ttabs\t"),
    ],
)
def test_round_trip_of_passages_that_look_like_the_layout(passages: tuple[str, ...]) -> None:
    user = render_user_turn("query", passages)
    assert parse_user_turn(user).passages == passages


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "opens with 'I will provide you with N passages"),
        ("Rank these passages", "found 'Rank these passages'"),
        (LETTERS_TURN.replace("2 passages, each", "27 passages, each"), "found 27, allowed with letters is 1 to 26"),
        (LETTERS_TURN.replace("2 passages, each", "0 passages, each"), "opens with"),
        (LETTERS_TURN.replace("2 passages, each", "3 passages, each"), "the client's closing"),
        (LETTERS_TURN.replace(" 2 passages", " 3 passages"), r"no query that comes twice with \[A\] to \[C\] between"),
        (LETTERS_TURN.replace(" 2 passages", " 1 passages"), r"found a passage \[B\] where 1 are announced"),
        (LETTERS_TURN.replace("e.g., [B] > [A]", "e.g., [2] > [1]"), "the client's closing"),
        (LETTERS_TURN + "\n", "the client's closing"),
        (LETTERS_TURN.replace("\n[B]", " [B]"), r"each opening a line"),
        (LETTERS_TURN.replace("\n[A]", "\n[C]"), r"each opening a line"),
        (LETTERS_TURN.replace("Search Query: who", "Search Query: what"), "no query that comes twice"),
        (LETTERS_TURN.replace("One", "One\n[B] two"), "several readings"),
        (LETTERS_TURN.replace("an alphabetical", "a numerical"), "the client's closing"),
        (NUMBERS_TURN.replace("\n[2]", "\n[B]"), "each opening a line"),
    ],
)
def test_parse_refuses(text: str, told: str) -> None:
    with pytest.raises(PromptError, match=told):
        parse_user_turn(text)


def readings_one_by_one(text: str, num_passages: int) -> list[UserTurn]:
    """Every query and passages of which `text` could have been rendered, by trying every place for every cut."""
    names = identifiers(num_passages)
    start = text.index("query: ") + len("query: ")
    found = []
    for end in range(start, len(text)):
        query = text[start:end]
        body_end = len(text) - len(render_user_turn(query, [""] * num_passages).rpartition("\n")[2]) - 1
        body_end -= len(f"\nSearch Query: {query}.")
        body = text[end:body_end]
        opening = f".\n[{names[0]}] "
        if not body.startswith(opening):
            continue
        places = [[i for i in range(len(body)) if body.startswith(f"\n[{name}] ", i)] for name in names[1:]]
        for cuts in itertools.product(*places):
            starts = [len(opening), *(cut + len("\n[B] ") for cut in cuts)]
            passages = tuple(body[begin:stop] for begin, stop in zip(starts, [*cuts, len(body)]))
            if render_user_turn(query, passages) == text:
                found.append(UserTurn(query, passages, "letters"))
    return list(dict.fromkeys(found))


@given(tricky_texts, st.lists(tricky_texts, min_size=1, max_size=3))
def test_parse_gives_the_one_reading_or_none(query: str, passages: list[str]) -> None:
    text = render_user_turn(query, passages)
    readings = readings_one_by_one(text, len(passages))
    assert UserTurn(query, tuple(passages), "letters") in readings
    following = identifiers(len(passages) + 1)[-1]
    if len(readings) == 1 and f"\n[{following}] " not in passages[-1]:
        assert parse_user_turn(text) == readings[0]
    else:
        with pytest.raises(PromptError):
            parse_user_turn(text)


@given(any_texts, st.lists(any_texts, min_size=1, max_size=26), st.sampled_from(STYLES))
def test_parse_is_the_inverse_or_refuses(query: str, passages: list[str], style: str) -> None:
    try:
        parts = parse_user_turn(render_user_turn(query, passages, style))
    except PromptError:
        return
    assert parts == UserTurn(query, tuple(passages), style)


@given(st.data())
def test_parse_of_damaged_turns_round_trips_or_refuses(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([LETTERS_TURN, NUMBERS_TURN]))
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    text = text[:start] + data.draw(any_texts) + text[end:]
    try:
        parts = parse_user_turn(text)
    except PromptError:
        return
    assert render_user_turn(parts.query, parts.passages, parts.style) == text


@given(st.one_of(st.text(), any_texts))
def test_parse_of_any_text_raises_nothing_else(text: str) -> None:
    with pytest.raises(PromptError):
        parse_user_turn(text)


def test_parse_of_a_long_hostile_text_ends() -> None:
    # 3,000 places for the query to end, and as many for a passage to begin: work grows with the text, not its subsets.
    hostile = ".\n[A] " * 3000 + "\n[B] " * 3000
    with pytest.raises(PromptError, match="several readings"):
        parse_user_turn(render_user_turn("query", [hostile, hostile]))


def test_render_refuses() -> None:
    with pytest.raises(PermutationError, match="found 0"):
        render_user_turn("query", [])
    with pytest.raises(PermutationError, match="found 27"):
        render_user_turn("query", [""] * 27)
    with pytest.raises(PermutationError, match="style"):
        render_user_turn("query", [""], "roman")


@pytest.mark.parametrize(
    ("num_passages", "words"),
    # 300 · 20 / n, rounded down
    [(1, 6000), (2, 3000), (3, 2000), (7, 857), (10, 600), (19, 315), (20, 300), (26, 230), (99, 60)],
)
def test_passage_word_limit(num_passages: int, words: int) -> None:
    assert passage_word_limit(num_passages) == words


def test_passage_word_limit_in_proportion() -> None:
    assert passage_word_limit(10, max_words=120) == 240


@pytest.mark.parametrize(
    ("text", "max_words", "expected"),
    [
        ("one two three", 2, "one two"),
        ("one two three", 9, "one two three"),
        ("  one\n\ttwo \u00a0 three ", 9, "one two three"),
        ("see [12] and [3], [A] and [x1]", 9, "see (12) and (3), [A] and [x1]"),
        ("see [12] there", 2, "see (12)"),
        ("the keeperâ€™s log", 9, "the keeper's log"),
        ("salt &amp; sugar", 9, "salt & sugar"),
        ("salt &amp; <sugar>", 9, "salt &amp; <sugar>"),  # looks like HTML, so it is left alone
        ("one two", 0, ""),
        ("", 5, ""),
    ],
)
def test_truncate_passage(text: str, max_words: int, expected: str) -> None:
    assert truncate_passage(text, max_words) == expected


@given(st.one_of(st.text(), st.text(st.characters())), st.integers(0, 5))
def test_truncated_passages_are_one_line_of_few_words(text: str, max_words: int) -> None:
    passage = truncate_passage(text, max_words)
    assert len(passage.split()) <= max_words
    assert passage == " ".join(passage.split())
    user = render_user_turn("query", [passage, passage])
    assert parse_user_turn(user).passages == (passage, passage)


def test_clean_query() -> None:
    assert clean_query("what is [12] in [A] of  [1990]?") == "what is (12) in [A] of  (1990)?"


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"text": "a"}, "a"),
        ({"passage": "f", "body": "e", "content": "d", "contents": "c", "segment": "b"}, "b"),
        ({"contents": "c", "content": "d"}, "c"),
        ({"text": "a", "title": "T"}, "Title: T Content: a"),
        ({"text": "a", "title": ""}, "a"),
        ({"text": "a", "title": None}, "a"),
        ({"text": ""}, ""),
    ],
)
def test_document_text(document: dict, text: str) -> None:
    assert document_text(document) == text


@pytest.mark.parametrize("document", [{}, {"docid": "7"}, {"text": None}, {"text": ["a"]}, {"text": "a", "title": 7}])
def test_document_without_text(document: dict) -> None:
    with pytest.raises(PromptError, match="allowed is a text under one of text, segment"):
        document_text(document)
