"""What a run gained over its first stage: the figures at the top of the report."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rankllm_composer.errors import counted
from rankllm_composer.options import DECODINGS
from rankllm_composer.ranking.comparison import Comparison, RerankResult, compare
from rankllm_composer.report.run_record import RunRecord
from rankllm_composer.report.wording import decoding_name

MAX_SETS = 6


class Headline(NamedTuple):
    """The comparison of a model with its first stage by one measure."""

    measure: str
    where: str  # set of queries, and how many
    model: str
    comparison: Comparison


def headlines(run: RunRecord) -> list[Headline]:
    """The first measure of each set that was reranked with the best of the run's models; else the last evaluation."""
    best: dict[str, RerankResult] = {}
    for measured in run.reranked:
        before = best.get(measured.name)
        if run.is_trained(measured) and (before is None or _rank(run, measured) > _rank(run, before)):
            best[measured.name] = measured
    found = [_of_result(run, measured) for measured in best.values()]
    return found[:MAX_SETS] or list(_of_windows(run))[:1]


def _rank(run: RunRecord, measured: RerankResult) -> tuple[bool, int, bool]:
    """The best export first, then the newest, then the one decoded by first token."""
    name = Path(measured.model).name
    number = re.search(r"(\d{1,18})$", name)
    return name in ("best", run.best_export), int(number[1]) if number else -1, measured.decoding == "first_token"


def _of_result(run: RunRecord, measured: RerankResult) -> Headline:
    row = measured.comparisons[0]
    where = f"{measured.name}, {counted(len(row.reranked), 'query')}"
    return Headline(row.measure, where, run.model_name(measured), row.comparison)


def _of_windows(run: RunRecord) -> Iterator[Headline]:
    if not run.details:
        return
    windows, batch = run.details[-1]["ndcg@10"], run.details[-1]["batch"]
    for decoding in DECODINGS:
        both = {name: one for name, one in windows.items() if decoding in one and "presented" in one}
        if both:
            first, second = ({name: one[key] for name, one in both.items()} for key in ("presented", decoding))
            where = f"{len(both):,} held-out windows"
            model = f"after batch {batch:,}, {decoding_name(decoding)}"
            yield Headline("nDCG@10", where, model, compare(first, second))
