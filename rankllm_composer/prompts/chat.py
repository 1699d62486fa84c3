"""Chat template and tokenizer: messages → prompt text → tokens, and the requirements on a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from rankllm_composer.errors import PromptError
from rankllm_composer.options import ObjectiveName
from rankllm_composer.prompts.permutations import MAX_CANDIDATES, IdentifierStyle, identifiers
from rankllm_composer.prompts.template import render_template
from rankllm_composer.prompts.user_turn import SYSTEM_MESSAGE, render_user_turn

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import BatchEncoding, PreTrainedTokenizerBase

_PROBE = "rankllmprobe"  # a word that no template contains
_CLOCKS: tuple[Callable[[], datetime], ...] = (  # they differ in every part
    lambda: datetime(2001, 2, 3, 4, 5, 6),
    lambda: datetime(2017, 11, 28, 19, 50, 51),
)
_OPEN_END = "End the generation prompt of the chat template with a line break or a special token"


@dataclass(slots=True)
class _TokenizerInfo:
    """Properties of a tokenizer with its chat template."""

    chat_template: Any
    has_system_role: bool
    prompt: str
    tokens: dict[str, int | str] = field(default_factory=dict)  # of an identifier: its token, or why it has none


_INFO: WeakKeyDictionary[PreTrainedTokenizerBase, _TokenizerInfo] = WeakKeyDictionary()


def build_messages(system: str, user: str, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """Chat messages of a prompt: system and user, or the user turn alone after the system text, a newline and a space.

    A chat template has a system role if the text of a system message appears in the prompt. An empty system text is
    omitted, as in the client.

    Raises:
        PromptError: the tokenizer cannot be used (see `check_tokenizer`).
    """
    return _messages(system, user, _facts(tokenizer).has_system_role)


def render_chat(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """Prompt text: the chat template with the generation prompt, then `ftfy.fix_text`; PromptError if it fails."""
    from ftfy import fix_text

    return fix_text(_render(messages, tokenizer))


def _render(
    messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, now: Callable[[], datetime] = datetime.now
) -> str:
    try:
        text = render_template(tokenizer, messages, now)
    except Exception as error:  # a template is a program and can raise anything
        roles = ", ".join(message["role"] for message in messages)
        raise PromptError(
            f"{_name(tokenizer)}: the chat template failed on the roles {roles}: {error}. Correct "
            "tokenizer.chat_template."
        ) from error
    return text


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    """Tokens of a prompt, with the special tokens that the tokenizer adds in front, as on the client's server.

    A template that writes the beginning-of-sequence token itself yields two of them, in training and in serving.

    Raises:
        PromptError: the tokenizer adds tokens after the text.
    """
    encoding: BatchEncoding = tokenizer(text, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    if encoding["input_ids"] and encoding.token_to_sequence(len(encoding["input_ids"]) - 1) is None:
        raise PromptError(
            f"{_name(tokenizer)} adds tokens after the end of the text, where the response has to follow. Load it with "
            "add_eos_token=False."
        )
    return encoding


def bracket_position(encoding: BatchEncoding, start: int, *, may_merge: bool = False) -> int:
    """Index of the token of the `[` at character `start`, where a response begins.

    Args:
        may_merge: whether the `[` may be the beginning of a longer token.
    Raises:
        PromptError: the `[` is part of a longer token, with `may_merge` of one that begins before it.
    """
    index = encoding.char_to_token(start)
    span = None if index is None else encoding.token_to_chars(index)
    if index is None or span is None or span.start != start or (span.end != start + 1 and not may_merge):
        raise PromptError(
            "tokenizer: the '[' that opens the response merges with its neighbors; expected a separate token. "
            f"{_OPEN_END}, or use another tokenizer."
        )
    return index


def end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token that closes a response; raises PromptError if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise PromptError(
            f"{_name(tokenizer)} has no end-of-sequence token, which closes a response. Set tokenizer.eos_token, or "
            "use the objective ranking."
        )
    return int(tokenizer.eos_token_id)


def identifier_tokens(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> tuple[int | None, ...]:
    """Token of each identifier in `[A] > [B]` after a prompt; None for an identifier that is not one token there.

    Raises:
        PromptError: an identifier is unknown to the tokenizer.
    """
    return tuple(None if isinstance(token, str) else token for token in _identifiers(tokenizer, names))


def identifier_token_ids(
    tokenizer: PreTrainedTokenizerBase, num_candidates: int, style: IdentifierStyle = "letters"
) -> tuple[int, ...]:
    """Tokens of a list's identifiers, for objectives and decodings that read a score per identifier.

    Raises:
        PromptError: an identifier takes several tokens, merges with its bracket, or is unknown to the tokenizer; or
            there are more candidates than the style can name.
    """
    names = identifiers(num_candidates, style)
    found = _identifiers(tokenizer, names)
    single = tuple(token for token in found if isinstance(token, int))
    if len(single) < num_candidates:
        first = next(place for place, token in enumerate(found) if isinstance(token, str))
        raise PromptError(
            f"{_name(tokenizer)}: identifier [{names[first]}] {found[first]}. "
            f"{_alternatives(tokenizer, num_candidates, style, first)}"
        )
    return single


def _alternatives(tokenizer: PreTrainedTokenizerBase, num_candidates: int, style: IdentifierStyle, fit: int) -> str:
    """What can be used instead of identifiers of a style of which only the first `fit` are single tokens."""
    other: IdentifierStyle = "numbers" if style == "letters" else "letters"
    ways: list[str] = []
    if num_candidates <= MAX_CANDIDATES[other]:
        tokens = _identifiers(tokenizer, identifiers(num_candidates, other))
        ways = [other] if all(isinstance(token, int) for token in tokens) else []
    if fit >= 2:
        ways.append(f"lists of at most {fit}")
    return f"Use {', '.join(ways or ['another tokenizer'])}, or the objective generation."


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    objective: ObjectiveName,
    style: IdentifierStyle = "letters",
    num_candidates: int = 20,
) -> None:
    """Check, before any record is read, that a tokenizer supports an objective and lists of `num_candidates`.

    A pad token is not required: sequences are packed and never padded.

    Raises:
        PromptError: slow tokenizer; no chat template; no end-of-sequence token (except for `ranking`); a prompt whose
            last token depends on the response; identifiers that are unknown or (except for `generation`) are several
            tokens or merge with a bracket; more candidates than the style can name.
    """
    identifier_tokens(tokenizer, identifiers(num_candidates, style))
    if objective != "generation":
        identifier_token_ids(tokenizer, num_candidates, style)
    if objective != "ranking":
        end_of_sequence(tokenizer)


def template_notes(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield sentences on what makes prompts of a chat template differ from what they seem to be.

    That is: today's date in them, tokens that the repair of the text changes, and thinking that they begin.

    Raises:
        PromptError: the tokenizer cannot be used (see `check_tokenizer`).
    """
    from ftfy import fix_text

    turn = render_user_turn(_PROBE, (_PROBE, _PROBE))
    probes = [build_messages(system, turn, tokenizer) for system in (SYSTEM_MESSAGE, "")]
    for messages in probes:
        one, other = (_render(messages, tokenizer, now).splitlines() for now in _CLOCKS)
        differing = next((index for index, pair in enumerate(zip(one, other)) if len(set(pair)) > 1), None)
        if differing is not None or len(one) != len(other):
            today = _render(messages, tokenizer).splitlines()
            line = today[differing].strip() if differing is not None and differing < len(today) else "lines"
            where = "" if messages is probes[0] else " where a record has no system text"
            yield (
                f"{_name(tokenizer)}: the chat template prints the date{where} ({line[:60]!r}), so that prompts change "
                "from day to day: a run resumed on another day is not exact, and a server's prompts are not those of "
                f"the training. Set model.template_date={datetime.now():%Y-%m-%d}, which exports write into their "
                "template."
            )
            break
    raw = _render(probes[0], tokenizer)
    repaired = fix_text(raw)
    lost = [token for token in _control_tokens(tokenizer, raw) if repaired.count(token) < raw.count(token)]
    if lost:
        yield (
            f"{_name(tokenizer)}: the repair of text (ftfy), as in the inference client, changes {', '.join(lost)} of "
            "the chat template into other characters, which are not that token. Use a template whose tokens it keeps."
        )
    end = repaired.rpartition(_PROBE)[2]
    if end.count("<think>") > end.count("</think>"):
        yield (
            f"{_name(tokenizer)}: the chat template opens <think> and does not close it, so that the ranking stands "
            "inside the thinking. Use a template that closes it where enable_thinking is false."
        )


