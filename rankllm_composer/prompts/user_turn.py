"""The user turn of a prompt: rendered from query and passages, and parsed back; passages are cleaned and truncated.

Everything follows the inference client (rank_llm) exactly, so that a model is trained on the prompts that it is served.
All versions of `clients` write the same text; they differ in the words that a passage keeps.
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
    .replace("KIND", "(an alphabetical|a numerical)")
)

# The same parts in prompts of other versions.
_ANY_OPENING = re.compile(
    r"\s*I will provide you with (?P<num>[1-9][0-9]{0,3}) passages, each indicated by (?:an? )?"
    r"(?:(?P<letters>alphabet(?:ic|ical)?|letter)|numerical|numeric|number) identifiers? \[\]\.?\s+"
    r"Rank the passages based on their relevance to (?:the )?(?:search )?query:",
    re.IGNORECASE,
)

# These begin with a fixed character, so that long texts are searched fast.
_ANY_QUERY_AGAIN = re.compile(r"\n[Ss]earch [Qq]uery:")
_ANY_CLOSING = re.compile(r"Rank the (?P<num>[1-9][0-9]{0,3}) passages above\b")
_FIRST_MARK = re.compile(r"\n\[(?:(?P<letters>A)|1)\](?=\s)")
_MARKS: dict[IdentifierStyle, re.Pattern[str]] = {
    "letters": re.compile(r"\n\[([A-Z])\](?=\s)"),
    "numbers": re.compile(r"\n\[([1-9][0-9]?)\](?=\s)"),
}
_NUMBER_IN_BRACKETS = re.compile(r"\[(\d+)\]")
LONGEST_WORD = 200
"""Characters of a word that counts as one whatever it contains, as in the client."""

PIECE_CHARS = 10
"""Characters of a longer word that count as one."""

# Thai, Lao, Tibetan, Burmese, Khmer, Chinese and Japanese; Korean is written with spaces.
_SCRIPTS_WITHOUT_SPACES = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3001-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff01-\uff9f\U00020000-\U0003ffff"
)
_UNSPACED = re.compile(f"[{_SCRIPTS_WITHOUT_SPACES}]")
_PIECE = re.compile(f"[{_SCRIPTS_WITHOUT_SPACES}]|[^{_SCRIPTS_WITHOUT_SPACES}]{{1,{PIECE_CHARS}}}")
_DOCUMENT_FIELDS = ("text", "segment", "contents", "content", "body", "passage")


@dataclass(frozen=True, slots=True)
class UserTurn:
    """The parts of a user turn: the query without its full stop, and the passages in presentation order.

    `is_standard` is True if the text is exactly what `render_user_turn` writes, with one reading;
    `has_several_readings` if it is that, but a line in a passage opens like the next one (`[B] `).
    """

    query: str
    passages: tuple[str, ...]
    style: IdentifierStyle
    is_standard: bool = field(default=True, compare=False)
    has_several_readings: bool = field(default=False, compare=False)


def clean_query(query: str) -> str:
    """Query as the client shows it: `[12]` becomes `(12)`, which does not look like an identifier."""
    return _NUMBER_IN_BRACKETS.sub(r"(\1)", query)


def document_text(document: Mapping[str, Any]) -> str:
    """Text of a document as in the client: its first field of text, segment, contents, content, body, passage.

    A title comes first, if there is one: `Title: … Content: …`.

    Raises:
        PromptError: the document has none of these fields, or the field is not text.
    """
    title = document.get("title") or ""
    for name in _DOCUMENT_FIELDS:
        if name in document:
            text = document[name]
            if not isinstance(text, str) or not isinstance(title, str):
                break
            return f"Title: {title} Content: {text}" if title else text
    raise PromptError(
        f"document is {_shorten(dict(document))}; expected text under one of {', '.join(_DOCUMENT_FIELDS)}, and a "
        "title that is text if there is one"
    )


def truncate_passage(text: str, max_words: int) -> str:
    """Passage as the client shows it: repaired by ftfy, cut to `max_words` words, single spaces, `[12]` → `(12)`.

    Unlike in the client, a long word counts as several, see `join_words`.
    """
    return join_words(passage_words(text), max_words)


def passage_words(text: str) -> list[str]:
    """Words of a passage, after ftfy has repaired it."""
    from ftfy import fix_text

    return fix_text(text.strip()).split()


def join_words(words: Sequence[str], max_words: int, longest_word: int = LONGEST_WORD) -> str:
    """The first `max_words` words of a passage, as the client shows them.

    A word longer than `longest_word` characters (a URL, base64, text without spaces), or with more than a tenth of
    that of scripts without spaces, is cut and counted in pieces: each character of such a script, and up to 10 others,
    count as a word. The client counts it as one word, which it shows completely or not at all.
    """
    kept = words[:max_words]
    if any(_is_long(word, longest_word) for word in kept):
        kept, left = [], max_words
        for word in words:
            pieces = _PIECE.findall(word) if _is_long(word, longest_word) else [word]
            kept.append("".join(pieces[:left]))
            left -= len(pieces)
            if left <= 0:
                break
    return _NUMBER_IN_BRACKETS.sub(r"(\1)", " ".join(kept))


def _is_long(word: str, longest_word: int) -> bool:
    if len(word) > longest_word:
        return True
    limit = longest_word // PIECE_CHARS
    return len(word) > limit and not word.isascii() and len(_UNSPACED.findall(word)) > limit


def render_user_turn(query: str, passages: Sequence[str], style: IdentifierStyle = "letters") -> str:
    """Write the user turn of a prompt exactly as the client does; query and passages are not changed."""
    names = identifiers(len(passages), style)
    opening = _OPENING.format(num=len(passages), kind=_KIND[style])
    body = "".join(f"[{name}] {passage}\n" for name, passage in zip(names, passages))
    closing = _CLOSING.format(num=len(passages), example=_EXAMPLE[style])
    return f"{opening}{query}.\n{body}Search Query: {query}.{closing}"


def num_announced(text: str) -> int | None:
    """Number of passages that a user turn announces; None if its opening is not the client's."""
    opening = _OPENING_PATTERN.match(text)
    return int(opening[1]) if opening else None


