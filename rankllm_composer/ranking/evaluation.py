"""How well a model ranks windows: both decodings beside the order as presented, the oracle and chance.

`evaluate_windows` reads the rankings of a rank's windows, `summarise` makes figures of the results of all ranks; a
window that two ranks hold counts once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rankllm_composer.prompts.permutations import ParsedAnswer, parse_permutation, ranks_from_permutation
from rankllm_composer.prompts.record import record_key
from rankllm_composer.prompts.windows import record_window
from rankllm_composer.ranking.decoding import (
    CLIENT_TOP_K,
    FirstTokenAnswer,
    GeneratedAnswer,
    generate_windows,
    score_windows_first_token,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankllm_composer.prompts.contract import DecodingContract
    from rankllm_composer.prompts.record import Record

Floats = NDArray[np.float64]


def _dcg(grades: Floats, k: int | None) -> float:
    gains = np.maximum(grades[:k], 0.0)
    return float((gains / np.log2(np.arange(2, len(gains) + 2))).sum())


def _grades(name: str, grades: Sequence[float], k: int | None) -> Floats:
    if k is not None and k < 1:
        raise ValueError(f"{name}: k is {k}, allowed is 1 or more, or None for the whole ranking")
    values = np.asarray(grades, dtype=np.float64)
    if values.ndim != 1 or np.isnan(values).any():
        raise ValueError(f"{name}: found grades {grades!r}, allowed is one number a candidate; use 0 for unjudged ones")
    return values


def ndcg(grades: Sequence[float], ideal_grades: Sequence[float] | None = None, k: int | None = 10) -> float:
    """Normalised discounted cumulative gain of a ranking.

        nDCG = DCG(grades) / DCG(ideal_grades, best first)
        DCG = sum over ranks r = 1 … k of max(grade_r, 0) / log2(r + 1)

    The gain is the grade itself, as in trec_eval's ndcg_cut and ir-measures' nDCG@k; the variant with 2^grade - 1 gives
    other figures on graded judgments.

    Args:
        grades: relevance grades in ranked order, best-ranked first; 0 for unjudged candidates.
        ideal_grades: all grades judged for the query, in any order, also of candidates the ranking lacks. None = the
            ranking's own, which makes the best order of these candidates 1.
        k: ranks that count. None = all.
    Returns:
        0 … 1; 0 where nothing relevant is judged.
    Raises:
        ValueError: k is below 1, or grades are not a list of numbers.
    Source:
        Järvelin and Kekäläinen 2002.
    """
    found = _grades("ndcg", grades, k)
    ideal = found if ideal_grades is None else _grades("ndcg", ideal_grades, k)
    best = _dcg(np.sort(ideal)[::-1], k)
    return _dcg(found, k) / best if best > 0 else 0.0


def reciprocal_rank(grades: Sequence[float], k: int | None = 10, min_grade: float = 1) -> float:
    """One over the rank of the first relevant candidate.

    Args:
        grades: relevance grades in ranked order, best-ranked first; 0 for unjudged candidates.
        k: ranks that count. None = all.
        min_grade: the lowest grade that is relevant.
    Returns:
        0 … 1; 0 where none of the first k is relevant.
    Raises:
        ValueError: k is below 1, or grades are not a list of numbers.
    """
    places = np.flatnonzero(_grades("reciprocal_rank", grades, k)[:k] >= min_grade)
    return 1.0 / (int(places[0]) + 1) if len(places) else 0.0


def kendall_tau(ranks: Sequence[float], other_ranks: Sequence[float]) -> float:
    """Kendall's tau-b between two rankings of the same candidates.

        tau = (concordant - discordant pairs) / sqrt(pairs untied in one * pairs untied in the other)

    Args:
        ranks: the rank of each candidate in one ranking.
        other_ranks: the rank of each candidate in the other, in the same order of candidates.
    Returns:
        -1 (reversed) … 1 (the same order); NaN where a ranking ties all its candidates, as a single one is.
    Raises:
        ValueError: the rankings are not of the same candidates.
    Source:
        Kendall 1945.
    """
    one, other = np.asarray(ranks, dtype=np.float64), np.asarray(other_ranks, dtype=np.float64)
    if one.ndim != 1 or one.shape != other.shape:
        raise ValueError(
            f"kendall_tau: found ranks of shapes {one.shape} and {other.shape}, allowed is one rank a candidate in both"
        )
    signs = np.sign(one[:, None] - one[None, :])  # (N, N)
    other_signs = np.sign(other[:, None] - other[None, :])
    untied = np.abs(signs).sum() * np.abs(other_signs).sum()
    return float((signs * other_signs).sum() / np.sqrt(untied)) if untied else float("nan")


Decoding = Literal["first_token", "generation"]


DECODINGS: tuple[Decoding, ...] = ("first_token", "generation")


CUTOFF = 10


@dataclass(frozen=True, slots=True)
class Presentation:
    """A window shown in one order of its candidates, and the ranking read from it.

    Attributes:
        order: candidates as they were shown, by their index in the record.
        permutation: candidates, best first, by their index in the record.
    """

    order: tuple[int, ...]
    permutation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WindowResult:
    """Rankings of one window.

    Attributes:
        id: the record's.
        teacher: the teacher's permutation.
        grades: relevance grade of each candidate; None = not known.
        permutations: ranking by each decoding, best first.
        opens_with_bracket: see `FirstTokenAnswer`; None without first-token decoding.
        answer: what was parsed; None without generation.
        reversed: by decoding, the window shown in reversed order.
        shuffled: by decoding, the window shown in K random orders.
    """

    id: str
    teacher: tuple[int, ...]
    grades: tuple[int, ...] | None
    permutations: dict[str, tuple[int, ...]]
    opens_with_bracket: bool | None = None
    answer: ParsedAnswer | None = None
    reversed: dict[str, Presentation] = field(default_factory=dict)
    shuffled: dict[str, tuple[Presentation, ...]] = field(default_factory=dict)


def evaluate_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    contract: DecodingContract,
    *,
    decodings: Sequence[Decoding] = DECODINGS,
    constrained: bool = False,
    num_shuffles: int = 0,
    bias_decodings: Sequence[Decoding] = ("first_token",),
    seed: int = 0,
    top_k: int | None = CLIENT_TOP_K,
    batch_tokens: int = 16384,
    attention: str = "auto",
    lockstep: bool = False,
) -> list[WindowResult]:
    """Rank each window by each decoding, and again with its candidates shown in other orders.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        records: the windows; relevance grades are used where they are known.
        contract: tells whether the bracket is appended and which tokens end an answer.
        decodings: which to read.
        constrained: see `generate_windows`.
        num_shuffles: K, random orders in which each window is shown besides; from 1 on it is shown reversed, too. They
            come from (seed, record id) alone. Their user turns must read back.
        bias_decodings: by which of the decodings windows in other orders are ranked; each costs K + 2 times as much.
        seed: of the shuffles.
        top_k, batch_tokens, attention, lockstep: see `score_windows_first_token`.
    Returns:
        One result a record.
    Raises:
        RunError, PromptError, PromptError: a window cannot be shown or read.
    """
    own = [record_window(record, tokenizer) for record in records]
    others = [(i, order) for i, record in enumerate(records) for order in _orders(record, num_shuffles, seed)]
    reordered = [record_window(records[i], tokenizer, order) for i, order in others]
    options: dict[str, Any] = {
        "eos_token_ids": contract.eos_token_ids,
        "batch_tokens": batch_tokens,
        "lockstep": lockstep,
    }
    scored: list[FirstTokenAnswer] = []
    written: list[GeneratedAnswer] = []
    shown: dict[str, list[list[Presentation]]] = {}
    for decoding in decodings:
        windows = own + reordered if decoding in bias_decodings else own
        if decoding == "first_token":
            bracket = contract.append_bracket
            scored = score_windows_first_token(
                model, tokenizer, windows, append_bracket=bracket, top_k=top_k, attention=attention, **options
            )
            rankings = [answer.permutation for answer in scored]
        else:
            written = generate_windows(model, tokenizer, windows, constrained=constrained, **options)
            rankings = [answer.permutation for answer in written]
        shown[decoding] = [[Presentation(tuple(range(len(ranking))), ranking)] for ranking in rankings[: len(own)]]
        for (i, order), ranking in zip(others, rankings[len(own) :]):
            shown[decoding][i].append(Presentation(order, tuple(order[place] for place in ranking)))
    return [
        WindowResult(
            id=record.id,
            teacher=parse_permutation(record.response, own[i].num_candidates, own[i].style),
            grades=record.grades,
            permutations={name: several[i][0].permutation for name, several in shown.items()},
            opens_with_bracket=scored[i].opens_with_bracket if scored else None,
            answer=written[i].parsed if written else None,
            reversed={name: several[i][1] for name, several in shown.items() if len(several[i]) > 1},
            shuffled={name: tuple(several[i][2:]) for name, several in shown.items() if len(several[i]) > 2},
        )
        for i, record in enumerate(records)
    ]


def summarise(results: Iterable[WindowResult]) -> dict[str, float]:
    """Figures of a set of windows.

    Args:
        results: of all ranks; of results with the same id the first counts.
    Returns:
        By name; a figure that nothing was measured for is left out. For each decoding D:
        - windows, judged_windows: how many, and how many of them have a relevant candidate, on which nDCG and MRR are
          means (a grade of 1 or more is relevant);
        - presented/ndcg@10, presented/mrr@10: of the order as shown, where the first stage put it;
        - oracle/…, chance/…: of the best order, and nDCG expected of a random one;
        - teacher/…: of the teacher's order;
        - D/ndcg@10, D/mrr@10; D/tau: Kendall's tau to the teacher;
        - first_token/opens_with_bracket: share of windows;
        - generation/malformed, /repeated, /out_of_range, /incomplete: shares of answers that are not exactly as asked,
          that name a candidate again, one that is not there, not all;
        - agreement/tau, agreement/same_first: between the decodings;
        - D/shuffled/ndcg@10, /ndcg@10_deviation (standard deviation over the K shuffles of a window), /tau (to the
          ranking of the window as it is); D/reversed/ndcg@10, /tau: position bias.
    """
    # In the order of their ids, so that no figure depends on which rank had which window.
    windows = [window for _, window in sorted({result.id: result for result in reversed(list(results))}.items())]
    judged = [window for window in windows if _is_judged(window)]
    figures: dict[str, float] = {"windows": len(windows), "judged_windows": len(judged)}

    def mean(name: str, values: Iterable[float | None]) -> None:
        known = [float(value) for value in values if value is not None and not math.isnan(value)]
        if known:
            figures[name] = float(np.mean(known))

    def quality(name: str, order_of: Callable[[WindowResult], Sequence[int] | None]) -> None:
        mean(f"{name}/ndcg@{CUTOFF}", (_ndcg(window, order_of(window)) for window in judged))
        mean(f"{name}/mrr@{CUTOFF}", (_mrr(window, order_of(window)) for window in judged))

    quality("presented", lambda window: range(len(window.teacher)))
    quality("teacher", lambda window: window.teacher)
    quality("oracle", lambda window: np.argsort([-grade for grade in window.grades or ()], kind="stable").tolist())
    mean(f"chance/ndcg@{CUTOFF}", (chance_ndcg(window.grades or ()) for window in judged))
    for name in DECODINGS:
        quality(name, lambda window, name=name: window.permutations.get(name))  # type: ignore[misc]
        mean(f"{name}/tau", (_tau(window.permutations.get(name), window.teacher) for window in windows))
        for way, again in (
            ("shuffled", [(window, other) for window in windows for other in window.shuffled.get(name, ())]),
            ("reversed", [(window, window.reversed[name]) for window in windows if name in window.reversed]),
        ):
            mean(f"{name}/{way}/tau", (_tau(window.permutations[name], other.permutation) for window, other in again))
            judged_again = [(window, other) for window, other in again if _is_judged(window)]
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
    """nDCG@10 of one window as presented and by each decoding; empty where nothing in it is known to be relevant."""
    if not _is_judged(result):
        return {}
    orders = {"presented": tuple(range(len(result.teacher))), **result.permutations}
    return {name: value for name, order in orders.items() if (value := _ndcg(result, order)) is not None}


def position_matrix(results: Iterable[WindowResult], decoding: Decoding) -> NDArray[np.int64]:
    """Where candidates end up by where they were shown, counted over shuffled windows: the position-bias heat map.

    Returns:
        (N, N) int64, N the longest window: [i, j] = candidates shown at place i and ranked at place j. A model that
        does not look at places fills it evenly, one that repeats the order it sees fills the diagonal.
    """
    shown = [presentation for result in results for presentation in result.shuffled.get(decoding, ())]
    size = max((len(presentation.order) for presentation in shown), default=0)
    counts = np.zeros((size, size), np.int64)
    for presentation in shown:
        ranks = ranks_from_permutation(presentation.permutation)
        np.add.at(counts, (range(len(ranks)), [ranks[candidate] for candidate in presentation.order]), 1)
    return counts


def chance_ndcg(grades: Sequence[float], k: int = CUTOFF) -> float:
    """nDCG@k that a random order of the candidates has on average; 0 where nothing is relevant."""
    gains = np.maximum(np.asarray(grades, dtype=np.float64), 0.0)
    discounts = 1.0 / np.log2(np.arange(2, min(k, len(gains)) + 2))
    best = float((np.sort(gains)[::-1][:k] * discounts).sum())
    return float(gains.mean() * discounts.sum()) / best if best > 0 else 0.0


def _orders(record: Record, num_shuffles: int, seed: int) -> list[tuple[int, ...]]:
    """Other orders to show a record in: reversed, then K random ones. None where there are no shuffles."""
    if num_shuffles == 0:
        return []
    places = range(record.response.count("["))
    generator = np.random.default_rng((seed, record_key(record.id)))
    random = [tuple(generator.permutation(len(places)).tolist()) for _ in range(num_shuffles)]
    return [tuple(reversed(places)), *random]


def _is_judged(window: WindowResult) -> bool:
    return window.grades is not None and max(window.grades) >= 1


def _ndcg(window: WindowResult, permutation: Sequence[int] | None) -> float | None:
    if permutation is None or window.grades is None:
        return None
    return ndcg([window.grades[i] for i in permutation], k=CUTOFF)


def _mrr(window: WindowResult, permutation: Sequence[int] | None) -> float | None:
    if permutation is None or window.grades is None:
        return None
    return reciprocal_rank([window.grades[i] for i in permutation], k=CUTOFF)


def _tau(permutation: Sequence[int] | None, other: Sequence[int]) -> float | None:
    if permutation is None:
        return None
    return kendall_tau(ranks_from_permutation(permutation), ranks_from_permutation(other))


def _deviation(window: WindowResult, decoding: str) -> float | None:
    values = [_ndcg(window, presentation.permutation) for presentation in window.shuffled.get(decoding, ())]
    return float(np.std([value for value in values if value is not None])) if values else None