def control_tokens_in(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Control tokens that a text of a record contains: of the tokenizer, and of its chat template."""
    return [token for token in _control_tokens(tokenizer, _facts(tokenizer).prompt) if token in text]


def _control_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[str]:
    """Special tokens, and the added ones that a prompt of the chat template contains or that mark thinking."""
    added = tokenizer.added_tokens_decoder.values()
    marks = {"<think>", "</think>"}
    found = {token.content for token in added if token.special or token.content in marks or token.content in prompt}
    return sorted(token for token in found | set(tokenizer.all_special_tokens) if token.strip())


def _facts(tokenizer: PreTrainedTokenizerBase) -> _TokenizerInfo:
    """Properties shared by all prompts, computed once per tokenizer and chat template.

    Tokens added later are not detected, which would cost more than tokenizing; records that contain them are refused.
    """
    facts = _INFO.get(tokenizer)
    if facts is not None and facts.chat_template == tokenizer.chat_template:
        return facts
    if not tokenizer.is_fast:
        raise PromptError(
            f"{_name(tokenizer)} is a slow tokenizer; expected a fast one, whose character offsets separate prompt and "
            "response. Load it with use_fast=True from a folder with a tokenizer.json."
        )
    if not tokenizer.chat_template:
        raise PromptError(
            f"{_name(tokenizer)} has no chat template; expected one that writes a user turn and a generation prompt. "
            "Set tokenizer.chat_template to that of the model's family."
        )
    if _PROBE not in render_chat([{"role": "user", "content": _PROBE}], tokenizer):
        raise PromptError(
            f"{_name(tokenizer)}: the chat template omits the user turn. Set tokenizer.chat_template to that of the "
            "model's family."
        )
    try:
        both = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "query"}]
        has_system_role = _PROBE in render_chat(both, tokenizer)
    except PromptError:
        has_system_role = False
    turn = render_user_turn(_PROBE, (_PROBE, _PROBE))
    prompt = render_chat(_messages(SYSTEM_MESSAGE, turn, has_system_role), tokenizer)
    alone = tokenize(prompt, tokenizer)["input_ids"]
    for response in ("[", "[A] > [B]", "[1] > [2]"):
        if tokenize(prompt + response, tokenizer)["input_ids"][: len(alone)] != alone:
            raise PromptError(
                f"{_name(tokenizer)}: the end of the prompt, {prompt[-20:]!r}, is tokenized differently when a "
                f"response follows. {_OPEN_END}."
            )
    facts = _TokenizerInfo(tokenizer.chat_template, has_system_role, prompt)
    _INFO[tokenizer] = facts
    return facts


def _messages(system: str, user: str, has_system_role: bool) -> list[dict[str, str]]:
    if not system:
        return [{"role": "user", "content": user}]
    if has_system_role:
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return [{"role": "user", "content": f"{system}\n {user}"}]


def _identifiers(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> tuple[int | str, ...]:
    """Token of each identifier, or why it is not one token."""
    facts = _facts(tokenizer)
    for name in names:
        if name not in facts.tokens:
            facts.tokens[name] = _identifier_token(name, facts.prompt, tokenizer)
    return tuple(facts.tokens[name] for name in names)


def _identifier_token(name: str, prompt: str, tokenizer: PreTrainedTokenizerBase) -> int | str:
    text = f"{prompt}[{name}] > [{name}]"  # the first identifier of a response, and any other
    encoding = tokenize(text, tokenizer)
    tokens: set[int | None] = set()
    for start in (len(prompt) + 1, len(text) - 1 - len(name)):
        end = start + len(name)
        index = encoding.char_to_token(start)
        span = None if index is None else encoding.token_to_chars(index)
        if index is None or span is None or span.start < start or span.end > end:
            return "merges with its bracket; expected a separate token"
        tokens.add(encoding["input_ids"][index] if span.end == end else None)
    token = tokens.pop()
    if tokens or (token is not None and tokenizer.convert_ids_to_tokens(token) != name):
        raise PromptError(
            f"{_name(tokenizer)}: identifier [{name}] is not the token {name!r} everywhere in a response. Use a "
            "tokenizer whose vocabulary contains it."
        )
    return "is several tokens; expected one, so that one position scores all candidates" if token is None else token


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}"
