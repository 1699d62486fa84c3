"""Evaluation of a model on windows: both decodings compared with the presented order, the oracle and chance.

`evaluate_windows` ranks the windows of one rank; `summarize` computes figures from the results of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rankllm_composer.options import DECODINGS, Decoding
from rankllm_composer.prompts.permutations import ParsedAnswer, parse_permutation, ranks_from_permutation
from rankllm_composer.prompts.record import record_key
from rankllm_composer.prompts.relevance import order_values
from rankllm_composer.prompts.windows import record_window
from rankllm_composer.ranking.decoding import (
    FirstTokenAnswer,
    GeneratedAnswer,
    generate_windows,
    score_windows_first_token,
)
from rankllm_composer.ranking.metrics import chance_ndcg, kendall_tau, ndcg, reciprocal_rank

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankllm_composer.prompts.contract import DecodingContract
    from rankllm_composer.prompts.record import Record

CUTOFF = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationOptions:
    """How windows are ranked for evaluation.

    Attributes:
        decodings: the decodings to read.
        constrained: see `generate_windows`.
        num_shuffles: K, the number of random orders in which each window is presented again. If it is 1 or more, the
            window is also presented reversed. The orders depend only on the seed and the record's id. The user turns
            must parse.
        bias_decodings: the decodings by which reordered windows are ranked; each costs K + 2 times as much.
        seed: seed of the random orders.
        batch_tokens, attention: see `score_windows_first_token`.
    """

    decodings: Sequence[Decoding] = DECODINGS
    constrained: bool = False
    num_shuffles: int = 0
    bias_decodings: Sequence[Decoding] = ("first_token",)
    seed: int = 0
    batch_tokens: int = 16384
    attention: str = "auto"


class Presentation(NamedTuple):
    """Candidates, by their index in the record, in the order presented and in the ranking read from it (best first)."""

    order: tuple[int, ...]
    permutation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WindowResult:
    """Rankings of one window.

    Attributes:
        id: id of the record.
        teacher: the teacher's permutation.
        ranks: rank of each candidate, equal = tied; None = as in `teacher`.
        grades: relevance grade of each candidate; None if unknown.
        permutations: ranking by each decoding, best first.
        opens_with_bracket: see `FirstTokenAnswer`; None without first-token decoding.
        answer: the parsed answer; None without generation.
        reversed: by decoding, the window presented in reversed order.
        shuffled: by decoding, the window presented in K random orders.
    """

    id: str
    teacher: tuple[int, ...]
    grades: tuple[int, ...] | None
    permutations: dict[str, tuple[int, ...]]
    opens_with_bracket: bool | None = None
    answer: ParsedAnswer | None = None
    reversed: dict[str, Presentation] = field(default_factory=dict)
    shuffled: dict[str, tuple[Presentation, ...]] = field(default_factory=dict)
    ranks: tuple[int, ...] | None = None

    @property
    def is_judged(self) -> bool:
        """Whether a candidate is known to be relevant (grade 1 or more)."""
        return self.grades is not None and max(self.grades) >= 1


def evaluate_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    contract: DecodingContract,
    options: EvaluationOptions | None = None,
    *,
    lockstep: bool = False,
) -> list[WindowResult]:
    """Rank the window of each record by each decoding, and again with its candidates in other orders.

    Args:
        model, tokenizer: a causal LM and its tokenizer.
        records: the windows; relevance grades are used if known.
        contract: how the model is prompted and read.
        options: what to read; None for the defaults.
        lockstep: see `score_windows_first_token`.
    Raises:
        RunError, PromptError: a window cannot be presented or read.
    """
    options = options or EvaluationOptions()
    unchanged = [record_window(record, tokenizer) for record in records]
    orders = [
        (i, order)
        for i, record in enumerate(records)
        for order in _presentation_orders(record, options.num_shuffles, options.seed)
    ]
    reordered = [record_window(records[i], tokenizer, order) for i, order in orders]
    shared: dict[str, Any] = {"contract": contract, "batch_tokens": options.batch_tokens, "lockstep": lockstep}
    scored: list[FirstTokenAnswer] = []
    generated: list[GeneratedAnswer] = []
    presentations: dict[str, list[list[Presentation]]] = {}
    for decoding in options.decodings:
        windows = unchanged + reordered if decoding in options.bias_decodings else unchanged
        if decoding == "first_token":
            scored = score_windows_first_token(model, tokenizer, windows, attention=options.attention, **shared)
            rankings = [answer.permutation for answer in scored]
        else:
            generated = generate_windows(model, tokenizer, windows, constrained=options.constrained, **shared)
            rankings = [answer.permutation for answer in generated]
        presentations[decoding] = [[Presentation(tuple(range(len(r))), r)] for r in rankings[: len(unchanged)]]
        for (i, order), ranking in zip(orders, rankings[len(unchanged) :]):
            presentations[decoding][i].append(Presentation(order, tuple(order[place] for place in ranking)))
    return [
        WindowResult(
            id=record.id,
            teacher=parse_permutation(record.response, unchanged[i].num_candidates, unchanged[i].style),
            grades=record.known_grades,
            permutations={name: of_records[i][0].permutation for name, of_records in presentations.items()},
            opens_with_bracket=scored[i].opens_with_bracket if scored else None,
            answer=generated[i].parsed if generated else None,
            reversed={name: of_records[i][1] for name, of_records in presentations.items() if len(of_records[i]) > 1},
            shuffled={name: tuple(found) for name, of_records in presentations.items() if (found := of_records[i][2:])},
            ranks=_tied_ranks(record),
        )
        for i, record in enumerate(records)
    ]


def summarize(results: Iterable[WindowResult]) -> dict[str, float]:
    """Compute the figures of a set of windows.

    Args:
        results: results of all ranks; of results with the same id the first counts.
    Returns:
        Figures by name; figures that were not measured are left out. For each decoding D:
        - windows, judged_windows: number of windows, and of those with a relevant candidate (grade 1 or more), over
          which nDCG and MRR are averaged;
        - presented/ndcg@10, presented/mrr@10: of the presented order, which is that of the first stage;
        - oracle/…, chance/…: of the best order, and expected nDCG of a random order;
        - teacher/…: of the teacher's order;
        - D/ndcg@10, D/mrr@10; D/tau: Kendall's tau to the teacher;
        - first_token/opens_with_bracket: share of windows;
        - generation/malformed, /repeated, /out_of_range, /incomplete: shares of answers that deviate from the requested
          format, repeat a candidate, name one that does not exist, or omit one;
        - agreement/tau, agreement/same_first: between the decodings;
        - D/shuffled/ndcg@10, /ndcg@10_deviation (standard deviation over the K shuffles of a window), /tau (to the
          ranking of the unchanged window); D/reversed/ndcg@10, /tau: position bias.
    """
    # Sorted by id, so that no figure depends on which rank had which window.
    windows = [window for _, window in sorted({result.id: result for result in reversed(list(results))}.items())]
    judged = [window for window in windows if window.is_judged]
    figures: dict[str, float] = {"windows": len(windows), "judged_windows": len(judged)}

    def mean(name: str, values: Iterable[float | None]) -> None:
        known = [float(value) for value in values if value is not None and not math.isnan(value)]
        if known:
            figures[name] = float(np.mean(known))

    def quality(name: str, order_of: Callable[[WindowResult], Sequence[int] | None]) -> None:
        for measure, metric in (("ndcg", ndcg), ("mrr", reciprocal_rank)):
            mean(f"{name}/{measure}@{CUTOFF}", (_measure(metric, window, order_of(window)) for window in judged))

    quality("presented", lambda window: range(len(window.teacher)))
    quality("teacher", lambda window: window.teacher)
    quality("oracle", lambda window: np.argsort([-grade for grade in window.grades or ()], kind="stable").tolist())
    mean(f"chance/ndcg@{CUTOFF}", (chance_ndcg(window.grades or ()) for window in judged))
    for name in DECODINGS:
        quality(name, lambda window, name=name: window.permutations.get(name))  # type: ignore[misc]
        mean(f"{name}/tau", (_teacher_tau(window, window.permutations.get(name)) for window in windows))
        for way, again in (
            ("shuffled", [(window, other) for window in windows for other in window.shuffled.get(name, ())]),
            ("reversed", [(window, window.reversed[name]) for window in windows if name in window.reversed]),
        ):
            mean(f"{name}/{way}/tau", (_tau(window.permutations[name], other.permutation) for window, other in again))
            judged_again = [(window, other) for window, other in again if window.is_judged]
            mean(f"{name}/{way}/ndcg@{CUTOFF}", (_ndcg(window, other.permutation) for window, other in judged_again))
        mean(f"{name}/shuffled/ndcg@{CUTOFF}_deviation", (_deviation(window, name) for window in judged))
    mean("first_token/opens_with_bracket", (window.opens_with_bracket for window in windows))
    answers = [window.answer for window in windows if window.answer is not None]
    mean("generation/malformed", (not answer.is_well_formed for answer in answers))
    mean("generation/repeated", (answer.num_repeated > 0 for answer in answers))
    mean("generation/out_of_range", (answer.num_out_of_range > 0 for answer in answers))
    mean("generation/incomplete", (answer.num_missing > 0 for answer in answers))
    both = [[window.permutations.get(name) for name in DECODINGS] for window in windows]
    mean("agreement/tau", (_tau(one, other) for one, other in both if one and other))
    mean("agreement/same_first", (one[0] == other[0] for one, other in both if one and other))
    return figures


def window_ndcg(result: WindowResult) -> dict[str, float]:
    """nDCG@10 of one window as presented and by each decoding; empty if no candidate is known to be relevant."""
    if not result.is_judged:
        return {}
    orders = {"presented": tuple(range(len(result.teacher))), **result.permutations}
    return {name: value for name, order in orders.items() if (value := _ndcg(result, order)) is not None}


def position_matrix(results: Iterable[WindowResult], decoding: Decoding) -> NDArray[np.int64]:
    """Count candidates by presented (row) and ranked position (column) over shuffled windows: position bias.

    (N, N) int64, N the longest window. A model that ignores positions fills it evenly; one that repeats the presented
    order fills the diagonal.
    """
    presentations = [presentation for result in results for presentation in result.shuffled.get(decoding, ())]
    size = max((len(presentation.order) for presentation in presentations), default=0)
    counts = np.zeros((size, size), np.int64)
    for presentation in presentations:
        ranks = ranks_from_permutation(presentation.permutation)
        np.add.at(counts, (range(len(ranks)), [ranks[candidate] for candidate in presentation.order]), 1)
    return counts


def _presentation_orders(record: Record, num_shuffles: int, seed: int) -> list[tuple[int, ...]]:
    """Further orders in which to present a record: reversed, then K random ones; empty without shuffles."""
    if num_shuffles == 0:
        return []
    places = range(record.response.count("["))
    generator = np.random.default_rng((seed, record_key(record.id)))
    random = [tuple(generator.permutation(len(places)).tolist()) for _ in range(num_shuffles)]
    return [tuple(reversed(places)), *random]


def _measure(metric: Callable[..., float], window: WindowResult, permutation: Sequence[int] | None) -> float | None:
    if permutation is None or window.grades is None:
        return None
    return metric([window.grades[i] for i in permutation], k=CUTOFF)


def _ndcg(window: WindowResult, permutation: Sequence[int]) -> float | None:
    return _measure(ndcg, window, permutation)


def _tau(permutation: Sequence[int] | None, other: Sequence[int]) -> float | None:
    if permutation is None:
        return None
    return kendall_tau(ranks_from_permutation(permutation), ranks_from_permutation(other))


def _tied_ranks(record: Record) -> tuple[int, ...] | None:
    values = order_values(record)
    return None if values is None else tuple(sum(other > value for other in values) for value in values)


def _teacher_tau(window: WindowResult, permutation: Sequence[int] | None) -> float | None:
    """Tau to the teacher, over the pairs that it decides; None if it decides none."""
    if permutation is None or window.ranks is None:
        return _tau(permutation, window.teacher)
    return None if len(set(window.ranks)) < 2 else kendall_tau(ranks_from_permutation(permutation), window.ranks)


def _deviation(window: WindowResult, decoding: str) -> float | None:
    values = [_ndcg(window, presentation.permutation) for presentation in window.shuffled.get(decoding, ())]
    return float(np.std([value for value in values if value is not None])) if values else None
