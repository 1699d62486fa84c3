"""Prompts: query and passages → chat messages → prompt text → token ids, and back from a user turn to its parts.

The user turn and what is done to passages and queries follow the inference client (rank_llm 0.25.7) to the letter, so
that a model is trained on the prompts it will be served.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakKeyDictionary

import numpy as np

from rankllm_composer.permutations import (
    MAX_CANDIDATES,
    IdentifierStyle,
    PermutationError,
    identifier_style,
    identifiers,
    parse_permutation,
    ranks_from_permutation,
)

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Objective = Literal["generation", "ranking", "combined"]

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
    "\nRank the {num} passages above based on their relevance to the search query. All the passages should be included "
    "and listed using identifiers, in descending order of relevance. The output format should be [] > [], e.g., "
    "{example}, Answer concisely and directly and only respond with the ranking results, do not say any word or explain."
)
_OPENING_PATTERN = re.compile(
    re.escape(_OPENING.format(num="NUM", kind="KIND"))
    .replace("NUM", "([1-9][0-9]{0,3})")
    .replace("KIND", "(an alphabetical|a numerical)"),
)
_NUMBER_IN_BRACKETS = re.compile(r"\[(\d+)\]")
_DOCUMENT_FIELDS = ("text", "segment", "contents", "content", "body", "passage")


class PromptError(ValueError):
    """A record or tokenizer from which no prompt, or no exact supervision, can be made."""


@dataclass(frozen=True, slots=True)
class Record:
    """One teacher-ranked list: the three turns of a training conversation, and what is known about its candidates.

    Attributes:
        id: names the record in errors and logs.
        system, user, response: the turns; `response` is the teacher's permutation as text.
        qid: query id, None if not known.
        docids: document id of each candidate in presentation order.
        grades: relevance grade of each candidate in presentation order.
    """

    id: str
    system: str
    user: str
    response: str
    qid: str | None = None
    docids: tuple[str, ...] | None = None
    grades: tuple[int, ...] | None = None

    @classmethod
    def from_conversations(cls, mapping: Mapping[str, Any]) -> Record:
        """Record from the published layout: `{"id": …, "conversations": [system, human, gpt]}`.

        The order of the turns is the contract, of each only `value` counts. `qid`, `docids` and `grades` are taken
        where they are given.

        Raises:
            PromptError: no id, not exactly three turns, or a turn without text.
        """
        if not isinstance(mapping, Mapping):
            raise PromptError(f"record: found {type(mapping).__name__}, allowed is a mapping with id and conversations")
        name = mapping.get("id")
        if not isinstance(name, (str, int)) or name == "":
            raise PromptError(f"record: id is {name!r}, allowed is a text or a whole number; give every record its own")
        turns = mapping.get("conversations")
        if not isinstance(turns, Sequence) or isinstance(turns, str) or len(turns) != 3:
            found = f"{len(turns)} turns" if isinstance(turns, Sequence) and not isinstance(turns, str) else repr(turns)
            raise PromptError(
                f"record {name!r}: conversations: found {found}, allowed is exactly three: system, human, gpt; "
                "an empty system text is written as an empty value",
            )
        for place, turn in zip(("system", "human", "gpt"), turns):
            if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
                raise PromptError(
                    f"record {name!r}: conversations: the {place} turn holds no text under 'value'; "
                    "each turn is {'from': …, 'value': text}",
                )
        docids, grades = mapping.get("docids"), mapping.get("grades")
        return cls(
            id=str(name),
            system=turns[0]["value"],
            user=turns[1]["value"],
            response=turns[2]["value"],
            qid=None if mapping.get("qid") is None else str(mapping["qid"]),
            docids=None if docids is None else tuple(str(docid) for docid in docids),
            grades=None if grades is None else tuple(int(grade) for grade in grades),
        )


@dataclass(frozen=True, slots=True)
class UserTurn:
    """What a user turn is made of: `render_user_turn(*turn)` in this order gives its text back."""

    query: str
    passages: tuple[str, ...]
    style: IdentifierStyle


@dataclass(eq=False, slots=True)
class EncodedRecord:
    """A record as the model sees it.

    Attributes:
        input_ids: (L,) int32. For `ranking` the prompt and a `[`; otherwise prompt, response, end of sequence.
        response_start: index of the first token that is not prompt; L for `ranking`.
        score_position: index of the `[` whose next-token logits score the candidates.
        identifier_token_ids: (N,) int32, the token of each candidate's identifier in presentation order; None only for
            `generation` where an identifier takes several tokens.
        ranks: (N,) int64, the teacher's 0-based place of each candidate.
    """

    input_ids: np.ndarray
    response_start: int
    score_position: int
    identifier_token_ids: np.ndarray | None
    ranks: np.ndarray


def clean_query(query: str) -> str:
    """Query as the client shows it: `[12]` becomes `(12)`, lest it look like an identifier."""
    return _NUMBER_IN_BRACKETS.sub(r"(\1)", query)


def document_text(document: Mapping[str, Any]) -> str:
    """Text of a document as the client takes it: the first of text, segment, contents, …, led by a title if it has one.

    Raises:
        PromptError: the document has none of the fields, or one that is no text.
    """
    for name in _DOCUMENT_FIELDS:
        if name in document:
            title = document.get("title")
            text = f"Title: {title} Content: {document[name]}" if title else document[name]
            if not isinstance(document[name], str):
                break
            return text
    raise PromptError(
        f"document: found the fields {', '.join(map(repr, document)) or 'none'}, allowed is a text under one of "
        f"{', '.join(_DOCUMENT_FIELDS)}",
    )


def passage_word_limit(num_passages: int, max_words: int = 300) -> int:
    """Words the client allows a passage: `max_words` in a window of 20, more in a shorter one (300 · 20 / n)."""
    return int(max_words * (20 / num_passages))


def truncate_passage(text: str, max_words: int) -> str:
    """Passage as the client shows it: text repaired, cut to `max_words` words, one space between words, `[12]` → `(12)`."""
    from ftfy import fix_text

    words = fix_text(text.strip()).split()
    return _NUMBER_IN_BRACKETS.sub(r"(\1)", " ".join(words[:max_words]))


def render_user_turn(query: str, passages: Sequence[str], style: IdentifierStyle = "letters") -> str:
    """The user turn of a request, exactly as the client writes it; query and passages are taken as they are.

    Raises:
        PermutationError: no passages, more than the style can name, or an unknown style.
    """
    names = identifiers(len(passages), style)
    opening = _OPENING.format(num=len(passages), kind=_KIND[style])
    body = "".join(f"[{name}] {passage}\n" for name, passage in zip(names, passages))
    closing = _CLOSING.format(num=len(passages), example=_EXAMPLE[style])
    return f"{opening}{query}.\n{body}Search Query: {query}.{closing}"


def parse_user_turn(text: str) -> UserTurn:
    """Query, passages and identifier style of a user turn, the inverse of `render_user_turn`.

    Passages may hold line breaks and identifiers of their own. The parse is given only if it is the one reading of the
    text: `render_user_turn` of it is `text`, and of nothing else.

    Raises:
        PromptError: the text is not of the layout, holds other than the number of passages it announces, or can be
            read in more than one way.
    """
    opening = _OPENING_PATTERN.match(text)
    if opening is None:
        raise PromptError(
            f"user turn: found {text[:60]!r}…, which does not open as the client's template does: "
            f"{_OPENING.format(num='N', kind='an alphabetical')!r}",
        )
    num, style = int(opening[1]), "letters" if opening[2] == _KIND["letters"] else "numbers"
    try:
        names = identifiers(num, style)
    except PermutationError as error:
        raise PromptError(f"user turn: {error}") from error
    closing = _CLOSING.format(num=num, example=_EXAMPLE[style])
    if not text.endswith(closing):
        raise PromptError(f"user turn: found …{text[-60:]!r} at the end, allowed is the client's closing {closing!r}")
    middle = text[opening.end() : len(text) - len(closing)]  # query, passages and query again
    readings: list[UserTurn] = []
    for first in re.finditer(re.escape(f".\n[{names[0]}] "), middle):
        query = middle[: first.start()]
        again = f"\nSearch Query: {query}."
        if middle.endswith(again) and first.end() <= len(middle) - len(again):
            body = middle[first.end() : len(middle) - len(again)]
            readings += [UserTurn(query, passages, style) for passages in _readings(body, names)]
    if len(readings) != 1:
        told = (
            "an identifier that opens several lines, so several readings are possible"
            if readings
            else f"no query between its two places followed by [{names[0]}] to [{names[-1]}], each opening a line"
        )
        raise PromptError(
            f"user turn: found {told}; allowed is the client's layout in one reading; "
            "take the line breaks out of the passages",
        )
    beyond = identifiers(MAX_CANDIDATES[style], style)[num : num + 1]
    if beyond and f"\n[{beyond[0]}] " in readings[0].passages[-1]:
        raise PromptError(
            f"user turn: found a passage [{beyond[0]}] where {num} are announced; correct the number or the passages",
        )
    return readings[0]


def build_messages(system: str, user: str, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """Chat messages of a prompt: system and user, or the user turn alone, led by the system text, newline and space.

    A chat template has a system role if what is sent under it comes out in the prompt. An empty system text is left out.

    Raises:
        PromptError: the tokenizer has no chat template, or one that fails on a user turn.
    """
    if not system:
        return [{"role": "user", "content": user}]
    if _facts(tokenizer).has_system_role:
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return [{"role": "user", "content": f"{system}\n {user}"}]


def render_prompt(record: Record, tokenizer: PreTrainedTokenizerBase) -> str:
    """Prompt text of a record, up to where the response begins: chat template, then `ftfy.fix_text`.

    Raises:
        PromptError: as `build_messages`.
    """
    return _render(build_messages(record.system, record.user, tokenizer), tokenizer)


def encode_prompt(system: str, user: str, tokenizer: PreTrainedTokenizerBase, append_bracket: bool) -> np.ndarray:
    """Token ids of a prompt, for inference.

    Args:
        append_bracket: end with `[`, so that the next-token logits of the last position score the candidates.
    Returns:
        (L,) int32.
    Raises:
        PromptError: the tokenizer cannot be used (see `check_tokenizer`).
    """
    prompt = _render(build_messages(system, user, tokenizer), tokenizer)
    encoding = _tokenise(prompt + "[" if append_bracket else prompt, tokenizer)
    if append_bracket:
        _bracket_position(encoding, len(prompt))
    return np.array(encoding["input_ids"], dtype=np.int32)


def identifier_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    num_candidates: int,
    style: IdentifierStyle = "letters",
) -> tuple[int, ...]:
    """Token of each identifier as it stands in `[A] > [B]` right after a prompt.

    Returns:
        `num_candidates` token ids; computed once for a tokenizer.
    Raises:
        PromptError: an identifier takes several tokens, merges with its bracket, or is unknown to the tokenizer.
        PermutationError: more candidates than the style can name.
    """
    names = identifiers(num_candidates, style)
    found = _identifier_tokens(tokenizer, style)
    several = [name for name in names if found[name] is None]
    if several:
        raise PromptError(
            f"tokenizer: identifier [{several[0]}] takes several tokens, allowed is one token an identifier so that "
            f"one position scores all candidates; use letters, at most {len(names) - len(several)} candidates, "
            "or the objective generation",
        )
    return tuple(token for name in names if (token := found[name]) is not None)


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    style: IdentifierStyle = "letters",
    num_candidates: int | None = None,
) -> None:
    """Stop where a tokenizer cannot carry an objective.

    A pad token is not asked for: sequences are packed, nothing is padded.

    Args:
        num_candidates: longest list that will come; None = 20 (or all the style can name, if fewer).
    Raises:
        PromptError: slow tokenizer; no chat template; no end-of-sequence token (but for `ranking`); a prompt whose last
            token depends on the response; identifiers that merge with a bracket, are unknown or (but for `generation`)
            take several tokens. Each names the remedy.
    """
    _facts(tokenizer)
    if objective != "ranking":
        _end_of_sequence(tokenizer)
    found = _identifier_tokens(tokenizer, style)
    if objective != "generation":
        identifier_token_ids(tokenizer, num_candidates or min(20, len(found)), style)


def encode_record(
    record: Record | Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
) -> EncodedRecord:
    """Token ids and supervision of a record.

    The text is tokenised once, prompt and response together; character offsets say where the response begins.

    Args:
        record: a Record, or a mapping of the published layout.
        tokenizer: a fast HF tokenizer with a chat template.
        objective: "ranking" ends the prompt with `[` and holds no response; "generation" and "combined" hold it.
    Returns:
        EncodedRecord.
    Raises:
        PromptError: the record is not of the layout, its response is no permutation of its passages, or the tokenizer
            cannot be used (see `check_tokenizer`).
    """
    if objective not in get_args(Objective):
        raise PromptError(f"objective: found {objective!r}, allowed are {', '.join(get_args(Objective))}")
    if not isinstance(record, Record):
        record = Record.from_conversations(record)
    try:
        style = identifier_style(record.response)
        permutation = parse_permutation(record.response, _num_candidates(record), style)
    except PermutationError as error:
        raise PromptError(f"record {record.id!r}: response: {error}") from error
    names = identifiers(len(permutation), style)
    ranks = np.array(ranks_from_permutation(permutation), dtype=np.int64)
    prompt = render_prompt(record, tokenizer)
    if objective == "ranking":
        tokens = np.array(identifier_token_ids(tokenizer, len(names), style), dtype=np.int32)
        encoding = _tokenise(prompt + "[", tokenizer)
        score_position = _bracket_position(encoding, len(prompt))
        input_ids = np.array(encoding["input_ids"], dtype=np.int32)
        return EncodedRecord(input_ids, len(input_ids), score_position, tokens, ranks)

    found = _identifier_tokens(tokenizer, style)
    if objective == "combined":
        identifier_token_ids(tokenizer, len(names), style)
    encoding = _tokenise(prompt + record.response, tokenizer)
    score_position = _bracket_position(encoding, len(prompt))
    input_ids = [*encoding["input_ids"], _end_of_sequence(tokenizer)]
    place = len(prompt) + 1  # of the first identifier
    for index in permutation:
        expected = found[names[index]]
        if expected is not None and input_ids[encoding.char_to_token(place)] != expected:
            raise PromptError(
                f"record {record.id!r}: response: identifier [{names[index]}] is not the token {expected} it is elsewhere; "
                "use a tokenizer whose identifiers do not merge with what stands beside them",
            )
        place += len(names[index]) + len("] > [")
    single = [token for name in names if (token := found[name]) is not None]
    return EncodedRecord(
        input_ids=np.array(input_ids, dtype=np.int32),
        response_start=score_position,
        score_position=score_position,
        identifier_token_ids=np.array(single, dtype=np.int32) if len(single) == len(names) else None,
        ranks=ranks,
    )


@dataclass(slots=True)
class _Facts:
    """What was found out about a tokenizer, and the state it was found in."""

    state: tuple[Any, ...]
    has_system_role: bool
    tokens: dict[str, dict[str, int | None]] = field(default_factory=dict)


_FACTS: WeakKeyDictionary[PreTrainedTokenizerBase, _Facts] = WeakKeyDictionary()
_PROBE = "rankllmprobe"


def _facts(tokenizer: PreTrainedTokenizerBase) -> _Facts:
    """Checks that need no record, made once for a tokenizer in its present state."""
    state = (tokenizer.chat_template, len(tokenizer), tokenizer.bos_token, tokenizer.eos_token)
    facts = _FACTS.get(tokenizer)
    if facts is not None and facts.state == state:
        return facts
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise PromptError(
            f"tokenizer {name}: found a slow tokenizer, allowed are fast ones (character offsets tell prompt from "
            "response); load it with use_fast=True, or convert it and save its tokenizer.json",
        )
    if not tokenizer.chat_template:
        raise PromptError(
            f"tokenizer {name}: found no chat template, allowed is one that writes a user turn and a generation prompt; "
            "set tokenizer.chat_template to the template of the model's family",
        )
    messages = [{"role": "system", "content": _PROBE + "s"}, {"role": "user", "content": _PROBE + "u"}]
    try:
        has_system_role = _PROBE + "s" in _render(messages, tokenizer)
    except PromptError:
        has_system_role = False
    if _PROBE + "u" not in _render(messages[1:], tokenizer):
        raise PromptError(
            f"tokenizer {name}: found a chat template that does not write the user turn, allowed is one that does; "
            "set tokenizer.chat_template to the template of the model's family",
        )
    facts = _Facts(state, has_system_role)
    _FACTS[tokenizer] = facts
    prompt = _probe_prompt(tokenizer)
    alone = _tokenise(prompt, tokenizer)["input_ids"]
    for response in ("[", "[A] > [B]", "[1] > [2]"):
        if _tokenise(prompt + response, tokenizer)["input_ids"][: len(alone)] != alone:
            del _FACTS[tokenizer]
            raise PromptError(
                f"tokenizer {name}: the end of the prompt, {prompt[-20:]!r}, is tokenised otherwise when a response "
                "follows, allowed is a prompt whose tokens do not depend on it; end the generation prompt of the chat "
                "template with a line break or a special token",
            )
    return facts


def _probe_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    user = render_user_turn(_PROBE, (_PROBE, _PROBE))
    return _render(build_messages(SYSTEM_MESSAGE, user, tokenizer), tokenizer)


def _identifier_tokens(tokenizer: PreTrainedTokenizerBase, style: IdentifierStyle) -> dict[str, int | None]:
    """Token of every identifier of a style, None where it takes several; merged and unknown ones stop."""
    tokens = _facts(tokenizer).tokens
    if style in tokens:
        return tokens[style]
    prompt = _probe_prompt(tokenizer)
    found: dict[str, int | None] = {}
    for name in identifiers(MAX_CANDIDATES[style], style):
        text = f"{prompt}[{name}] > [{name}]"
        encoding = _tokenise(text, tokenizer)
        at_both: set[int | None] = set()
        for start in (len(prompt) + 1, len(text) - 1 - len(name)):
            index = encoding.char_to_token(start)
            span = None if index is None else encoding.token_to_chars(index)
            if span is None or span.start < start or span.end > start + len(name):
                raise PromptError(
                    f"tokenizer: identifier [{name}] merges with its bracket, allowed is a token of its own; "
                    f"use {'numbers' if style == 'letters' else 'letters'} or another tokenizer",
                )
            whole = span.end == start + len(name)
            at_both.add(encoding["input_ids"][index] if whole else None)
        token = at_both.pop()
        if at_both or (token is not None and tokenizer.convert_ids_to_tokens(token) != name):
            raise PromptError(
                f"tokenizer: identifier [{name}] has no token of its own that is the same everywhere in a response; "
                "use a tokenizer that knows it",
            )
        found[name] = token
    tokens[style] = found
    return found


@lru_cache(maxsize=1)
def _fixer() -> Any:
    from ftfy import fix_text

    return fix_text


def _render(messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        # The client sends enable_thinking=False; templates that do not know it ignore it.
        text = tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
    except Exception as error:  # templates are programs: they raise what they like
        raise PromptError(
            f"tokenizer {tokenizer.name_or_path}: the chat template failed on the roles "
            f"{', '.join(message['role'] for message in messages)}: {error}; correct tokenizer.chat_template",
        ) from error
    return _fixer()(text)


def _tokenise(text: str, tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    """The text as the client's server tokenises it: with the special tokens the tokenizer adds."""
    encoding = tokenizer(text, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    if not text or encoding.char_to_token(len(text) - 1) == len(encoding["input_ids"]) - 1:
        return encoding
    raise PromptError(
        f"tokenizer {tokenizer.name_or_path}: found tokens added after the end of the text, allowed is none; "
        "set add_eos_token=False",
    )


def _bracket_position(encoding: BatchEncoding, start: int) -> int:
    """Index of the `[` at character `start`, which must be a token of its own."""
    index = encoding.char_to_token(start)
    span = None if index is None else encoding.token_to_chars(index)
    if span is None or (span.start, span.end) != (start, start + 1):
        raise PromptError(
            "tokenizer: the '[' that opens the response merges with what stands beside it, allowed is a token of its "
            "own; end the generation prompt of the chat template with a line break or a special token",
        )
    return index


def _end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise PromptError(
            f"tokenizer {tokenizer.name_or_path}: found no end-of-sequence token, which closes a response; "
            "set tokenizer.eos_token, or use the objective ranking",
        )
    return int(tokenizer.eos_token_id)


def _num_candidates(record: Record) -> int:
    """Number of passages the user turn announces; where it is no turn of the client's, those the response names."""
    opening = _OPENING_PATTERN.match(record.user)
    return int(opening[1]) if opening else record.response.count("[")


def _readings(body: str, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The first and the last way to cut `body`, which follows the first identifier, at the others in order.

    Every other way lies between the two, so there is one reading if they are the same: none, one or two are given.
    """
    marks = [f"\n[{name}] " for name in names[1:]]
    first, last = [], []
    place = 0
    for mark in marks:
        place = body.find(mark, place)
        if place < 0:
            return []
        first.append(place)
        place += len(mark)
    place = len(body)
    for mark in reversed(marks):
        place = body.rfind(mark, 0, place)
        last.insert(0, place)
    ways = [first] if first == last else [first, last]
    return [
        tuple(
            body[start:end]
            for start, end in zip([0, *(cut + len(mark) for cut, mark in zip(cuts, marks))], [*cuts, len(body)])
        )
        for cuts in ways
    ]
