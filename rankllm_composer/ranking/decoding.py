"""Decoding of rankings as the inference client does it: from one forward pass, or from generated text.

`score_windows_first_token` is FIRST: the log-probabilities of the identifiers after the answer's opening bracket.
Windows are packed end to end, so one forward pass ranks many. `generate_windows` generates the answer greedily with a
key-value cache and parses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from rankllm_composer.distributed import largest_of_ranks
from rankllm_composer.errors import PromptError, RunError
from rankllm_composer.options import ObjectiveName
from rankllm_composer.prompts.clients import CLIENT_TOP_K, CLIENTS, CURRENT_CLIENT, ClientVersion
from rankllm_composer.prompts.identifier_tokens import identifier_token_ids, separator_token_ids, splits_after_bracket
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

    from rankllm_composer.prompts.contract import DecodingContract


@dataclass(frozen=True, eq=False, slots=True)
class FirstTokenAnswer:
    """Scores of a window's candidates from one forward pass.

    Attributes:
        scores: (N,) float64 log-probabilities in nats; -inf if the identifier was not among the likeliest tokens.
        opens_with_bracket: whether the model's first token is the bracket; a client that lets the model write it finds
            the scores where they were trained only then.
    """

    scores: NDArray[np.float64]
    opens_with_bracket: bool

    @property
    def permutation(self) -> tuple[int, ...]:
        """Candidates, best first; those without a score follow in their input order."""
        return permutation_from_scores(self.scores)

    @property
    def is_unread(self) -> bool:
        """Whether no candidate has a score, so that the presented order is kept."""
        return bool(np.isneginf(self.scores).all())


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """A generated answer about a window, and the ranking that the client parses from it."""

    text: str
    parsed: ParsedAnswer

    @property
    def permutation(self) -> tuple[int, ...]:
        """Candidates, best first."""
        return self.parsed.permutation

    @property
    def is_unread(self) -> bool:
        """Whether the answer names no candidate, so that the presented order is kept."""
        return self.parsed.num_missing == len(self.permutation)


def score_windows_first_token(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Sequence[Window],
    contract: DecodingContract,
    *,
    top_k: int | None = CLIENT_TOP_K,
    batch_tokens: int = 16384,
    attention: str = "auto",
    lockstep: bool = False,
) -> list[FirstTokenAnswer]:
    """Score the candidates of each window from the logits of one position.

    Args:
        model, tokenizer: a causal LM whose forward accepts `logits_to_keep`, and its tokenizer.
        windows: windows whose identifiers are one token each.
        contract: with `append_bracket` the prompt ends with `[`. Otherwise the model writes its own first token and the
            scores are read after it, whatever it is, as in rank_llm 0.25.7; this needs a second forward pass only for
            windows where it is not `[`. `eos_token_ids` cannot come first.
        top_k: only identifiers among the `top_k` likeliest tokens count, and a token counts as the identifier it
            decodes to: the client's rule. ` A` is not `A`, although vLLM servers from June 2025 to July 2026 drop the
            space and so confuse the two. None: the log-probabilities of the identifiers' own tokens.
        batch_tokens: maximum number of tokens in one forward pass, unless a single window has more.
        attention: see `attention.choose_attention`.
        lockstep: the model is sharded: all ranks call this together and run as many forward passes as the busiest rank.
    Raises:
        RunError: a window has identifiers that are not one token each, or logits contain NaN.
    Source:
        Gangi Reddy et al. 2024 (FIRST, arXiv:2406.15657); rank_llm 0.25.7 and 0.26.0.
    """
    for window in windows:
        try:
            identifier_token_ids(tokenizer, window.num_candidates, window.style, contract.objective)
        except PromptError as error:
            raise RunError(
                f"window {window.id} has {window.num_candidates} candidates named by {window.style}, which the first "
                f"token cannot tell apart: {error}"
            ) from error
    read = _ScoreReader(tokenizer, top_k, contract.client_version)
    scores: list[NDArray[np.float64]] = [np.empty(0)] * len(windows)
    opens = [True] * len(windows)
    continued: dict[int, NDArray[np.int32]] = {}
    with inference(model, attention, max((len(window.input_ids) for window in windows), default=1)):
        sequences = {i: window.input_ids for i, window in enumerate(windows)}
        for members, logits in packed_forwards(model, sequences, 2, batch_tokens, lockstep):
            logits[:, 0, list(contract.eos_token_ids)] = -torch.inf
            first_tokens = logits[:, 0].argmax(dim=-1).tolist()
            for i, first_token, row in zip(members, first_tokens, logits[:, 1]):
                opens[i] = first_token == int(windows[i].input_ids[-1])
                if opens[i] or contract.append_bracket:
                    scores[i] = read(row, windows[i])
                else:
                    continued[i] = np.append(windows[i].input_ids[:-1], np.int32(first_token))
        if not contract.append_bracket:
            for members, logits in packed_forwards(model, continued, 1, batch_tokens, lockstep):
                for i, row in zip(members, logits[:, 0]):
                    scores[i] = read(row, windows[i])
    return [FirstTokenAnswer(*answer) for answer in zip(scores, opens)]


def generate_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Sequence[Window],
    contract: DecodingContract,
    *,
    constrained: bool = False,
    batch_tokens: int = 16384,
    lockstep: bool = False,
) -> list[GeneratedAnswer]:
    """Generate the answer to each window greedily.

    As in the client, an answer has exactly as many tokens as a complete one: the model cannot end it earlier.

    Args:
        model, tokenizer: a causal LM and its tokenizer.
        windows: the prompts; their last token, `[`, is left for the model to write.
        contract: `eos_token_ids` are never generated.
        constrained: the model only chooses the next candidate; brackets and separators are fixed, so that every answer
            is well-formed. Requires identifiers of one token.
        batch_tokens: maximum number of tokens in the cache of a batch, including padding, unless a single window has
            more.
        lockstep: see `score_windows_first_token`.
    Raises:
        PromptError: `constrained` and an identifier has several tokens.
        RunError: logits contain NaN.
    """
    answers: list[GeneratedAnswer | None] = [None] * len(windows)
    lengths = [answer_lengths(tokenizer, w.num_candidates, w.style, contract.client_version) for w in windows]
    # The first identifier may or may not be one token with its bracket, then also the one that the model puts first.
    joins = [splits_after_bracket(tokenizer, window.num_candidates, window.style) for window in windows]
    lengths = [(asked, whole + is_joined) for (asked, whole), is_joined in zip(lengths, joins)]
    costs = [len(window.input_ids) + max(length) for window, length in zip(windows, lengths)]
    batches = _padded_batches(costs, [window.style for window in windows], batch_tokens)
    with inference(model, CACHED_ATTENTION, max(costs, default=1)):
        for batch in rounds(batches, lockstep):
            members = [windows[i] for i in batch]
            if constrained:
                steps = largest_of_ranks(max((window.num_candidates for window in members), default=0), lockstep)
                orders = _choose_candidates(model, tokenizer, members, steps, contract.objective)
                texts = requested = [format_permutation(order, w.style) for order, w in zip(orders, members)]
            else:
                steps = largest_of_ranks(max((max(lengths[i]) for i in batch), default=0), lockstep)
                tokens = _generate(model, members, steps, contract.eos_token_ids)
                texts = [_decode(tokenizer, row[: lengths[i][1]]) for i, row in zip(batch, tokens)]
                texts = [_first_brackets(w, text) if joins[i] else text for i, w, text in zip(batch, members, texts)]
                requested = [_decode(tokenizer, row[: lengths[i][0]]) for i, row in zip(batch, tokens)]
            for i, window, text, requested_text in zip(batch, members, texts, requested):
                complete = parse_answer(text, window.num_candidates, window.style)
                parsed = parse_answer(requested_text, window.num_candidates, window.style)
                answers[i] = GeneratedAnswer(text, replace(parsed, is_well_formed=complete.is_well_formed))
    return [answer for answer in answers if answer is not None]


class _ScoreReader:
    """Reads the scores of a window from the logits of one position."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, top_k: int | None, client: ClientVersion) -> None:
        self._tokenizer = tokenizer
        self._top_k = top_k
        self._client = client
        self._decoded: dict[int, str] = {}

    def __call__(self, logits: torch.Tensor, window: Window) -> NDArray[np.float64]:
        log_probabilities = torch.log_softmax(logits, dim=-1)  # (V,)
        check_not_nan(log_probabilities[None], [window])
        if self._top_k is None:
            tokens = identifier_token_ids(self._tokenizer, window.num_candidates, window.style)
            scores: NDArray[np.float64] = log_probabilities[list(tokens)].double().cpu().numpy()
            return scores
        values, likeliest = log_probabilities.topk(min(self._top_k, len(log_probabilities)))
        texts = [self._decode(token) for token in likeliest.tolist()]
        return read_likeliest(texts, values.tolist(), window, self._client)

    def _decode(self, token: int) -> str:
        if token not in self._decoded:
            text = self._tokenizer.decode([token])
            # SentencePiece drops the space at the beginning of a text; it is part of the token.
            drops_space = self._tokenizer.convert_ids_to_tokens(token).startswith("▁") and not text.startswith(" ")
            self._decoded[token] = " " + text if drops_space else text
        return self._decoded[token]


