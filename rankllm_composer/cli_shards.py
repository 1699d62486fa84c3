"""`rankllm-composer shards …` and `rankllm-composer sources …`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from rankllm_composer import screen
from rankllm_composer.cli_options import flag, with_options
from rankllm_composer.errors import counted
from rankllm_composer.escaping import in_one_line
from rankllm_composer.options import FOR_PASSAGES, FROM_RUN, BuildOptions, SourceOptions
from rankllm_composer.recipe.command_line import Commands, Json

sources_app = Commands(help="Look at files before lists are built or reranked from them.")
shards_app = Commands(help="Build, merge and check sets of training lists (MDS shards).")

Output = Annotated[str, typer.Option(help="Folder or URL (s3://, gs://, …) of the set.")]
Target = Annotated[str, typer.Argument(help="Folder or URL of the set.")]


@sources_app.command("look")
def sources_look(
    files: Annotated[list[str], typer.Argument(help="Files, BEIR folders or irds:ID, in any order.")],
) -> None:
    """Print what files are taken for, what joins with what and how many ids match, and one list made from them."""
    from rankllm_composer.sources.look import look

    with screen.doing("reading the files", is_short=True):
        for line in look(files):
            screen.say(line)


@shards_app.command("build")
@with_options(num_processes="processes", hashes="hash")
def shards_build(context: typer.Context, output: Output, source: SourceOptions, options: BuildOptions) -> None:
    """Build shards from training records, or from a first-stage run with judgments or a teacher's run."""
    with screen.loading():
        from rankllm_composer.shards.build import build_shards, next_steps
        from rankllm_composer.sources.records import open_source

    given = _given(context, FROM_RUN if source.run is None else ("split", "config", "answers"))
    if given and source.run is None and source.input is not None and open_source(source).makes_lists:
        given = [name for name in given if name not in FOR_PASSAGES]
    for name in given:
        screen.report(f"warning: {flag(name)} has no effect with {'--run' if source.run else '--input'}")
    build_shards(output, source, options, screen.report)
    screen.say(next_steps(output, options))


def _given(context: typer.Context, names: Sequence[str]) -> list[str]:
    """The options among `names` that were set on the command line."""
    sources = {name: getattr(context.get_parameter_source(name), "name", None) for name in sorted(names)}
    return [name for name, source in sources.items() if source == "COMMANDLINE"]


@shards_app.command("merge")
def shards_merge(target: Target) -> None:
    """Merge the parts that `build --part I/N` wrote to one place into one set."""
    with screen.loading():
        from rankllm_composer.shards.publish import merge_shards

    merge_shards(target, report=screen.report)


@shards_app.command("verify")
def shards_verify(
    target: Target,
    records: Annotated[bool, typer.Option(help="Also decode and check every record, and count duplicate ids.")] = False,
    as_json: Json = False,
) -> None:
    """Check that every shard exists and matches the index. Exit code 2 if not."""
    with screen.loading():
        from rankllm_composer.shards.verify import verify_shards

    outcome = verify_shards(target, records=records, report=screen.report)
    counts = f"{counted(outcome.num_records, 'record')} in {counted(outcome.num_shards, 'shard')}"
    if outcome.num_duplicates:
        counts += f", {counted(outcome.num_duplicates, 'duplicate id')} ({in_one_line(outcome.duplicate_ids)})"
    if as_json:
        screen.say_json({"ok": not outcome.problems} | asdict(outcome))
        raise typer.Exit(2 if outcome.problems else 0)
    if outcome.problems:
        raise ValueError(f"{outcome.target}: {counted(len(outcome.problems), 'problem')}, see above ({counts})")
    screen.say(f"{outcome.target}: no problems, {counts}")


@shards_app.command("info")
def shards_info(target: Target) -> None:
    """Print the contents and origin of a set, without reading its shards."""
    from rankllm_composer.shards.verify import shards_info

    for line in shards_info(target).lines():
        screen.say(line)
