"""Reranking with an exported model: sliding windows over the candidates of many queries at once.

The windows of a query run from the bottom of its list to the top, each over the order that the previous one left.
Windows of different queries are independent, and are packed together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rankllm_composer.errors import RunError, first_line
from rankllm_composer.options import Decoding, RerankOptions
from rankllm_composer.prompts.contract import DecodingContract
from rankllm_composer.prompts.identifier_tokens import identifier_token_ids, separator_token_ids
from rankllm_composer.prompts.windows import fit_window, sliding_spans
from rankllm_composer.ranking.decoding import (
    FirstTokenAnswer,
    GeneratedAnswer,
    generate_windows,
    score_windows_first_token,
)
from rankllm_composer.ranking.served_model import load_served_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankllm_composer.prompts.windows import Window


@dataclass(frozen=True, slots=True)
class RankedPassage:
    """A passage in its place of a ranking.

    Attributes:
        index: index of the passage in the input.
        text: the passage.
        score: as in the TREC run: the number of passages for the best, 1 for the last.
        log_probability: log-probability, in nats, of the passage's identifier in the last window that contained it;
            -inf if it was not among the likeliest tokens. None if no window scored it, as in generation.
    """

    index: int
    text: str
    score: int
    log_probability: float | None


@dataclass(frozen=True, slots=True)
class RerankedQuery:
    """A query's candidates in their new order, and statistics of its windows.

    Attributes:
        qid: id of the query.
        docids: document ids, best first; those beyond `top_k` follow in their order.
        num_windows: number of windows read.
        num_opened: windows in which the model's first token was `[`; None with generation.
        num_malformed: windows whose answer deviated from the requested format; None with first-token decoding.
        num_unread: windows that kept their order because their answer named no candidate.
        num_emptied: passages that were shown empty in a window, because not one piece of each fits.
        num_client_empties: windows in which the inference client would show every passage empty.
    """

    qid: str
    docids: tuple[str, ...]
    num_windows: int
    num_opened: int | None
    num_malformed: int | None
    num_unread: int = 0
    num_emptied: int = 0
    num_client_empties: int = 0


class Reranker:
    """A model with its tokenizer, its decoding contract and the options to rerank with.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        contract: how the model is prompted and read; `options` override its window.
        options: how to rerank; None for the defaults.
        name: name and version of the model; a stopped job resumes only with the same.
    Attributes:
        decoding: the decoding used: that of the options, else the one that the model was trained for.
    Raises:
        RunError: the model does not support the options.
        PromptError: the decoding needs identifiers of one token, and the model or its tokenizer has others.
        ModelError: the contract does not allow the window or its stride.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        contract: DecodingContract,
        options: RerankOptions | None = None,
        *,
        name: str = "",
    ) -> None:
        options = options or RerankOptions()
        self.model = model
        self.tokenizer = tokenizer
        window = options.window_size or contract.window_size
        stride = contract.stride if window == contract.window_size else min(contract.stride, max(1, window // 2))
        self.contract = dataclasses.replace(contract, window_size=window, stride=options.stride or stride)
        self.options = options
        self.name = name
        trained_for: Decoding = "generation" if contract.objective == "generation" else "first_token"
        self.decoding = options.decoding or trained_for
        if self.decoding == "generation" and contract.objective == "ranking":
            raise RunError(
                "decoding is generation, but the model was trained by ranking alone and never learned to write. Use "
                "first_token."
            )
        if options.constrained and self.decoding != "generation":
            raise RunError(f"constrained has no effect on {self.decoding} decoding. Leave it out, or use generation.")
        if options.constrained or self.decoding == "first_token":  # fails now, not at the first window
            identifier_token_ids(tokenizer, window, contract.identifier_style, contract.objective)
        if options.constrained:
            separator_token_ids(tokenizer, contract.identifier_style)

    @classmethod
    def from_pretrained(cls, folder: str | Path, options: RerankOptions | None = None) -> Reranker:
        """Load a model: an exported folder with its `reranker.json`, or any Hugging Face folder or id.

        Without `reranker.json` the options have to give `decoding` (or `objective`), `identifiers` and `window_size`.

        Raises:
            ModelError: it cannot be loaded, a file is not what was exported, or its tokenizer has another chat template
                than its contract states.
            RunError: it has no contract and the options do not replace it, or it does not support the options.
        """
        options = options or RerankOptions()
        model, tokenizer, contract, name = load_served_model(folder, options)
        return cls(model, tokenizer, contract, options, name=name)

    def rerank(self, query: str, passages: Sequence[str]) -> list[RankedPassage]:
        """Rank passages, given in the order of the first stage, by their relevance to a query.

        Raises:
            RunError, PromptError: a window cannot be presented or read.
        """
        documents = {str(i): text for i, text in enumerate(passages)}
        states = self._slide({"query": query}, documents, {"query": list(documents)})
        return [
            RankedPassage(int(docid), documents[docid], len(passages) - place, state.log_probabilities.get(docid))
            for state in states
            for place, docid in enumerate(state.docids)
        ]

    def rerank_run(
        self,
        first_stage: str | Path | Mapping[str, Sequence[str]],
        queries: str | Path | Mapping[str, str],
        documents: str | Path | Mapping[str, str],
        output: str | Path,
        *,
        progress_bar: bool = True,
    ) -> list[RerankedQuery]:
        """Rerank a first-stage run and write a TREC run; resumes a stopped job with the same settings.

        Args:
            first_stage: TREC run, or document ids of each query, best first.
            queries: JSONL file, BEIR folder or irds:ID, or texts by query id.
            documents: the same, or texts by document id, including their titles.
            output: path of the TREC run to write; replaced if it exists.
            progress_bar: whether to show progress.
        Returns:
            The queries that have both a text and candidates, in the order of `queries`.
        Raises:
            RankLLMComposerError: a file cannot be read or written, or a window cannot be presented or read.
        """
        from rankllm_composer.ranking.rerank import rerank_run
        from rankllm_composer.sources.retrieval_files import load_documents, load_queries, load_run

        run = first_stage if isinstance(first_stage, Mapping) else load_run(first_stage)
        texts = queries if isinstance(queries, Mapping) else load_queries(queries)
        if not isinstance(documents, Mapping):
            top_k = self.options.top_k
            documents = load_documents(documents, {docid for qid in texts for docid in run.get(qid, ())[:top_k]})
        return rerank_run(self, texts, documents, run, output, progress_bar=progress_bar)

    def rerank_queries(
        self,
        queries: Mapping[str, str],
        documents: Mapping[str, str],
        first_stage: Mapping[str, Sequence[str]],
        on_windows: Callable[[int], object] = lambda num_windows: None,
    ) -> Iterator[RerankedQuery]:
        """Rerank the queries that have both a text and candidates; yields each as soon as it is complete.

        Args:
            queries: texts by query id.
            documents: texts by document id, including titles (`prompts.document_text`).
            first_stage: document ids of each query, best first.
            on_windows: called with the number of windows read after each round.
        Raises:
            RunError, PromptError: a window cannot be presented or read.
        """
        for state in self._slide(queries, documents, first_stage, on_windows):
            yield state.result(self.decoding)

    def spans(self, num_candidates: int) -> list[tuple[int, int]]:
        """Windows over a list of candidates in all passes, see `sliding_spans`."""
        num_ranked = min(self.options.top_k, num_candidates)
        return self.options.passes * sliding_spans(num_ranked, self.contract.window_size, self.contract.stride)

    def _slide(
        self,
        queries: Mapping[str, str],
        documents: Mapping[str, str],
        first_stage: Mapping[str, Sequence[str]],
        on_windows: Callable[[int], object] = lambda num_windows: None,
    ) -> Iterator[_QueryState]:
        waiting = (
            _QueryState(qid, list(first_stage[qid]), self.spans(len(first_stage[qid])))
            for qid in queries
            if qid in first_stage
        )
        active: list[_QueryState] = []
        while True:
            active += islice(waiting, self.options.queries_at_once - len(active))
            if not active:
                return
            unfinished = [state for state in active if state.spans]
            windows = [
                self._window(
                    f"{state.qid}:{state.spans[0][0]}-{state.spans[0][1]}",
                    queries[state.qid],
                    [documents[docid] for docid in state.docids[slice(*state.spans[0])]],
                )
                for state in unfinished
            ]
            for state, window, answer in zip(unfinished, windows, self._answer(windows)):
                state.apply(window, answer)
            on_windows(len(windows))
            yield from (state for state in active if not state.spans)
            active = [state for state in active if state.spans]

    def check_queries(self, queries: Mapping[str, str], first_stage: Mapping[str, Sequence[str]]) -> None:
        """Raise PromptError if the longest window of a query does not fit the context even without passages."""
        for qid, query in queries.items():
            longest = max((stop - start for start, stop in self.spans(len(first_stage[qid]))), default=0)
            if longest:
                self._window(qid, query, [""] * longest)

    def _window(self, window_id: str, query: str, texts: Sequence[str]) -> Window:
        return fit_window(
            window_id,
            query,
            texts,
            self.tokenizer,
            prompt=self.contract.prompt,
            context_size_tokens=self.contract.context_size_tokens,
            max_passage_words=self.contract.max_passage_words,
            client=self.contract.client_version,
        )

    def _answer(self, windows: Sequence[Window]) -> Sequence[FirstTokenAnswer | GeneratedAnswer]:
        shared = (self.model, self.tokenizer, windows, self.contract)
        batch_tokens = self.options.batch_tokens
        try:
            if self.decoding == "first_token":
                return score_windows_first_token(*shared, batch_tokens=batch_tokens, attention=self.options.attention)
            return generate_windows(*shared, batch_tokens=batch_tokens, constrained=self.options.constrained)
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"the device is out of memory with batch_tokens {batch_tokens} ({first_line(error)}). Lower "
                "--batch-tokens, and rerun the same command to resume."
            ) from error


@dataclass(slots=True)
class _QueryState:
    """Progress of one query: its current order, and the windows still to read, lowest first."""

    qid: str
    docids: list[str]
    spans: list[tuple[int, int]]
    answers: list[FirstTokenAnswer | GeneratedAnswer] = field(default_factory=list)
    log_probabilities: dict[str, float] = field(default_factory=dict)
    num_emptied: int = 0
    num_client_empties: int = 0

    def apply(self, window: Window, answer: FirstTokenAnswer | GeneratedAnswer) -> None:
        """Reorder the next window."""
        self.num_emptied += window.num_emptied
        self.num_client_empties += window.client_empties
        start, stop = self.spans.pop(0)
        presented = self.docids[start:stop]
        self.docids[start:stop] = [presented[i] for i in answer.permutation]
        self.answers.append(answer)
        if isinstance(answer, FirstTokenAnswer):
            self.log_probabilities.update(zip(presented, answer.scores.tolist()))

    def result(self, decoding: Decoding) -> RerankedQuery:
        opened = malformed = None
        if decoding == "first_token":
            opened = sum(answer.opens_with_bracket for answer in self.answers if isinstance(answer, FirstTokenAnswer))
        else:
            parsed = [answer.parsed for answer in self.answers if isinstance(answer, GeneratedAnswer)]
            malformed = sum(not answer.is_well_formed for answer in parsed)
        return RerankedQuery(
            self.qid,
            tuple(self.docids),
            len(self.answers),
            opened,
            malformed,
            num_unread=sum(answer.is_unread for answer in self.answers),
            num_emptied=self.num_emptied,
            num_client_empties=self.num_client_empties,
        )
