"""A record as token ids: the prompt, the response, and the positions that are supervised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rankllm_composer.errors import PromptError
from rankllm_composer.options import OBJECTIVES, ObjectiveName
from rankllm_composer.prompts.chat import (
    bracket_position,
    build_messages,
    end_of_sequence,
    render_chat,
    tokenize,
    tokenizer_facts,
)
from rankllm_composer.prompts.identifier_tokens import identifier_token_ids, read_identifiers
from rankllm_composer.prompts.permutations import (
    identifier_style,
    identifiers,
    parse_permutation,
    ranks_from_permutation,
)
from rankllm_composer.prompts.record import Record
from rankllm_composer.prompts.user_turn import num_announced

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


@dataclass(eq=False, slots=True)
class EncodedRecord:
    """A record as the model sees it.

    Attributes:
        input_ids: (L,) int32; for `ranking` the prompt and a `[`, otherwise prompt, response and end of sequence.
        response_start: index of the first token after the prompt; L for `ranking`.
        score_position: index of the `[` whose next-token logits score the candidates; of the response's first token if
            there are no identifier tokens.
        identifier_token_ids: (N,) int32, the token of each candidate's identifier in presentation order; None only for
            `generation`, if an identifier is several tokens or merges with its bracket.
        ranks: (N,) int64, the teacher's 0-based place of each candidate.
        split_token: text of the token, such as `[A`, that the tokenizer would make of the answer's `[` and what
            follows, and that is split here; None if it makes none, or for `generation`.
    """

    input_ids: NDArray[np.int32]
    response_start: int
    score_position: int
    identifier_token_ids: NDArray[np.int32] | None
    ranks: NDArray[np.int64]
    split_token: str | None = None


def render_prompt(record: Record, tokenizer: PreTrainedTokenizerBase) -> str:
    """Prompt text of a record, without the response: chat template, then `ftfy.fix_text`."""
    return render_chat(build_messages(*record.prompt_turns, tokenizer), tokenizer)


def encode_prompt(
    system: str, user: str, tokenizer: PreTrainedTokenizerBase, append_bracket: bool
) -> NDArray[np.int32]:
    """(L,) int32 token ids of a prompt, for inference.

    With `append_bracket` it ends with `[`, so that the next-token logits of the last position score the candidates.

    Raises:
        PromptError: the tokenizer cannot be used (see `check_tokenizer`).
    """
    prompt = render_chat(build_messages(system, user, tokenizer), tokenizer)
    encoding = tokenize(prompt + "[" if append_bracket else prompt, tokenizer)
    if append_bracket:
        bracket_position(encoding, len(prompt))
    return np.array(encoding["input_ids"], dtype=np.int32)


def encode_record(
    record: Record | Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, objective: ObjectiveName
) -> EncodedRecord:
    """Token ids and supervision of a record.

    Prompt and response are tokenized together, once; character offsets give the start of the response. Where scores
    are trained, the `[` and the first identifier are two tokens also if the tokenizer joins them: the inference client
    ends its prompt with this `[` and reads the scores of the token that follows.

    Args:
        record: a Record, or a mapping of the published layout.
        tokenizer: a fast HF tokenizer with a chat template.
        objective: for "ranking" the prompt ends with `[` and there is no response; "generation" and "combined" have it.
    Raises:
        PromptError: the record has another layout, its response is not a permutation of its passages, or the tokenizer
            cannot be used (see `check_tokenizer`).
    """
    if objective not in OBJECTIVES:
        raise PromptError(f"objective is {objective!r}; expected one of {', '.join(OBJECTIVES)}")
    if not isinstance(record, Record):
        record = Record.from_conversations(record)
    where = f"record {record.id!r}"
    try:
        style = identifier_style(record.response)
        # A turn in another layout announces no number of passages: then the response gives it.
        num_candidates = num_announced(record.user) or record.response.count("[")
        permutation = parse_permutation(record.response, num_candidates, style)
    except PromptError as error:
        raise PromptError(f"{where}: response: {error}") from error
    names = identifiers(num_candidates, style)
    ranks = np.array(ranks_from_permutation(permutation), dtype=np.int64)  # (N,)
    found = read_identifiers(tokenizer, names)
    candidate_tokens: NDArray[np.int32] | None = None  # (N,)
    if objective != "generation" or not any(one.obstacle(objective) for one in found):
        candidate_tokens = np.array(identifier_token_ids(tokenizer, num_candidates, style, objective), dtype=np.int32)

    prompt = render_prompt(record, tokenizer)
    encoding = tokenize(prompt + ("[" if objective == "ranking" else record.response), tokenizer)
    ids: list[int] = encoding["input_ids"]
    splits = objective == "combined" and bool(found[permutation[0]].first)
    score_position = bracket_position(encoding, len(prompt), may_merge=splits or candidate_tokens is None)
    if objective == "ranking":
        return EncodedRecord(np.array(ids, dtype=np.int32), len(ids), score_position, candidate_tokens, ranks)

    start = len(prompt) + 1  # character of the first identifier
    split_token: str | None = None
    for place, index in enumerate(permutation):
        one, at = found[index], encoding.char_to_token(start)
        is_written = one.token is not None and not (one.later if place else one.first)
        if is_written and ids[at] != one.token:
            raise _unlike_elsewhere(where, names[index], one.token)
        start += len(names[index]) + len("] > [")
    if splits:
        first = permutation[0]
        behind = encoding.char_to_token(len(prompt) + 1 + len(names[first]))
        span, token = encoding.token_to_chars(behind), found[first].token
        if span is None or span.start != len(prompt) + 1 + len(names[first]):
            raise _unlike_elsewhere(where, names[first], token)
        split_token = found[first].first[0]
        ids = [*ids[:score_position], tokenizer_facts(tokenizer).bracket, int(token or 0), *ids[behind:]]
    input_ids = np.array([*ids, end_of_sequence(tokenizer)], dtype=np.int32)
    return EncodedRecord(input_ids, score_position, score_position, candidate_tokens, ranks, split_token)


def _unlike_elsewhere(where: str, name: str, token: int | None) -> PromptError:
    return PromptError(
        f"{where}: response: identifier [{name}] is not the token {token} that it is elsewhere. Use a tokenizer whose "
        "identifiers do not merge with their neighbors."
    )