def parse_user_turn(text: str) -> UserTurn:
    """Parse a user turn in exactly the client's layout; the inverse of `render_user_turn`.

    Passages may contain line breaks and identifiers. The parse is returned only if it is unambiguous:
    `render_user_turn` gives `text` for it, and for no other query and passages.

    Raises:
        PromptError: the text has another layout or another number of passages than it announces, or is ambiguous.
    """
    readings = _client_readings(text)
    if len(readings) > 1:
        raise PromptError(
            "user turn has several readings, because an identifier opens more than one line; expected the client's "
            "layout. Write each passage on one line."
        )
    num, style = len(readings[0].passages), readings[0].style
    beyond = identifiers(MAX_CANDIDATES[style], style)[num : num + 1]
    if beyond and f"\n[{beyond[0]}] " in readings[0].passages[-1]:
        raise PromptError(
            f"user turn has a passage [{beyond[0]}] but announces {num}. Correct the number or the passages."
        )
    return readings[0]


def read_user_turn(text: str) -> UserTurn:
    """Parse a user turn that may differ from the client's prompt.

    Tries `parse_user_turn` first. It also accepts white space between the parts, another example or closing, the query
    with or without a full stop, other words for the kind of identifier, and passages with lines that look like the
    layout. Every passage begins at the earliest line that its identifier opens after the previous passage.

    Raises:
        PromptError: opening or closing is missing; identifiers are missing, out of order or more than announced; or
            the two numbers of passages or the two queries differ.
    """
    with suppress(PromptError):
        return parse_user_turn(text)
    opening = _ANY_OPENING.match(text)
    if opening is None:
        raise PromptError(
            f"user turn is {_shorten(text)}; expected an opening like the client's: "
            f"{_OPENING.format(num='N', kind='an alphabetical')!r}. Correct the record or remove it."
        )
    closing = _last(_ANY_CLOSING, text, opening.end(), len(text))
    again = closing and _last(_ANY_QUERY_AGAIN, text, opening.end(), closing.start())
    if closing is None or again is None:
        raise PromptError(
            f"user turn ends with …{text[-60:]!r}; expected a closing like the client's: a line 'Search Query: …', "
            f"then 'Rank the {opening['num']} passages above …'. Correct the record or remove it."
        )
    num, area = int(opening["num"]), (opening.end(), again.start() + 1)  # with the line break
    # The identifiers themselves decide: passages may have been renamed without changing the opening.
    kind = _FIRST_MARK.search(text, *area) or opening
    style: IdentifierStyle = "letters" if kind["letters"] else "numbers"
    marks = _earliest_marks(text, area, num, style)
    if int(closing["num"]) != num:
        raise PromptError(
            f"user turn announces {num} passages but asks to rank {closing['num']}. Correct the record or remove it."
        )
    query = text[opening.end() : marks[0].start()].strip()
    query_again = text[again.end() : closing.start()].strip()
    if _normalize(query) != _normalize(query_again):
        raise PromptError(
            f"user turn has the query {_shorten(query)} before the passages and {_shorten(query_again)} after them; "
            "expected one query. Correct the record or remove it."
        )
    ends = [*(mark.start() for mark in marks[1:]), area[1]]
    passages = tuple(text[mark.end() : end].strip() for mark, end in zip(marks, ends))
    several = False
    with suppress(PromptError):
        several = len(_client_readings(text)) > 1
    query = query.removesuffix(".").rstrip()
    return UserTurn(query, passages, style, is_standard=False, has_several_readings=several)


