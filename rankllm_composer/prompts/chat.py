"""Chat template and tokenizer: messages → prompt text → tokens, and the requirements on both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from rankllm_composer.errors import PromptError
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


@dataclass(eq=False, frozen=True)
class TokenizerFacts:
    """Properties of a tokenizer with its chat template.

    Attributes:
        prompt, prompt_ids: a prompt, and its tokens.
        bracket: the token `[` after a prompt.
    """

    chat_template: Any
    has_system_role: bool
    prompt: str
    prompt_ids: list[int]
    bracket: int


_INFO: WeakKeyDictionary[PreTrainedTokenizerBase, TokenizerFacts] = WeakKeyDictionary()


def build_messages(system: str, user: str, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """Chat messages of a prompt: system and user, or the user turn alone after the system text, a newline and a space.

    A chat template has a system role if the text of a system message appears in the prompt. An empty system text is
    omitted, as in the client.

    Raises:
        PromptError: the tokenizer cannot be used (see `check_tokenizer`).
    """
    return _messages(system, user, tokenizer_facts(tokenizer).has_system_role)


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
            f"{name_of(tokenizer)}: the chat template failed on the roles {roles}: {error}. Correct "
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
            f"{name_of(tokenizer)} adds tokens after the end of the text, where the response has to follow. Load it "
            "with add_eos_token=False."
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
            f"{name_of(tokenizer)} has no end-of-sequence token, which closes a response. Set tokenizer.eos_token, or "
            "use the objective ranking."
        )
    return int(tokenizer.eos_token_id)


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
                f"{name_of(tokenizer)}: the chat template prints the date{where} ({line[:60]!r}), so that prompts "
                "change from day to day: a run resumed on another day is not exact, and a server's prompts are not "
                f"those of the training. Set model.template_date={datetime.now():%Y-%m-%d}, which exports write into "
                "their template."
            )
            break
    raw = _render(probes[0], tokenizer)
    repaired = fix_text(raw)
    lost = [token for token in _control_tokens(tokenizer, raw) if repaired.count(token) < raw.count(token)]
    if lost:
        yield (
            f"{name_of(tokenizer)}: the repair of text (ftfy), as in the inference client, changes {', '.join(lost)} "
            "of the chat template into other characters, which are not that token. Use a template whose tokens it "
            "keeps."
        )
    end = repaired.rpartition(_PROBE)[2]
    if end.count("<think>") > end.count("</think>"):
        yield (
            f"{name_of(tokenizer)}: the chat template opens <think> and does not close it, so that the ranking stands "
            "inside the thinking. Use a template that closes it where enable_thinking is false."
        )


def control_tokens_in(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Control tokens that a text of a record contains: of the tokenizer, and of its chat template."""
    return [token for token in _control_tokens(tokenizer, tokenizer_facts(tokenizer).prompt) if token in text]


def _control_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[str]:
    """Special tokens, and the added ones that a prompt of the chat template contains or that mark thinking."""
    added = tokenizer.added_tokens_decoder.values()
    marks = {"<think>", "</think>"}
    found = {token.content for token in added if token.special or token.content in marks or token.content in prompt}
    return sorted(token for token in found | set(tokenizer.all_special_tokens) if token.strip())


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> TokenizerFacts:
    """Return properties shared by all prompts, computed once per tokenizer and chat template.

    Tokens added later are not detected, which would cost more than tokenizing; records that contain them are refused.
    """
    facts = _INFO.get(tokenizer)
    if facts is not None and facts.chat_template == tokenizer.chat_template:
        return facts
    if not tokenizer.is_fast:
        raise PromptError(
            f"{name_of(tokenizer)} is a slow tokenizer; expected a fast one, whose character offsets separate prompt "
            "and response. Load it with use_fast=True from a folder with a tokenizer.json."
        )
    if not tokenizer.chat_template:
        raise PromptError(
            f"{name_of(tokenizer)} has no chat template; expected one that writes a user turn and a generation prompt. "
            "Set tokenizer.chat_template to that of the model's family."
        )
    if _PROBE not in render_chat([{"role": "user", "content": _PROBE}], tokenizer):
        raise PromptError(
            f"{name_of(tokenizer)}: the chat template omits the user turn. Set tokenizer.chat_template to that of the "
            "model's family."
        )
    try:
        both = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "query"}]
        has_system_role = _PROBE in render_chat(both, tokenizer)
    except PromptError:
        has_system_role = False
    turn = render_user_turn(_PROBE, (_PROBE, _PROBE))
    prompt = render_chat(_messages(SYSTEM_MESSAGE, turn, has_system_role), tokenizer)
    prompt_ids = tokenize(prompt, tokenizer)["input_ids"]
    opened = tokenize(prompt + "[", tokenizer)
    check_prompt_end(opened, prompt, prompt_ids, tokenizer)
    bracket = opened["input_ids"][bracket_position(opened, len(prompt))]
    facts = TokenizerFacts(tokenizer.chat_template, has_system_role, prompt, prompt_ids, bracket)
    _INFO[tokenizer] = facts
    return facts


def check_prompt_end(
    encoding: BatchEncoding, prompt: str, prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise PromptError unless a prompt and more begins with the tokens of the prompt."""
    if encoding["input_ids"][: len(prompt_ids)] != prompt_ids:
        raise PromptError(
            f"{name_of(tokenizer)}: the end of the prompt, {prompt[-20:]!r}, is tokenized differently when a response "
            f"follows. {_OPEN_END}."
        )


def _messages(system: str, user: str, has_system_role: bool) -> list[dict[str, str]]:
    if not system:
        return [{"role": "user", "content": user}]
    if has_system_role:
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return [{"role": "user", "content": f"{system}\n {user}"}]


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name of a tokenizer in messages."""
    return f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}"
