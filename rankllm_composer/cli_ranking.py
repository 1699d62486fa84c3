"""`rankllm-composer rerank`, `compare` and `requests`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from rankllm_composer import screen
from rankllm_composer.cli_options import with_options
from rankllm_composer.options import RerankOptions
from rankllm_composer.recipe.command_line import Json

Queries = Annotated[
    Path | None, typer.Option(help="Queries: file, BEIR folder or irds:ID; default: those that --run holds.")
]
Docs = Annotated[
    Path | None, typer.Option(help="Documents: file, BEIR folder or irds:ID; default: those that --run holds.")
]
Twice = Annotated[str, typer.Option(help="Document that a query has twice in --run: stop, or keep the first by score.")]
Measures = Annotated[
    list[str] | None, typer.Option(help="Name from ir-measures or trec_eval; repeatable; default: nDCG@10 and RR@10.")
]


READING = "reading and measuring the runs"


@with_options(window_size="window")
def rerank(
    model: Annotated[str, typer.Option(help="Exported folder, with reranker.json, or any HF folder or id.")],
    output: Annotated[Path, typer.Option(help="TREC run to write; with --beir, a folder of runs.")],
    options: RerankOptions,
    run: Annotated[
        Path | None,
        typer.Option(
            help="First-stage run: TREC, requests or results of rank_llm, or irds:ID that has one; with --beir, a "
            "folder of runs, or a path with {} for the name of the set."
        ),
    ] = None,
    queries: Queries = None,
    docs: Docs = None,
    qrels: Annotated[
        Path | None, typer.Option(help="Judgments: file, BEIR folder or irds:ID; compares with the first stage.")
    ] = None,
    beir: Annotated[
        list[str] | None,
        typer.Option(
            help="Test collections in one table, with commas between or repeated: sets of BEIR, BEIR folders or "
            "irds:ID; with --run, as they have none."
        ),
    ] = None,
    duplicates: Twice = "stop",
    held_out: Annotated[
        str | None, typer.Option(help="Set of `shards build --hold-out`: rerank only the queries it kept apart.")
    ] = None,
    measure: Measures = None,
    name: Annotated[
        str | None, typer.Option(help="With --qrels: name of the results, such as dl20-bm25; default: that of --run.")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="With --qrels: add the results to the model card.")] = False,
    as_json: Json = False,
) -> None:
    """Rerank a first-stage run with an exported model, or with any other that the options describe; rerun a stopped job
    to resume it."""
    with screen.loading():
        from rankllm_composer.export.model_card import add_figures
        from rankllm_composer.ranking.comparison import DEFAULT_MEASURES
        from rankllm_composer.ranking.rerank import RerankFiles, rerank_files
        from rankllm_composer.ranking.several import collections_of, rerank_several

    if not beir and qrels is None and (card or name is not None or measure):
        raise ValueError("rerank: --card, --name and --measure need --qrels, as nothing is measured without judgments")
    if not beir and run is None:
        raise ValueError("rerank: --run is missing; expected a first-stage run, or --beir. Add one of the two.")
    if beir and any(given is not None for given in (queries, docs, qrels, name, held_out)):
        raise ValueError(
            "rerank: --beir names queries, documents and judgments. Leave out their options, --name and --held-out."
        )
    page = Path(model, "README.md")
    if card and not os.access(page, os.W_OK):
        raise ValueError(f"{page}: no model card that can be written. Rerank an exported folder, or leave out --card.")
    kept, measures = _checked_duplicates(duplicates), measure or DEFAULT_MEASURES
    say: Any = screen.report if as_json else screen.say
    if beir:
        sets = collections_of([name for name in map(str.strip, ",".join(beir).split(",")) if name], run)
        with screen.doing(READING, is_short=True):
            several = rerank_several(model, sets, output, options, measures=measures, duplicates=kept, say=say)
        reports, fields = several.reports, several.fields()
        for line in several.lines():
            say(line)
    else:
        inputs: dict[str, Any] = {"queries": queries, "documents": docs, "judgments": qrels, "duplicates": kept}
        if held_out is not None:
            from rankllm_composer.shards.contents import held_out_share

            inputs["hold_out"] = held_out_share(held_out)
        files = RerankFiles(first_stage=str(run), output=output, **inputs)
        with screen.doing(READING, is_short=True):
            report = rerank_files(model, files, options, measures=measures, name=name)
        reports, fields = (report,), report.fields()
        say(report.text)
    for report in reports:
        if card and report.result is not None:
            add_figures(page, report.result.figures(), report.result.first_stage())
            say(f"{page}: results of {report.result.name} added")
    if as_json:
        screen.say_json({"model": model} | fields)


def compare(
    systems: Annotated[
        list[str],
        typer.Argument(metavar="A B [C]...", help="Runs, or figures.json of `rerank --qrels`; A is the baseline."),
    ],
    qrels: Annotated[
        Path | None, typer.Option(help="Judgments of the runs: file, BEIR folder or irds:ID; not for figures.json.")
    ] = None,
    measure: Measures = None,
    complete: Annotated[
        bool, typer.Option("--complete", "-c", help="As trec_eval -c: a judged query that a run lacks counts as 0.")
    ] = False,
    per_query: Annotated[Path | None, typer.Option(help="Table to write with the values of every query.")] = None,
    as_json: Json = False,
) -> None:
    """Compare runs or rerankings query by query: means, wins, ties and losses, and the p of a paired test."""
    with screen.loading():
        from rankllm_composer.ranking.compare_files import compare_files, write_queries

    with screen.doing(READING, is_short=True):
        found = compare_files(systems, qrels, measures=measure, complete=complete)
    if per_query is not None:
        write_queries(per_query, found)
    if as_json:
        screen.say_json({"comparisons": [one.fields() for one in found]})
        return
    for number, one in enumerate(found):
        for line in [*([""] if number else []), *one.lines()]:
            screen.say(line)


def requests(
    run: Annotated[
        Path, typer.Option(help="First-stage run: TREC, requests or results of rank_llm, or irds:ID that has one.")
    ],
    output: Annotated[Path, typer.Option(help="File to write, in .jsonl.")],
    queries: Queries = None,
    docs: Docs = None,
    top_k: Annotated[int, typer.Option(min=1, help="Candidates of each query.")] = 100,
    duplicates: Twice = "stop",
) -> None:
    """Write a first-stage run with its texts as the file that `rank-llm rerank --requests-file` reranks."""
    from rankllm_composer.sources.requests import write_requests

    kept = _checked_duplicates(duplicates)
    with screen.doing(f"reading the files and writing {output}", is_short=True):
        lines = write_requests(run, output, queries=queries, docs=docs, top_k=top_k, duplicates=kept)
    for line in lines:
        screen.say(line)


def _checked_duplicates(given: str) -> Any:
    if given not in ("stop", "first"):
        raise ValueError(f"--duplicates is {given!r}; expected stop or first. Correct it.")
    return given
