"""Sliding windows over the candidates of many queries at once.

The windows of a query follow one another from the bottom of its list to the top, each seeing what the last one lifted;
those of different queries do not wait for each other, and are packed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from rankllm_composer.errors import RunError
from rankllm_composer.prompts.windows import fit_window, sliding_spans
from rankllm_composer.ranking.decoding import (
    FirstTokenAnswer,
    GeneratedAnswer,
    generate_windows,
    score_windows_first_token,
)
from rankllm_composer.ranking.evaluation import DECODINGS, Decoding

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankllm_composer.prompts.contract import DecodingContract


@dataclass(frozen=True, slots=True)
class RerankedQuery:
    """A query's candidates in their new order, and how its windows were answered.

    Attributes:
        docids: best first; those beyond top_k follow as they were.
        num_windows: windows read.
        num_opened: of these, where the model's own first token was `[`; None with generation.
        num_malformed: of these, where the answer was not exactly as asked; None with first-token decoding.
    """

    qid: str
    docids: tuple[str, ...]
    num_windows: int
    num_opened: int | None
    num_malformed: int | None


def default_decoding(contract: DecodingContract) -> Decoding:
    """The decoding a model was trained for: generation where no candidate scores were, else first token."""
    return "generation" if contract.objective == "generation" else "first_token"


def query_spans(num_candidates: int, contract: DecodingContract, top_k: int) -> list[tuple[int, int]]:
    """Windows of one pass over a query's candidates, see `sliding_spans`."""
    return sliding_spans(min(top_k, num_candidates), contract.window_size, contract.stride)


def rerank_queries(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: Mapping[str, str],
    documents: Mapping[str, str],
    run: Mapping[str, Sequence[str]],
    contract: DecodingContract,
    *,
    decoding: Decoding | None = None,
    constrained: bool = False,
    passes: int = 1,
    top_k: int = 100,
    batch_tokens: int = 16384,
    queries_at_once: int = 32,
    attention: str = "auto",
    on_windows: Callable[[int], object] = lambda num_windows: None,
) -> Iterator[RerankedQuery]:
    """Rerank the queries that have both a text and candidates, each as soon as it is done.

    Args:
        model, tokenizer: of `load_reranker`, or any causal LM.
        queries: texts by id.
        documents: texts by id, titles included (`prompts.document_text`).
        run: document ids of each query, best first.
        contract: window, stride, context, identifiers, and how an answer is read.
        decoding: None = the one the model was trained for.
        constrained: see `generate_windows`.
        passes: times that the window climbs each list.
        top_k: candidates reranked; the rest follow as they are.
        batch_tokens: tokens in one forward, at most.
        queries_at_once: queries whose windows are packed together.
        attention: see `attention.choose_attention`.
        on_windows: told the number of windows read, after each round.
    Raises:
        RunError: settings that cannot be.
        PromptError, RunError, PromptError: a window cannot be shown or read.
    """
    decoding = decoding or default_decoding(contract)
    check_settings(contract, decoding, constrained, passes, top_k, queries_at_once)
    waiting = (
        _Climb(qid, list(run[qid]), passes * query_spans(len(run[qid]), contract, top_k))
        for qid in queries
        if qid in run
    )
    climbing: list[_Climb] = []
    while True:
        climbing += islice(waiting, queries_at_once - len(climbing))
        if not climbing:
            return
        moving = [climb for climb in climbing if climb.spans]
        windows = [
            fit_window(
                f"{climb.qid}:{climb.spans[0][0]}-{climb.spans[0][1]}",
                queries[climb.qid],
                [documents[docid] for docid in climb.docids[slice(*climb.spans[0])]],
                tokenizer,
                style=contract.identifier_style,
                context_size_tokens=contract.context_size_tokens,
                max_passage_words=contract.max_passage_words,
            )
            for climb in moving
        ]
        answers: list[FirstTokenAnswer] | list[GeneratedAnswer]
        if decoding == "first_token":
            answers = score_windows_first_token(
                model,
                tokenizer,
                windows,
                append_bracket=contract.append_bracket,
                eos_token_ids=contract.eos_token_ids,
                batch_tokens=batch_tokens,
                attention=attention,
            )
        else:
            answers = generate_windows(
                model,
                tokenizer,
                windows,
                eos_token_ids=contract.eos_token_ids,
                constrained=constrained,
                batch_tokens=batch_tokens,
            )
        for i, climb in enumerate(moving):
            climb.take(answers[i])
        on_windows(len(windows))
        yield from (climb.result(decoding) for climb in climbing if not climb.spans)
        climbing = [climb for climb in climbing if climb.spans]


@dataclass(slots=True)
class _Climb:
    """A query's list on its way: windows still to come, lowest first."""

    qid: str
    docids: list[str]
    spans: list[tuple[int, int]]
    answers: list[FirstTokenAnswer | GeneratedAnswer] = field(default_factory=list)

    def take(self, answer: FirstTokenAnswer | GeneratedAnswer) -> None:
        start, stop = self.spans.pop(0)
        shown = self.docids[start:stop]
        self.docids[start:stop] = [shown[i] for i in answer.permutation]
        self.answers.append(answer)

    def result(self, decoding: Decoding) -> RerankedQuery:
        opened = sum(answer.opens_with_bracket for answer in self.answers if isinstance(answer, FirstTokenAnswer))
        malformed = sum(
            not answer.parsed.is_well_formed for answer in self.answers if isinstance(answer, GeneratedAnswer)
        )
        return RerankedQuery(
            self.qid,
            tuple(self.docids),
            len(self.answers),
            opened if decoding == "first_token" else None,
            malformed if decoding == "generation" else None,
        )


def check_settings(
    contract: DecodingContract, decoding: Decoding, constrained: bool, passes: int, top_k: int, queries_at_once: int
) -> None:
    """Stop before any work where the settings of a job cannot be.

    Raises:
        RunError: says which.
    """
    if decoding not in DECODINGS:
        raise RunError(f"decoding: found {decoding!r}, allowed are {', '.join(DECODINGS)}")
    if decoding == "generation" and contract.objective == "ranking":
        raise RunError(
            "decoding: found generation for a model trained by ranking alone, which never learned to write; use "
            "first_token"
        )
    if constrained and decoding != "generation":
        raise RunError(f"constrained: has no effect on {decoding}; leave it out, or use generation")
    for name, value, least in (("passes", passes, 1), ("top_k", top_k, 2), ("queries_at_once", queries_at_once, 1)):
        if value < least:
            raise RunError(f"{name}: found {value}, allowed is {least} or more")