def read_likeliest(
    decoded: Sequence[str], log_probabilities: Sequence[float], window: Window, client: ClientVersion = CURRENT_CLIENT
) -> NDArray[np.float64]:
    """Read the scores of a window's candidates from the likeliest tokens, by the client's rule.

    Args:
        decoded: text of each token. Of several that name one candidate the likeliest counts; in rank_llm 0.25.7 the
            last.
        log_probabilities: of each token, in nats.
        window: the window whose candidates are scored.
        client: version of the client.
    Returns:
        (N,) float64; -inf if no token names the candidate.
    """
    index = {name: i for i, name in enumerate(identifiers(window.num_candidates, window.style))}
    scores = np.full(window.num_candidates, -np.inf)
    keeps_largest = CLIENTS[client].keeps_largest
    for text, value in zip(decoded, log_probabilities):
        if window.style == "numbers" and text.isdecimal() and (len(text) == 1 or (keeps_largest and text.isascii())):
            text = str(int(text))  # including digits of other scripts
        if text in index and not (keeps_largest and value <= scores[index[text]]):
            scores[index[text]] = value
    return scores


def _generate(
    model: PreTrainedModel, windows: Sequence[Window], num_tokens: int, eos_token_ids: Sequence[int]
) -> list[list[int]]:
    """Generate the next `num_tokens` tokens after each prompt."""
    batch = CachedBatch(model, [window.input_ids[:-1] for window in windows])
    generated: list[torch.Tensor] = []
    has_nan = torch.zeros(len(batch.logits), dtype=torch.bool, device=batch.logits.device)
    while True:
        has_nan |= batch.logits.isnan().any(dim=-1)
        batch.logits[:, list(eos_token_ids)] = -torch.inf
        generated.append(batch.logits.argmax(dim=-1))  # (B,)
        if len(generated) == num_tokens:
            check_not_nan(torch.where(has_nan, torch.nan, 0.0)[:, None], windows)
            tokens: list[list[int]] = torch.stack(generated, dim=1).tolist()
            return tokens
        batch.feed(generated[-1][:, None])


