"""Rankings read from a model as the inference client reads them: from one forward pass, or from generated text.

`score_windows_first_token` is FIRST: the log-probabilities of the identifiers after the answer's opening bracket.
Windows are packed end to end, so one forward ranks many. `generate_windows` writes the answer greedily with a
key-value cache and parses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from rankllm_composer.distributed import largest_of_ranks
from rankllm_composer.errors import RunError
from rankllm_composer.prompts.chat import identifier_token_ids
from rankllm_composer.prompts.permutations import (
    ParsedAnswer,
    format_permutation,
    identifiers,
    parse_answer,
    permutation_from_scores,
)
from rankllm_composer.prompts.windows import Window, answer_lengths
from rankllm_composer.ranking.forward import CACHED_ATTENTION, CachedBatch, inference, packed_forwards, rounds

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CLIENT_TOP_K = 30


MAX_FIRST_TOKEN_NUMBER = 9  # one token tells no more, and the client reads no more


@dataclass(frozen=True, eq=False, slots=True)
class FirstTokenAnswer:
    """What one forward pass says of a window.

    Attributes:
        scores: (N,) float64 log-probabilities in nats; -inf where the identifier was not among the tokens read.
        opens_with_bracket: the model's own first token is the bracket, so that the client finds the scores where they
            were trained.
    """

    scores: NDArray[np.float64]
    opens_with_bracket: bool

    @property
    def permutation(self) -> tuple[int, ...]:
        """Candidates, best first; those without a score follow in input order."""
        return permutation_from_scores(self.scores)


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """What a model wrote about a window, and what the client makes of it."""

    text: str
    parsed: ParsedAnswer

    @property
    def permutation(self) -> tuple[int, ...]:
        """Candidates, best first."""
        return self.parsed.permutation


def score_windows_first_token(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Sequence[Window],
    *,
    append_bracket: bool,
    eos_token_ids: Sequence[int] = (),
    top_k: int | None = CLIENT_TOP_K,
    batch_tokens: int = 16384,
    attention: str = "auto",
    lockstep: bool = False,
) -> list[FirstTokenAnswer]:
    """Score the candidates of each window from the logits of one position.

    Args:
        model: a causal LM whose forward takes `logits_to_keep`.
        tokenizer: its tokenizer.
        windows: with letters, or with numbers up to 9.
        append_bracket: True = the prompt ends with `[`, for models that never learned to write it. False = the model
            writes its own first token and the scores stand behind it, whatever it is, as the client does it; that takes
            a second forward only for windows where it is not `[`.
        eos_token_ids: tokens the model may not write first.
        top_k: only identifiers among the `top_k` likeliest tokens count, and a token counts as the identifier it
            decodes to: the client's rule. ` A` is not `A`, though servers of a year (vLLM from June 2025 to July 2026)
            drop the space and with it mix up the two. None = the log-probabilities of the identifiers' own tokens.
        batch_tokens: tokens in one forward, at most, unless a window alone has more.
        attention: see `attention.choose_attention`.
        lockstep: the model is sharded: all ranks call this together and run as many forwards as the busiest one.
    Returns:
        One answer a window.
    Raises:
        RunError: a window has numbers beyond 9, or logits are no numbers.
    Source:
        Gangi Reddy et al. 2024 (FIRST, arXiv:2406.15657); rank_llm 0.25.7.
    """
    for window in windows:
        if window.style == "numbers" and window.num_candidates > MAX_FIRST_TOKEN_NUMBER:
            raise RunError(
                f"window {window.id}: found {window.num_candidates} candidates named by numbers, allowed for "
                f"first-token decoding are {MAX_FIRST_TOKEN_NUMBER}, for it reads one digit; use letters, a shorter "
                "window, or generation"
            )
    read = _Reader(tokenizer, top_k)
    scores: list[NDArray[np.float64]] = [np.empty(0)] * len(windows)
    opens = [True] * len(windows)
    again: dict[int, NDArray[np.int32]] = {}
    with inference(model, attention):
        sequences = {i: window.input_ids for i, window in enumerate(windows)}
        for members, logits in packed_forwards(model, sequences, 2, batch_tokens, lockstep):
            logits[:, 0, list(eos_token_ids)] = -torch.inf
            own_tokens = logits[:, 0].argmax(dim=-1).tolist()
            for i, own, row in zip(members, own_tokens, logits[:, 1]):
                opens[i] = own == int(windows[i].input_ids[-1])
                if opens[i] or append_bracket:
                    scores[i] = read(row, windows[i])
                else:
                    again[i] = np.append(windows[i].input_ids[:-1], np.int32(own))
        if not append_bracket:
            for members, logits in packed_forwards(model, again, 1, batch_tokens, lockstep):
                for i, row in zip(members, logits[:, 0]):
                    scores[i] = read(row, windows[i])
    return [FirstTokenAnswer(*answer) for answer in zip(scores, opens)]


def generate_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Sequence[Window],
    *,
    eos_token_ids: Sequence[int] = (),
    constrained: bool = False,
    batch_tokens: int = 16384,
    lockstep: bool = False,
) -> list[GeneratedAnswer]:
    """Write the answer to each window greedily.

    As in the client an answer has exactly as many tokens as a whole one: the model may not end it before.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        windows: the prompts; their last token, `[`, is the model's to write.
        eos_token_ids: tokens that would end an answer.
        constrained: the model only chooses which candidate comes next; brackets and separators are set. Every answer
            is well-formed then. Needs identifiers of one token.
        batch_tokens: tokens in the cache of a batch, padding included, at most, unless a window alone has more.
        lockstep: see `score_windows_first_token`.
    Returns:
        One answer a window.
    Raises:
        PromptError: constrained, and an identifier takes several tokens.
        RunError: logits are no numbers.
    """
    answers: list[GeneratedAnswer | None] = [None] * len(windows)
    lengths = [answer_lengths(tokenizer, window.num_candidates, window.style) for window in windows]
    costs = [len(window.input_ids) + max(length) for window, length in zip(windows, lengths)]
    batches = _padded_batches(costs, [window.style for window in windows], batch_tokens)
    with inference(model, CACHED_ATTENTION):
        for batch in rounds(batches, lockstep):
            members = [windows[i] for i in batch]
            if constrained:
                most = largest_of_ranks(max((window.num_candidates for window in members), default=0), lockstep)
                orders = _choose_in_turn(model, tokenizer, members, most)
                texts = asked_texts = [format_permutation(order, w.style) for order, w in zip(orders, members)]
            else:
                most = largest_of_ranks(max((max(lengths[i]) for i in batch), default=0), lockstep)
                tokens = _write(model, members, most, eos_token_ids)
                texts = [_text(tokenizer, row[: lengths[i][1]]) for i, row in zip(batch, tokens)]
                asked_texts = [_text(tokenizer, row[: lengths[i][0]]) for i, row in zip(batch, tokens)]
            for i, window, text, asked in zip(batch, members, texts, asked_texts):
                whole = parse_answer(text, window.num_candidates, window.style)
                parsed = parse_answer(asked, window.num_candidates, window.style)
                answers[i] = GeneratedAnswer(text, replace(parsed, is_well_formed=whole.is_well_formed))
    return [answer for answer in answers if answer is not None]


class _Reader:
    """Reads the scores of a window from a position's logits."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, top_k: int | None) -> None:
        self._tokenizer = tokenizer
        self._top_k = top_k
        self._decoded: dict[int, str] = {}

    def __call__(self, logits: torch.Tensor, window: Window) -> NDArray[np.float64]:
        log_probabilities = torch.log_softmax(logits, dim=-1)  # (V,)
        _refuse_no_numbers(log_probabilities[None], [window])
        if self._top_k is None:
            names = identifier_token_ids(self._tokenizer, window.num_candidates, window.style)
            return log_probabilities[list(names)].double().cpu().numpy()
        values, tokens = log_probabilities.topk(min(self._top_k, len(log_probabilities)))
        named = [self._decode(token) for token in tokens.tolist()]
        return read_likeliest(named, values.tolist(), window)

    def _decode(self, token: int) -> str:
        if token not in self._decoded:
            text = self._tokenizer.decode([token])
            # SentencePiece drops the space that a text begins with; it is part of the token.
            lost = self._tokenizer.convert_ids_to_tokens(token).startswith("▁") and not text.startswith(" ")
            self._decoded[token] = " " + text if lost else text
        return self._decoded[token]


def read_likeliest(decoded: Sequence[str], log_probabilities: Sequence[float], window: Window) -> NDArray[np.float64]:
    """Scores of a window's candidates from the likeliest tokens, by the client's rule.

    Args:
        decoded: text of each token, likeliest first. Of tokens with the same text the last counts.
        log_probabilities: of each token, in nats.
        window: tells the candidates.
    Returns:
        (N,) float64; -inf where no token names the candidate.
    """
    place = {name: i for i, name in enumerate(identifiers(window.num_candidates, window.style))}
    scores = np.full(window.num_candidates, -np.inf)
    for text, value in zip(decoded, log_probabilities):
        if window.style == "numbers" and len(text) == 1 and text.isdecimal():
            text = str(int(text))  # also digits of other scripts
        if text in place:
            scores[place[text]] = value
    return scores


def _write(
    model: PreTrainedModel, windows: Sequence[Window], num_tokens: int, eos_token_ids: Sequence[int]
) -> list[list[int]]:
    """The model's own next `num_tokens` tokens after each prompt."""
    batch = CachedBatch(model, [window.input_ids[:-1] for window in windows])
    written: list[torch.Tensor] = []
    no_number = torch.zeros(len(batch.logits), dtype=torch.bool, device=batch.logits.device)
    while True:
        no_number |= batch.logits.isnan().any(dim=-1)
        batch.logits[:, list(eos_token_ids)] = -torch.inf
        written.append(batch.logits.argmax(dim=-1))  # (B,)
        if len(written) == num_tokens:
            _refuse_no_numbers(torch.where(no_number, torch.nan, 0.0)[:, None], windows)
            return torch.stack(written, dim=1).tolist()
        batch.feed(written[-1][:, None])


