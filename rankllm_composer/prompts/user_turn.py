"""The user turn of a request: query and passages ⇄ its text, and what is done to a passage before it goes in.

All of it follows the inference client (rank_llm 0.25.7) to the letter, so that a model is trained on the prompts it
will be served.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rankllm_composer.errors import PromptError
from rankllm_composer.prompts.permutations import MAX_CANDIDATES, IdentifierStyle, identifiers

SYSTEM_MESSAGE = (
    "You are RankLLM, an intelligent assistant that can rank passages based on their relevancy to the query"
)


_KIND = {"letters": "an alphabetical", "numbers": "a numerical"}


_EXAMPLE = {"letters": "[B] > [A]", "numbers": "[2] > [1]"}


_OPENING = (
    "I will provide you with {num} passages, each indicated by {kind} identifier []. "
    "Rank the passages based on their relevance to the search query: "
)


_CLOSING = (
    "\nRank the {num} passages above based on their relevance to the search query. "
    "All the passages should be included and listed using identifiers, in descending order of relevance. "
    "The output format should be [] > [], e.g., {example}, "
    "Answer concisely and directly and only respond with the ranking results, do not say any word or explain."
)


_OPENING_PATTERN = re.compile(
    re.escape(_OPENING.format(num="NUM", kind="KIND"))
    .replace("NUM", "([1-9][0-9]{0,3})")
    .replace("KIND", "(an alphabetical|a numerical)"),
)


# The same parts as prompts of other versions word them.
_ANY_OPENING = re.compile(
    r"\s*I will provide you with (?P<num>[1-9][0-9]{0,3}) passages, each indicated by (?:an? )?"
    r"(?:(?P<letters>alphabet(?:ic|ical)?|letter)|numerical|numeric|number) identifiers? \[\]\.?\s+"
    r"Rank the passages based on their relevance to (?:the )?(?:search )?query:",
    re.IGNORECASE,
)


# These begin with a letter or break of their own, so that long texts are searched fast.
_ANY_QUERY_AGAIN = re.compile(r"\n[Ss]earch [Qq]uery:")


_ANY_CLOSING = re.compile(r"Rank the (?P<num>[1-9][0-9]{0,3}) passages above\b")


_FIRST_MARK = re.compile(r"\n\[(?:(?P<letters>A)|1)\](?=\s)")


_MARKS: dict[IdentifierStyle, re.Pattern[str]] = {
    "letters": re.compile(r"\n\[([A-Z])\](?=\s)"),
    "numbers": re.compile(r"\n\[([1-9][0-9]?)\](?=\s)"),
}


_NUMBER_IN_BRACKETS = re.compile(r"\[(\d+)\]")


_DOCUMENT_FIELDS = ("text", "segment", "contents", "content", "body", "passage")


@dataclass(frozen=True, slots=True)
class UserTurn:
    """What a user turn is made of; see `render_user_turn`.

    Attributes:
        query: without the full stop that follows it.
        passages: in presentation order.
        style: how they are named.
        is_standard: True if the text is exactly what `render_user_turn` writes, with one reading.
    """

    query: str
    passages: tuple[str, ...]
    style: IdentifierStyle
    is_standard: bool = field(default=True, compare=False)


def clean_query(query: str) -> str:
    """Query as the client shows it: `[12]` becomes `(12)`, lest it look like an identifier."""
    return _NUMBER_IN_BRACKETS.sub(r"(\1)", query)


def document_text(document: Mapping[str, Any]) -> str:
    """Text of a document as the client takes it: its first field of text, segment, contents, content, body, passage.

    A title that is not empty leads it: `Title: … Content: …`.

    Raises:
        PromptError: the document has none of these fields, or what it holds is no text.
    """
    title = document.get("title") or ""
    for name in _DOCUMENT_FIELDS:
        if name in document:
            text = document[name]
            if not isinstance(text, str) or not isinstance(title, str):
                break
            return f"Title: {title} Content: {text}" if title else text
    raise PromptError(
        f"document: found {_shorten(dict(document))}, allowed is a text under one of {', '.join(_DOCUMENT_FIELDS)}; "
        "a title, where there is one, is text too"
    )


def passage_word_limit(num_passages: int, max_words: int = 300) -> int:
    """Words the client allows a passage: `max_words` in a window of 20, else in proportion: max_words · 20 / n."""
    return int(max_words * (20 / num_passages))


def truncate_passage(text: str, max_words: int) -> str:
    """Passage as the client shows it: repaired, cut to `max_words` words, single spaces, `[12]` → `(12)`."""
    from ftfy import fix_text

    words = fix_text(text.strip()).split()
    return _NUMBER_IN_BRACKETS.sub(r"(\1)", " ".join(words[:max_words]))


def render_user_turn(query: str, passages: Sequence[str], style: IdentifierStyle = "letters") -> str:
    """The user turn of a request, exactly as the client writes it; query and passages are taken as they are.

    Raises:
        PromptError: no passages, more than the style can name, or an unknown style.
    """
    names = identifiers(len(passages), style)
    opening = _OPENING.format(num=len(passages), kind=_KIND[style])
    body = "".join(f"[{name}] {passage}\n" for name, passage in zip(names, passages))
    closing = _CLOSING.format(num=len(passages), example=_EXAMPLE[style])
    return f"{opening}{query}.\n{body}Search Query: {query}.{closing}"


def num_announced(text: str) -> int | None:
    """Number of passages a user turn announces; None if it does not open as the client's template does."""
    opening = _OPENING_PATTERN.match(text)
    return int(opening[1]) if opening else None


def parse_user_turn(text: str) -> UserTurn:
    """Query, passages and identifier style of a user turn, the inverse of `render_user_turn`.

    Passages may hold line breaks and identifiers of their own. A parse is given only if it is the one reading of the
    text, so that `render_user_turn` of it is `text` and nothing else would have given this text.

    Raises:
        PromptError: the text is not of the layout, holds another number of passages than it announces, or can be read
            in more than one way.
    """
    opening = _OPENING_PATTERN.match(text)
    if opening is None:
        raise PromptError(
            f"user turn: found {_shorten(text)}, allowed is the client's layout, which opens with "
            f"{_OPENING.format(num='N', kind='an alphabetical')!r}"
        )
    num = int(opening[1])
    style: IdentifierStyle = "letters" if opening[2] == _KIND["letters"] else "numbers"
    try:
        names = identifiers(num, style)
    except PromptError as error:
        raise PromptError(f"user turn: {error}") from error
    closing = _CLOSING.format(num=num, example=_EXAMPLE[style])
    middle = text[opening.end() :].removesuffix(closing)  # query, passages and query again
    if len(middle) == len(text) - opening.end():
        raise PromptError(f"user turn: found …{text[-60:]!r} at the end, allowed is the client's closing {closing!r}")

    readings: list[UserTurn] = []
    for first in re.finditer(re.escape(f".\n[{names[0]}] "), middle):
        query = middle[: first.start()]
        again = f"\nSearch Query: {query}."
        if middle.endswith(again) and first.end() <= len(middle) - len(again):
            body = middle[first.end() : len(middle) - len(again)]
            readings += [UserTurn(query, passages, style) for passages in _readings(body, names)]
    if len(readings) != 1:
        told = (
            "a text with several readings, for an identifier opens more than one line"
            if readings
            else f"no query that comes twice with [{names[0]}] to [{names[-1]}] between, each opening a line"
        )
        raise PromptError(
            f"user turn: found {told}; allowed is the client's layout in one reading; give each passage one line"
        )
    beyond = identifiers(MAX_CANDIDATES[style], style)[num : num + 1]
    if beyond and f"\n[{beyond[0]}] " in readings[0].passages[-1]:
        raise PromptError(
            f"user turn: found a passage [{beyond[0]}] where {num} are announced; correct the number or the passages"
        )
    return readings[0]