def _choose_candidates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Sequence[Window],
    num_choices: int,
    objective: ObjectiveName,
) -> list[list[int]]:
    """Candidates of each window in the order the model names them, without repetition: one per forward pass."""
    tokens_of = [identifier_token_ids(tokenizer, window.num_candidates, window.style, objective) for window in windows]
    separators = [separator_token_ids(tokenizer, window.style) for window in windows] or [[]]
    batch = CachedBatch(model, [window.input_ids[:-1] for window in windows])
    orders: list[list[int]] = [[] for _ in windows]
    next_tokens = [[int(window.input_ids[-1])] for window in windows] or [[0]]
    for _ in range(num_choices):
        logits = batch.feed(torch.tensor(next_tokens, device=model.device)).cpu()
        check_not_nan(logits, windows)
        next_tokens = [[0, *separator] for separator in separators]  # placeholder for windows with no candidate left
        for i, tokens in enumerate(tokens_of):
            left = [k for k in range(len(tokens)) if k not in orders[i]]
            if left:
                scores = logits[i, [tokens[k] for k in left]]
                orders[i].append(left[int(scores.argmax())])
                next_tokens[i][0] = tokens[orders[i][-1]]
    return orders


def check_not_nan(logits: torch.Tensor, windows: Sequence[Window]) -> None:
    """Raise if (B, V) logits of B windows contain NaN: any order read from them would be arbitrary."""
    for window, is_nan in zip(windows, logits.isnan().any(dim=-1).tolist()):
        if is_nan:
            raise RunError(
                f"window {window.id}: logits contain NaN. The weights are broken or overflow in half precision; "
                "rerank with --dtype float32 to find out which."
            )


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _first_brackets(window: Window, text: str) -> str:
    """An answer as far as its last bracket, if it has one for each candidate."""
    parts = text.split("]")
    return text if len(parts) <= window.num_candidates else "]".join(parts[: window.num_candidates]) + "]"


def _padded_batches(costs: Sequence[int], styles: Sequence[str], batch_tokens: int) -> list[list[int]]:
    """Batch windows of one style by falling cost, so that each costs at most as much as the first of its batch."""
    batches: list[list[int]] = []
    for i in sorted(range(len(costs)), key=lambda i: (styles[i], -costs[i])):
        first = batches[-1][0] if batches else i
        if not batches or styles[first] != styles[i] or costs[first] * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches
