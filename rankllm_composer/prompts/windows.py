"""Windows: the candidates of one prompt, taken from a list bottom to top, with passages truncated until they fit."""

from __future__ import annotations

import dataclasses
import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rankllm_composer.errors import PromptError
from rankllm_composer.prompts.clients import CLIENTS, CURRENT_CLIENT, ClientVersion, passage_word_limit
from rankllm_composer.prompts.encoding import encode_prompt
from rankllm_composer.prompts.permutations import IdentifierStyle, format_permutation, identifier_style
from rankllm_composer.prompts.prompt_template import Prompt
from rankllm_composer.prompts.record import Record
from rankllm_composer.prompts.user_turn import (
    LONGEST_WORD,
    PIECE_CHARS,
    clean_query,
    join_words,
    parse_user_turn,
    passage_words,
    render_user_turn,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

WORDS_SHARE = 4  # the client removes one word from every passage per 4 excess tokens of a passage


@dataclass(frozen=True, eq=False, slots=True)
class Window:
    """A prompt that asks to rank its candidates.

    Attributes:
        id: for messages.
        input_ids: (L,) int32, the prompt's tokens and then `[`.
        num_emptied: passages that have a text but are shown empty, because not one piece of each fits.
        client_empties: whether the inference client would show every passage empty: it cuts at spaces alone, and one
            word of each passage does not fit.
    """

    id: str
    input_ids: NDArray[np.int32]
    num_candidates: int
    style: IdentifierStyle = "letters"
    num_emptied: int = 0
    client_empties: bool = False


def record_window(record: Record, tokenizer: PreTrainedTokenizerBase, order: Sequence[int] | None = None) -> Window:
    """Window of a teacher-ranked list, unchanged or with its passages in another order.

    The response gives the number of candidates and their style; the user turn is parsed only with an order.

    Raises:
        PromptError: the user turn cannot be parsed, the response names no candidate, or the tokenizer cannot be used.
    """
    style = identifier_style(record.response)
    if order is not None:
        turn = parse_user_turn(record.user)
        user = render_user_turn(turn.query, [turn.passages[i] for i in order], turn.style)
        record = dataclasses.replace(record, user=user)
    system, user = record.prompt_turns
    input_ids = encode_prompt(system, user, tokenizer, append_bracket=True)
    return Window(record.id, input_ids, record.response.count("["), style)


def fit_window(
    window_id: str,
    query: str,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: Prompt | None = None,
    context_size_tokens: int = 4096,
    max_passage_words: int = 300,
    client: ClientVersion = CURRENT_CLIENT,
) -> Window:
    """Window of candidates, with passages truncated until prompt and answer fit the context.

    The words are those of the inference client wherever it shows any; what has no spaces is cut between characters
    (see `user_turn.join_words`), where the client would show every passage empty.

    Args:
        window_id: for messages.
        query, texts: as in the collection.
        tokenizer: a fast HF tokenizer with a chat template.
        prompt: identifiers and template; None = letters, in the published prompt.
        context_size_tokens: prompt and answer together.
        max_passage_words: words of a passage (see `passage_word_limit`), fewer if they do not fit.
        client: version of the inference client.
    Raises:
        PromptError: prompt and answer do not fit even without passages, the tokenizer cannot be used, or there are no
            candidates or more than the style can name.
    """
    num_candidates, prompt = len(texts), prompt or Prompt()
    style = prompt.style
    reserved = answer_lengths(tokenizer, num_candidates, style, client)[0]
    limit = passage_word_limit(num_candidates, max_passage_words, client)
    passages = [passage_words(text) for text in texts]

    def cut(words: int, longest_word: int = LONGEST_WORD) -> list[str]:
        return [join_words(passage, words, longest_word) for passage in passages]

    def encode(shown: Sequence[str]) -> NDArray[np.int32]:
        user = prompt.user_turn(clean_query(query), shown)
        return encode_prompt(prompt.system, user, tokenizer, append_bracket=True)

    def excess(input_ids: NDArray[np.int32]) -> int:
        return len(input_ids) - 1 + reserved - context_size_tokens

    words, shown = limit, cut(limit)
    input_ids = encode(shown)
    while words and excess(input_ids) > 0:
        words = max(0, words - max(1, excess(input_ids) // (WORDS_SHARE * num_candidates)))
        fewer = cut(words)
        if fewer != shown:  # a lower limit often changes nothing yet
            shown, input_ids = fewer, encode(fewer)
    has_text = any(passages)
    if excess(input_ids) <= 0 and (not has_text or (words and shown == cut(words, sys.maxsize))):
        return Window(window_id, input_ids, num_candidates, style)

    for longest_word in (LONGEST_WORD, PIECE_CHARS) if has_text else ():
        words = bisect_right(range(limit), 0, key=lambda n: excess(encode(cut(n + 1, longest_word))))
        if words:
            client_empties = excess(encode(cut(1, sys.maxsize))) > 0
            input_ids = encode(cut(words, longest_word))
            return Window(window_id, input_ids, num_candidates, style, client_empties=client_empties)
    input_ids = encode([""] * num_candidates)
    if excess(input_ids) > 0:
        raise PromptError(
            f"window {window_id}: {len(input_ids) - 1} tokens of prompt without passages and {reserved} of answer "
            f"exceed the context of {context_size_tokens}. Use a shorter window, a shorter query or a larger "
            "context_size_tokens."
        )
    return Window(window_id, input_ids, num_candidates, style, sum(map(bool, passages)), client_empties=True)


def answer_lengths(
    tokenizer: PreTrainedTokenizerBase,
    num_candidates: int,
    style: IdentifierStyle = "letters",
    client: ClientVersion = CURRENT_CLIENT,
) -> tuple[int, int]:
    """Tokens of an answer: how many the inference client requests, and how many a complete answer has.

    Version 0.25.7 encodes an answer and subtracts one for the beginning-of-sequence token. With a tokenizer that adds
    none it requests one token too few: the last bracket, which does not matter.
    """
    answer = format_permutation(range(num_candidates), style)
    complete = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if CLIENTS[client].counts_all_tokens:
        return complete, complete
    return len(tokenizer(answer)["input_ids"]) - 1, complete


def sliding_spans(num_candidates: int, window_size: int, stride: int) -> list[tuple[int, int]]:
    """Windows over a list, bottom to top: (first, last + 1) per window, in the order in which they are ranked.

    As in the inference client the window moves up by `stride` until it reaches the top; the last one may be shorter. A
    list shorter than the window is one window. Unlike here, version 0.25.7 does not rank a list of exactly window_size
    - stride candidates unless it is given the length. A window of one candidate is omitted.

    Raises:
        PromptError: the window is shorter than two or than the stride, or the stride below 1.
    """
    if not 1 <= stride <= window_size or window_size < 2:
        raise PromptError(
            f"window is {window_size} and stride {stride}; expected a window of 2 or more and a stride of 1 to the "
            "window, so that no candidate falls between two windows"
        )
    spans = []
    stop = num_candidates
    start = max(0, stop - window_size)
    while stop - start > 1:
        spans.append((start, stop))
        if start == 0:
            break
        start, stop = max(0, start - stride), stop - stride
    return spans