def _client_readings(text: str) -> list[UserTurn]:
    """Ways to read a text in exactly the client's layout: one, or some of several; PromptError if there is none."""
    opening = _OPENING_PATTERN.match(text)
    if opening is None:
        raise PromptError(
            f"user turn is {_shorten(text)}; expected the client's layout, which opens with "
            f"{_OPENING.format(num='N', kind='an alphabetical')!r}."
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
        raise PromptError(f"user turn ends with …{text[-60:]!r}; expected the client's closing {closing!r}.")

    readings: list[UserTurn] = []
    for first in re.finditer(re.escape(f".\n[{names[0]}] "), middle):
        if len(readings) > 1:  # it is refused: do not compare further queries, which can be long
            break
        if not middle.startswith("\nSearch Query: ", max(0, len(middle) - first.start() - 16)):
            continue
        query = middle[: first.start()]
        again = f"\nSearch Query: {query}."
        if middle.endswith(again) and first.end() <= len(middle) - len(again):
            body = middle[first.end() : len(middle) - len(again)]
            readings += [UserTurn(query, passages, style) for passages in _readings(body, names)]
    if not readings:
        raise PromptError(
            f"user turn has no query that occurs twice with [{names[0]}] to [{names[-1]}] between, each at the start "
            "of a line; expected the client's layout. Write each passage on one line."
        )
    return readings


def _earliest_marks(text: str, area: tuple[int, int], num: int, style: IdentifierStyle) -> list[re.Match[str]]:
    """Starts of the first `num` passages in `area`: the earliest lines that open with the identifiers in order."""
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
                f"user turn has a passage [{mark[1]}] but announces {num}. Correct the number or the passages."
            )
    if len(marks) < num:
        after = f" after [{names[len(marks) - 1]}]" if marks else ""
        raise PromptError(
            f"user turn has no line{after} that opens with [{names[len(marks)]}]; expected {num} passages, as "
            f"announced, named [{names[0]}] to [{names[-1]}] in order. Correct the record or remove it."
        )
    return marks


def _last(pattern: re.Pattern[str], text: str, start: int, end: int) -> re.Match[str] | None:
    match = None
    for match in pattern.finditer(text, start, end):  # noqa: B007 - the last one is wanted
        pass
    return match


def _normalize(query: str) -> str:
    """Words of a query without full stops at the end, for comparing the two."""
    return " ".join(query.split()).rstrip(". ")


def _readings(body: str, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The earliest and the latest way to cut `body`, which follows the first identifier, at the others in order.

    Every other way lies between the two, so if they are equal there is one reading. Returns none, one or two.
    """
    marks = [f"\n[{name}] " for name in names[1:]]
    earliest: list[str] = []
    rest = body
    for mark in marks:
        passage, found, rest = rest.partition(mark)
        if not found:
            return []
        earliest.append(passage)
    earliest.append(rest)
    latest: list[str] = []
    rest = body
    for mark in reversed(marks):
        rest, _, passage = rest.rpartition(mark)
        latest.append(passage)
    latest.append(rest)
    return list(dict.fromkeys([tuple(earliest), tuple(reversed(latest))]))


def _shorten(value: object) -> str:
    quoted = repr(value)
    return quoted if len(quoted) <= 80 else f"{quoted[:79]}…"