def read_user_turn(text: str) -> UserTurn:
    """Query, passages and identifier style of a user turn that may be worded otherwise than the client's.

    What `parse_user_turn` takes is read by it. Beside that: white space between the parts, another example or other
    last words, the query with or without a full stop, the kind of identifier in other words, and passages whose lines
    look like the layout. Every passage begins at the earliest line that its identifier opens after the one before it.
    This tells how many passages there are and how they are named; it does not give the text back.

    Raises:
        PromptError: no opening or closing, identifiers that are missing, out of order or more than announced, two
            numbers of passages, or two queries.
    """
    with suppress(PromptError):
        return parse_user_turn(text)
    opening = _ANY_OPENING.match(text)
    if opening is None:
        raise PromptError(
            f"user turn: found {_shorten(text)}, allowed is a text that opens like the client's: "
            f"{_OPENING.format(num='N', kind='an alphabetical')!r}; correct the record or leave it out"
        )
    closing = _last(_ANY_CLOSING, text, opening.end(), len(text))
    again = closing and _last(_ANY_QUERY_AGAIN, text, opening.end(), closing.start())
    if closing is None or again is None:
        raise PromptError(
            f"user turn: found …{text[-60:]!r} at the end, allowed is a closing like the client's: a line 'Search "
            f"Query: …', then 'Rank the {opening['num']} passages above …'; correct the record or leave it out"
        )
    num, area = int(opening["num"]), (opening.end(), again.start() + 1)  # with the line break
    # What opens the lines decides: passages may have been renamed and the opening left as it was.
    kind = _FIRST_MARK.search(text, *area) or opening
    style: IdentifierStyle = "letters" if kind["letters"] else "numbers"
    marks = _earliest_marks(text, area, num, style)
    if int(closing["num"]) != num:
        raise PromptError(
            f"user turn: found {num} passages announced and {closing['num']} asked for; correct the record or leave it "
            "out"
        )
    query = text[opening.end() : marks[0].start()].strip()
    query_again = text[again.end() : closing.start()].strip()
    if _essence(query) != _essence(query_again):
        raise PromptError(
            f"user turn: found the query {_shorten(query)} before the passages and {_shorten(query_again)} after them, "
            "allowed is one query; correct the record or leave it out"
        )
    ends = [*(mark.start() for mark in marks[1:]), area[1]]
    passages = tuple(text[mark.end() : end].strip() for mark, end in zip(marks, ends))
    return UserTurn(query.removesuffix(".").rstrip(), passages, style, is_standard=False)


def _earliest_marks(text: str, area: tuple[int, int], num: int, style: IdentifierStyle) -> list[re.Match[str]]:
    """The lines of `area` that open with the first `num` identifiers in order, each as early as can be."""
    try:
        names = identifiers(num, style)
    except PromptError as error:
        raise PromptError(f"user turn: {error}") from error
    beyond = identifiers(MAX_CANDIDATES[style], style)[num : num + 1]
    marks: list[re.Match[str]] = []
    for mark in _MARKS[style].finditer(text, *area):
        if len(marks) < num and mark[1] == names[len(marks)]:
            marks.append(mark)
        elif len(marks) == num and mark[1] in beyond:
            raise PromptError(
                f"user turn: found a passage [{mark[1]}] where {num} are announced; correct the number or the passages"
            )
    if len(marks) < num:
        after = f" after [{names[len(marks) - 1]}]" if marks else ""
        raise PromptError(
            f"user turn: found no line{after} that opens with [{names[len(marks)]}]; allowed are {num} passages, as "
            f"announced, named [{names[0]}] to [{names[-1]}] in order; correct the record or leave it out"
        )
    return marks


def _last(pattern: re.Pattern[str], text: str, start: int, end: int) -> re.Match[str] | None:
    match = None
    for match in pattern.finditer(text, start, end):  # noqa: B007 - the last one is wanted
        pass
    return match


def _essence(query: str) -> str:
    """What must be the same where a query comes twice: its words, without full stops at the end."""
    return " ".join(query.split()).rstrip(". ")


def _readings(body: str, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The earliest and the latest way to cut `body`, which follows the first identifier, at the others in order.

    Every other way lies between the two, so if they are the same there is one reading. Gives none, one or two.
    """
    marks = [f"\n[{name}] " for name in names[1:]]
    earliest: list[int] = []
    place = 0
    for mark in marks:
        place = body.find(mark, place)
        if place < 0:
            return []
        earliest.append(place)
        place += len(mark)
    latest: list[int] = []
    place = len(body)
    for mark in reversed(marks):
        place = body.rfind(mark, 0, place)
        latest.append(place)
    latest.reverse()
    return [
        tuple(
            body[start:end]
            for start, end in zip([0, *(cut + len(mark) for cut, mark in zip(cuts, marks))], [*cuts, len(body)])
        )
        for cuts in ([earliest] if earliest == latest else [earliest, latest])
    ]


def _shorten(value: object) -> str:
    quoted = repr(value)
    return quoted if len(quoted) <= 80 else f"{quoted[:79]}…"
