"""The user turn: the client's template to the letter, back to its parts, and prompts that are worded otherwise."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankllm_composer.errors import PromptError
from rankllm_composer.prompts.permutations import MAX_CANDIDATES, identifiers
from rankllm_composer.prompts.record import Record
from rankllm_composer.prompts.user_turn import (
    SYSTEM_MESSAGE,
    UserTurn,
    clean_query,
    document_text,
    join_words,
    num_announced,
    parse_user_turn,
    passage_words,
    read_user_turn,
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
    ("text", "message"),
    [
        ("", "opens with 'I will provide you with N passages"),
        ("Rank these passages", "is 'Rank these passages'"),
        (LETTERS_TURN.replace("2 passages, each", "27 passages, each"), "is 27; expected 1 to 26 with letters"),
        (LETTERS_TURN.replace("2 passages, each", "0 passages, each"), "opens with"),
        (LETTERS_TURN.replace("2 passages, each", "3 passages, each"), "the client's closing"),
        (LETTERS_TURN.replace(" 2 passages", " 3 passages"), r"no query that occurs twice with \[A\] to \[C\] between"),
        (LETTERS_TURN.replace(" 2 passages", " 1 passages"), r"has a passage \[B\] but announces 1"),
        (LETTERS_TURN.replace("e.g., [B] > [A]", "e.g., [2] > [1]"), "the client's closing"),
        (LETTERS_TURN + "\n", "the client's closing"),
        (LETTERS_TURN.replace("\n[B]", " [B]"), r"each at the start of a line"),
        (LETTERS_TURN.replace("\n[A]", "\n[C]"), r"each at the start of a line"),
        (LETTERS_TURN.replace("Search Query: who", "Search Query: what"), "no query that occurs twice"),
        (LETTERS_TURN.replace("One", "One\n[B] two"), "several readings"),
        (LETTERS_TURN.replace("an alphabetical", "a numerical"), "the client's closing"),
        (NUMBERS_TURN.replace("\n[2]", "\n[B]"), "each at the start of a line"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
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


OPENING = (
    "I will provide you with {num} passages, each indicated by {kind} identifier []. Rank the passages based on their "
    "relevance to the search query: "
)
CLOSING = (
    "Rank the {num} passages above based on their relevance to the search query. All the passages should be included "
    "and listed using identifiers, in descending order of relevance. The output format should be [] > [], e.g., "
    "{example}, Only respond with the ranking results, do not say any word or explain."
)
NUM_PASSAGES = [2, 9, 20]
# What prompts of other versions change in the layout: (the client's text, theirs) at every place where it stands.
WORDINGS: dict[str, list[tuple[str, str]]] = {
    "blank lines between passages": [("\n[", "\n\n[")],
    "blank lines before the query": [("\nSearch Query", "\n\nSearch Query")],
    "blank lines before the last words": [("\nRank the", "\n\nRank the")],
    "blank lines everywhere": [("\n", "\n\n")],
    "breaks of Windows": [("\n", "\r\n")],
    "a space at the end of lines": [("\n", " \n")],
    "a break in the opening": [("[]. Rank", "[]. \nRank")],
    "another example": [("[B] > [A]", "[D] > [B]"), ("[2] > [1]", "[4] > [2]")],
    "the example of the other style": [("[B] > [A]", "[2] > [1]")],
    "older last words": [("Answer concisely and directly and only respond", "Only respond")],
    "other last words": [(", do not say any word or explain.", ".")],
    "a break at the end": [("or explain.", "or explain.\n")],
    "a break before": [("I will", "\nI will")],
    "number identifier": [("a numerical identifier", "number identifier")],
    "a alphabetical identifier": [("an alphabetical", "a alphabetical"), ("a numerical", "an numerical")],
    "the other kind in words": [("an alphabetical", "a numerical")],
    "no kind of search": [("to the search query: ", "to query: ")],
    "no full stops": [("who was first.", "who was first")],
    "a full stop at first": [("Search Query: who was first.", "Search Query: who was first")],
    "a full stop at last": [("search query: who was first.", "search query: who was first")],
    "an identifier on its own line": [("[A] ", "[A]\n"), ("[1] ", "[1]\n")],
    "a small letter": [("Search Query:", "Search query:")],
}
# What passages may hold that looks like the layout, beside which the marks stay where they are.
PASSAGES = {
    "plain": "One passage.",
    "line breaks": "one\n\ntwo\nthree",
    "its own identifier": "one\n[A] two\n[1] three",
    "an identifier further on": "one [B] [2] two",
    "an identifier of no passage": "one\n[Z] two\n[99] three\n[AB] four\n[0] five\n[] six",
    "a query": "one\nSearch Query: two.\nthree",
    "a question": "one\nRank the 7 passages above",
    "nothing": "",
}


def worded(text: str, wording: str) -> str:
    for clients, theirs in WORDINGS[wording]:
        text = text.replace(clients, theirs)
    return text


@pytest.mark.parametrize("num_passages", NUM_PASSAGES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("wording", WORDINGS)
def test_read_takes_other_wordings(wording: str, style: str, num_passages: int) -> None:
    passages = tuple(f"passage {i} on [A], [B] and [10]" for i in range(num_passages))
    clients = render_user_turn("who was first", passages, style)
    text = worded(clients, wording)
    found = read_user_turn(text)
    assert (found.query, found.style) == ("who was first", style)
    assert tuple(passage.strip() for passage in found.passages) == passages
    # A break before the query's line may as well end the last passage: rendered, that is this text.
    assert Record("r", "", text, "").has_standard_prompt == (
        text == clients or wording == "blank lines before the query"
    )


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("passage", PASSAGES)
def test_read_takes_passages_that_look_like_the_layout(passage: str, wording: str, style: str) -> None:
    passages = (PASSAGES[passage], "end")
    text = worded(render_user_turn("who was first", passages, style), wording)
    found = read_user_turn(text)
    assert (found.query, found.style, len(found.passages)) == ("who was first", style, 2)
    assert [text.split() for text in found.passages] == [worded(f"\n{text}", wording).split() for text in passages]


def test_read_takes_all_changes_at_once() -> None:
    opening = OPENING.format(num=20, kind="number").replace("search query", "query")
    body = "".join(f"\n\n[{i}] passage {i}\nof two lines" for i in range(1, 21))
    closing = CLOSING.format(num=20, example="[4] > [2]")
    text = f"{opening}who was first{body}\n\nSearch Query: who was first. \n{closing}\n"
    assert read_user_turn(text) == UserTurn(
        "who was first", tuple(f"passage {i}\nof two lines" for i in range(1, 21)), "numbers"
    )


@pytest.mark.parametrize(
    ("query", "again", "read"),
    [
        ("who", "who", "who"),
        ("who.", "who.", "who"),
        ("who..", "who.", "who."),
        ("who lives in the U.S.", "who lives in the U.S..", "who lives in the U.S"),
        ("who  was\nfirst.", "who was first", "who  was\nfirst"),
        (".", "", ""),
        ("who? [A] or [B]?", "who? [A] or [B]?", "who? [A] or [B]?"),
    ],
)
def test_read_finds_the_query_with_and_without_a_full_stop(query: str, again: str, read: str) -> None:
    text = f"{OPENING.format(num=2, kind='number')}{query}\n\n[1] one\n\n[2] two\n\nSearch Query: {again}\n\n"
    assert read_user_turn(text + CLOSING.format(num=2, example="[2] > [1]")).query == read


def test_read_begins_each_passage_at_the_earliest_line() -> None:
    passages = ("one\n[B] two", "three\n[B] four\n[C] five", "six\n[A] seven\n[C] eight")
    text = render_user_turn("query", passages)
    with pytest.raises(PromptError, match="several readings"):
        parse_user_turn(text)
    assert not Record("r", "", text, "").has_standard_prompt
    #      [A]    [B]                       [C]
    earliest = ("one", "two\n[B] three\n[B] four", "five\n[C] six\n[A] seven\n[C] eight")
    assert read_user_turn(text) == UserTurn("query", earliest, "letters")


# A fault → what it changes, in letters, in a list of 3, and what the error must say.
FAULTS: dict[str, tuple[list[tuple[str, str]], str]] = {
    "a missing identifier": ([("\n[B] ", "\n")], r"no line after \[A\] that opens with \[B\]"),
    "a missing first identifier": ([("\n[A] ", "\n")], r"no line that opens with \[A\]"),
    "a missing last identifier": ([("\n[C] ", "\n")], r"no line after \[B\] that opens with \[C\]"),
    "an identifier within a line": ([("\n[B] ", " [B] ")], r"opens with \[B\]"),
    "identifiers in another order": (
        [("\n[A] ", "\n[?] "), ("\n[B] ", "\n[A] "), ("\n[?] ", "\n[B] ")],
        r"no line after \[A\] that opens with \[B\]",
    ),
    "an identifier twice": ([("\n[B] ", "\n[A] ")], r"no line after \[A\] that opens with \[B\]"),
    "an identifier of the other style": ([("\n[B] ", "\n[2] ")], r"opens with \[B\]"),
    "a small identifier": ([("\n[B] ", "\n[b] ")], r"opens with \[B\]"),
    "fewer passages than announced": ([(" 3 passages", " 4 passages")], r"no line after \[C\] that opens with \[D\]"),
    "more passages than announced": ([(" 3 passages", " 2 passages")], r"has a passage \[C\] but announces 2"),
    "two numbers of passages": ([("Rank the 3", "Rank the 4")], "announces 3 passages but asks to rank 4"),
    "letters beyond Z": ([(" 3 passages", " 27 passages")], "is 27; expected 1 to 26 with letters"),
    "no number": ([("with 3 passages", "with passages")], "opening like the client's"),
    "no passages": ([(" 3 passages", " 0 passages")], "opening like the client's"),
    "two queries": ([("Search Query: who", "Search Query: what")], "'what was first.' after them; expected one query"),
    "no query again": ([("Search Query:", "")], "closing like the client's"),
    "no closing": ([("Rank the 3 passages above", "")], "closing like the client's"),
    "another task": ([("I will provide you with", "Below are")], "opening like the client's"),
    "another kind": ([("an alphabetical", "a Roman")], "opening like the client's"),
}


@pytest.mark.parametrize("wording", ["blank lines everywhere", "older last words", "no full stops"])
@pytest.mark.parametrize("fault", FAULTS)
def test_read_refuses(fault: str, wording: str) -> None:
    changes, message = FAULTS[fault]
    text = render_user_turn("who was first", ["One.", "Two.", "Three."])
    for whole, broken in changes:
        assert whole in text
        text = text.replace(whole, broken)
    with pytest.raises(PromptError, match=message):
        read_user_turn(worded(text, wording))


@given(any_texts, st.lists(any_texts, min_size=1, max_size=5), st.sampled_from(STYLES))
def test_read_takes_what_parse_takes_with_the_same_result(query: str, passages: list[str], style: str) -> None:
    text = render_user_turn(query, passages, style)
    try:
        parts = parse_user_turn(text)
    except PromptError:
        assert not Record("r", "", text, "").has_standard_prompt
        return
    assert Record("r", "", text, "").has_standard_prompt
    assert read_user_turn(text) == parts


plain_texts = st.lists(st.text("abc.,?! ", min_size=1, max_size=6), min_size=1, max_size=4).map("\n".join)


@given(
    st.text("abc?! ", min_size=1).map(str.strip).filter(bool),
    st.lists(plain_texts.map(str.strip), min_size=1, max_size=26),
    st.sampled_from(STYLES),
    st.sampled_from(list(WORDINGS)),
)
def test_read_gives_the_parts_in_any_wording(query: str, passages: list[str], style: str, wording: str) -> None:
    found = read_user_turn(worded(render_user_turn(query, passages, style), wording))
    assert (found.query, found.style) == (query, style)
    assert [text.split() for text in found.passages] == [text.split() for text in passages]


@given(st.one_of(st.text(), any_texts))
def test_read_of_any_text_raises_nothing_else(text: str) -> None:
    with pytest.raises(PromptError):
        read_user_turn(text)


@given(st.data())
def test_read_of_damaged_turns_finds_what_is_announced_or_refuses(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([LETTERS_TURN, NUMBERS_TURN])).replace("\n", "\n\n")
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    text = text[:start] + data.draw(any_texts) + text[end:]
    try:
        parts = read_user_turn(text)
    except PromptError:
        return
    assert f"with {len(parts.passages)} passages" in text
    assert all(f"\n[{name}]" in text for name in identifiers(len(parts.passages), parts.style))


def test_read_of_a_long_hostile_text_ends() -> None:
    hostile = ".\n[A] \nSearch Query: Rank the 2 passages above" * 20_000 + "\n[B] " * 20_000
    assert len(read_user_turn(render_user_turn("query", [hostile, hostile])).passages) == 2


def test_render_refuses() -> None:
    with pytest.raises(PromptError, match="candidates is 0"):
        render_user_turn("query", [])
    with pytest.raises(PromptError, match="candidates is 27"):
        render_user_turn("query", [""] * 27)
    with pytest.raises(PromptError, match="style"):
        render_user_turn("query", [""], "roman")


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


CHINESE = "检索模型按照与查询的相关性对段落排序、这一段没有任何空格。" * 3
URL = "https://example.org/" + "a1b2c3d4/" * 12  # 128 characters
BASE64 = "QUJDREVGR0hJSktM" * 40


@pytest.mark.parametrize(
    ("text", "max_words", "expected"),
    [
        (CHINESE, 12, CHINESE[:12]),
        (CHINESE, 999, CHINESE),
        (f"two words {CHINESE}", 7, f"two words {CHINESE[:5]}"),
        ("ภาษาไทยไม่มีช่องว่างระหว่างคำ" * 2, 6, "ภาษาไท"),
        ("日本語とEnglishのword" * 5, 11, "日本語とEnglishのword日本語と"),
        ("北京 is 東京, not 서울", 3, "北京 is 東京,"),  # short words count as in the client
        ("한국어는 띄어쓰기를 합니다", 2, "한국어는 띄어쓰기를"),
        (f"see {URL} there", 2, f"see {URL}"),
        (BASE64, 3, BASE64[:30]),
        (f"see {BASE64} there", 2, f"see {BASE64[:10]}"),
        (f"see {BASE64} there", 66, f"see {BASE64} there"),  # 640 characters are 64 pieces
        (f"see {BASE64} there", 65, f"see {BASE64}"),
        (f"a b {BASE64}", 2, "a b"),
    ],
)
def test_what_has_no_spaces_is_cut_between_characters(text: str, max_words: int, expected: str) -> None:
    assert truncate_passage(text, max_words) == expected


@given(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=400), max_size=4), st.integers(1, 9), st.integers(10, 200)
)
def test_a_passage_with_a_text_is_never_cut_to_nothing(texts: list[str], max_words: int, longest_word: int) -> None:
    words = passage_words(" ".join(texts))
    shown = join_words(words, max_words, longest_word)
    assert bool(shown) == bool(words)
    whole = clean_query(" ".join(words))
    assert all(part in whole for part in shown.split())
    assert len(shown) <= max_words * (longest_word + 1)


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
    with pytest.raises(PromptError, match="expected text under one of text, segment"):
        document_text(document)