def _choose_in_turn(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Sequence[Window], num_choices: int
) -> list[list[int]]:
    """Candidates of each window in the order the model names them, none twice; one forward names one of each window."""
    names = [identifier_token_ids(tokenizer, window.num_candidates, window.style) for window in windows]
    between = [_separator(tokenizer, window) for window in windows] or [[]]
    batch = CachedBatch(model, [window.input_ids[:-1] for window in windows])
    orders: list[list[int]] = [[] for _ in windows]
    following = [[int(window.input_ids[-1])] for window in windows] or [[0]]
    for _ in range(num_choices):
        logits = batch.feed(torch.tensor(following, device=model.device)).cpu()
        _refuse_no_numbers(logits, windows)
        following = [[0, *separator] for separator in between]  # a list that has no candidate left goes on idly
        for i, tokens in enumerate(names):
            left = [k for k in range(len(tokens)) if k not in orders[i]]
            if left:
                scores = logits[i, [tokens[k] for k in left]]
                orders[i].append(left[int(scores.argmax())])
                following[i][0] = tokens[orders[i][-1]]
    return orders


def _separator(tokenizer: PreTrainedTokenizerBase, window: Window) -> list[int]:
    """Tokens between two identifiers of an answer."""
    first, second = identifier_token_ids(tokenizer, 2, window.style)
    tokens = tokenizer(format_permutation((0, 1), window.style))["input_ids"]
    return tokens[tokens.index(first) + 1 : tokens.index(second)]


def _refuse_no_numbers(logits: torch.Tensor, windows: Sequence[Window]) -> None:
    """Stop where (B, V) logits of B windows hold NaN: any order read from them would be an accident."""
    for window, found in zip(windows, logits.isnan().any(dim=-1).tolist()):
        if found:
            raise RunError(
                f"window {window.id}: found logits that are no numbers (NaN), allowed are numbers; look at the "
                "weights: the training went wrong, or they overflow in half precision, where float32 helps"
            )


def _text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _padded_batches(costs: Sequence[int], styles: Sequence[str], batch_tokens: int) -> list[list[int]]:
    """Windows of one style by falling cost, as many a batch as fit when each costs what the first does."""
    batches: list[list[int]] = []
    for i in sorted(range(len(costs)), key=lambda i: (styles[i], -costs[i])):
        first = batches[-1][0] if batches else i
        if not batches or styles[first] != styles[i] or costs[first] * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches
