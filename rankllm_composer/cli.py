"""`rankllm-composer …`: thin commands over the folders. Each imports what it needs when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rankllm_composer import __version__, screen
from rankllm_composer.cli_options import flag, with_options
from rankllm_composer.environment import expand_path
from rankllm_composer.errors import RecipeError, counted, shell_line
from rankllm_composer.escaping import in_one_line
from rankllm_composer.options import FOR_PASSAGES, FROM_RUN, BuildOptions, RerankOptions, SourceOptions
from rankllm_composer.recipe.bundled import find_recipe
from rankllm_composer.recipe.commands import Overrides, RecipeFile, recipes_app

app = typer.Typer(
    name="rankllm-composer",
    help="Train listwise LLM rerankers with MosaicML Composer, from training data to exported model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
sources_app = typer.Typer(help="Look at files before lists are built or reranked from them.", no_args_is_help=True)
shards_app = typer.Typer(help="Build, merge and check sets of training lists (MDS shards).", no_args_is_help=True)


app.add_typer(shards_app, name="shards")
app.add_typer(sources_app, name="sources")
app.add_typer(recipes_app, name="recipes")


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. Errors that a user can cause end in readable lines on stderr and exit code 2."""
    given = [_expand(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    try:
        with screen.plain_warnings():
            app(args=given, prog_name="rankllm-composer")
    except (ValueError, OSError) as error:
        if "--traceback" in given:
            raise
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        screen.report(f"error: {text}")
        raise SystemExit(2) from None


def _expand(argument: str) -> str:
    """Expand `~` and `$HOME` in a path or `--option=PATH`; a recipe expands those of its overrides."""
    option, equals, value = argument.partition("=")
    if not equals:
        return str(expand_path(argument))
    return f"{option}={expand_path(value)}" if option.startswith("-") else argument


def _show_version(wanted: bool) -> None:
    if wanted:
        screen.say(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Print the traceback of an error.")] = False,
) -> None:
    pass


Output = Annotated[str, typer.Option(help="Folder or URL (s3://, gs://, …) of the set.")]
Target = Annotated[str, typer.Argument(help="Folder or URL of the set.")]


@sources_app.command("look")
def sources_look(
    files: Annotated[list[str], typer.Argument(help="Files, BEIR folders or irds:ID, in any order.")],
) -> None:
    """Print what files are taken for, what joins with what and how many ids match, and one list made from them."""
    from rankllm_composer.sources.look import look

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
) -> None:
    """Check that every shard exists and matches the index. Exit code 2 if not."""
    with screen.loading():
        from rankllm_composer.shards.verify import verify_shards

    outcome = verify_shards(target, records=records, report=screen.report)
    counts = f"{outcome.num_records:,} records in {outcome.num_shards:,} shards"
    if outcome.num_duplicates:
        counts += f", {outcome.num_duplicates:,} duplicate ids ({in_one_line(outcome.duplicate_ids)})"
    if outcome.problems:
        raise ValueError(f"{outcome.target}: {counted(len(outcome.problems), 'problem')}, see above ({counts})")
    screen.say(f"{outcome.target}: no problems, {counts}")


@shards_app.command("info")
def shards_info(target: Target) -> None:
    """Print the contents and origin of a set, without reading its shards."""
    from rankllm_composer.shards.verify import shards_info

    for line in shards_info(target).lines():
        screen.say(line)


@app.command("inspect")
def inspect(
    recipe: Annotated[
        str | None, typer.Argument(help="YAML file, or a name from `recipes list`; none with --model.")
    ] = None,
    overrides: Overrides = None,
    record: Annotated[int, typer.Option(min=0, help="Index of the record in data.train, from 0.")] = 0,
    loss: Annotated[
        bool, typer.Option("--loss", help="Load the model on the CPU and compute the losses of the record.")
    ] = False,
    model: Annotated[Path | None, typer.Option(help="Instead of a recipe: exported folder to check.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="With --model: run code that comes with it.")
    ] = False,
) -> None:
    """Print a record as the model will see it, or check an exported folder and compare a request, token by token, with
    the client's. Exit code 2 if something is wrong."""
    with screen.loading():
        from rankllm_composer.export.serving_check import inspect_folder
        from rankllm_composer.preflight.inspection import inspect_recipe
        from rankllm_composer.recipe.load import load_recipe

    if (recipe is None) == (model is None):
        raise ValueError("inspect: pass exactly one of RECIPE and --model")
    if model is not None:
        found: Any = inspect_folder(model, trust_remote_code=trust_remote_code)
    else:
        found = inspect_recipe(load_recipe(str(recipe), overrides or []), record, loss=loss)
    for line in found.lines(sys.stdout.isatty()):
        screen.say(line, escaped=True)
    if found.problems:
        raise ValueError(f"{model or recipe}: {counted(len(found.problems), 'problem')}, see above")


@app.command("plan")
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    num_ranks: Annotated[int, typer.Option("--num-ranks", "-n", min=1, help="GPUs to train on.")] = 8,
    gpu: Annotated[str, typer.Option(help="GPU: h100-80gb, a100-80gb, rtx4090-24gb, …")] = "h100-80gb",
    mfu: Annotated[float | None, typer.Option(help="Assumed MFU (default 0.4; not measured).")] = None,
    lists: Annotated[
        int | None, typer.Option(min=1, help="Training lists, if neither shards nor source are on this machine.")
    ] = None,
) -> None:
    """Estimate steps, memory per rank, FLOPs and hours."""
    with screen.loading():
        from rankllm_composer.preflight.plan import plan_recipe
        from rankllm_composer.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    found = plan_recipe(loaded, num_ranks, gpu=gpu, mfu=mfu, num_lists=lists, report=screen.report)
    for line in found.lines():
        screen.say(line)


@app.command("train")
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    num_ranks: Annotated[
        int | None,
        typer.Option("--num-ranks", "-n", min=1, help="Processes on this machine; default: one per GPU, else one."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Do everything up to the first update: train nothing, write no checkpoint."),
    ] = False,
) -> None:
    """Train a recipe and export the model; rerun the same command to resume."""
    from rankllm_composer.launch import main as launch
    from rankllm_composer.launch import train_arguments
    from rankllm_composer.recipe.bundled import recipe_path
    from rankllm_composer.recipe.checks import check_world
    from rankllm_composer.recipe.load import merge_recipe

    path, given = recipe_path(recipe), overrides or []
    merged = merge_recipe(path, given)  # an error in one line, before any process starts; each rank warns by itself
    if merged.problems:
        raise RecipeError(str(path), merged.problems)
    arguments = train_arguments(path, ["--dry-run", *given] if dry_run else given, num_ranks)
    if num_ranks is not None and "WORLD_SIZE" not in os.environ:
        check_world(merged.recipe, num_ranks)
    raise typer.Exit(launch(arguments))


def _checked_duplicates(given: str) -> Any:
    if given not in ("stop", "first"):
        raise ValueError(f"--duplicates is {given!r}; expected stop or first. Correct it.")
    return given


@app.command("rerank")
@with_options(window_size="window")
def rerank(
    model: Annotated[str, typer.Option(help="Exported folder, with reranker.json, or any HF folder or id.")],
    run: Annotated[
        Path, typer.Option(help="First-stage run: TREC, requests or results of rank_llm, or irds:ID that has one.")
    ],
    output: Annotated[Path, typer.Option(help="TREC run to write.")],
    options: RerankOptions,
    queries: Annotated[
        Path | None, typer.Option(help="Queries: file, BEIR folder or irds:ID; default: those that --run holds.")
    ] = None,
    docs: Annotated[
        Path | None, typer.Option(help="Documents: file, BEIR folder or irds:ID; default: those that --run holds.")
    ] = None,
    qrels: Annotated[
        Path | None, typer.Option(help="Judgments: file, BEIR folder or irds:ID; compares with the first stage.")
    ] = None,
    duplicates: Annotated[
        str, typer.Option(help="Document that a query has twice in --run: stop, or keep the first by score.")
    ] = "stop",
    held_out: Annotated[
        str | None, typer.Option(help="Set of `shards build --hold-out`: rerank only the queries it kept apart.")
    ] = None,
    measure: Annotated[list[str] | None, typer.Option(help="Name from ir-measures; repeatable.")] = None,
    name: Annotated[
        str | None, typer.Option(help="With --qrels: name of the results, such as dl20-bm25; default: that of --run.")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="With --qrels: add the results to the model card.")] = False,
) -> None:
    """Rerank a first-stage run with an exported model, or with any other that the options describe; rerun a stopped job
    to resume it."""
    with screen.loading():
        from rankllm_composer.export.model_card import add_figures
        from rankllm_composer.ranking.comparison import DEFAULT_MEASURES
        from rankllm_composer.ranking.rerank import RerankFiles, rerank_files

    if qrels is None and (card or name is not None or measure):
        raise ValueError("rerank: --card, --name and --measure need --qrels, as nothing is measured without judgments")
    page = Path(model, "README.md")
    if card and not os.access(page, os.W_OK):
        raise ValueError(f"{page}: no model card that can be written. Rerank an exported folder, or leave out --card.")
    inputs: dict[str, Any] = {"queries": queries, "documents": docs, "judgments": qrels}
    inputs["duplicates"] = _checked_duplicates(duplicates)
    if held_out is not None:
        from rankllm_composer.shards.contents import held_out_share

        inputs["hold_out"] = held_out_share(held_out)
    files = RerankFiles(first_stage=run, output=output, **inputs)
    report = rerank_files(model, files, options, measures=measure or DEFAULT_MEASURES, name=name)
    screen.say(report.text)
    if card and report.result is not None:
        add_figures(page, report.result.figures(), report.result.first_stage())
        screen.say(f"{page}: results of {report.result.name} added")


@app.command("requests")
def requests(
    run: Annotated[
        Path, typer.Option(help="First-stage run: TREC, requests or results of rank_llm, or irds:ID that has one.")
    ],
    output: Annotated[Path, typer.Option(help="File to write, in .jsonl.")],
    queries: Annotated[
        Path | None, typer.Option(help="Queries: file, BEIR folder or irds:ID; default: those that --run holds.")
    ] = None,
    docs: Annotated[
        Path | None, typer.Option(help="Documents: file, BEIR folder or irds:ID; default: those that --run holds.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Candidates of each query.")] = 100,
    duplicates: Annotated[
        str, typer.Option(help="Document that a query has twice in --run: stop, or keep the first by score.")
    ] = "stop",
) -> None:
    """Write a first-stage run with its texts as the file that `rank-llm rerank --requests-file` reranks."""
    from rankllm_composer.sources.requests import write_requests

    kept = _checked_duplicates(duplicates)
    for line in write_requests(run, output, queries=queries, docs=docs, top_k=top_k, duplicates=kept):
        screen.say(line)


@app.command("export")
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, with checkpoints/; or an export to push.")],
    output: Annotated[Path | None, typer.Option(help="Folder to write; an earlier export there is replaced.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Such as ep1-ba200; default: the newest complete.")] = None,
    average: Annotated[int, typer.Option(min=1, help="Checkpoints up to that one whose weights are averaged.")] = 1,
    merge_lora: Annotated[
        bool | None,
        typer.Option("--merge-lora/--adapter-only", help="Merge a LoRA adapter or not; default: the recipe's."),
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Hugging Face repository for --output, else for the best export.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: a public repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --push: list what would be pushed.")] = False,
) -> None:
    """Export a checkpoint as a Hugging Face folder, and push it or an export of the run to the hub."""
    if output is None and (push is None or checkpoint is not None or merge_lora is not None or average > 1):
        raise ValueError("export: pass --output FOLDER, which a checkpoint is exported to, or --push REPO, or both")
    if push is None and (public or dry_run):
        raise ValueError("export: --public and --dry-run need --push")
    with screen.loading():
        from rankllm_composer.export.hub import push_export
        from rankllm_composer.training.export_run import export_run, finished_export

    if output is not None:
        screen.say(f"{output}: exported {export_run(run, output, checkpoint, merge_lora, average=average)} of {run}")
        screen.say(f"check it: {shell_line('rankllm-composer', 'inspect', '--model', output)}")
    if push is not None:
        done = push_export(output or finished_export(run), push, public=public, dry_run=dry_run)
        screen.say("\n".join(done.lines(dry_run)))


@app.command("report")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of training runs to compare.")],
    output: Annotated[Path | None, typer.Option(help="HTML file; default: report.html in the first run.")] = None,
    png: Annotated[Path | None, typer.Option(help="Folder for the same pictures as PNG files.")] = None,
    reranked: Annotated[list[Path] | None, typer.Option(help="OUTPUT.figures.json left elsewhere; repeatable.")] = None,
) -> None:
    """Show what runs gained and how they trained, with what `rerank` left in their folders, in one HTML page."""
    with screen.loading():
        from rankllm_composer.ranking.comparison import read_rerank_result
        from rankllm_composer.report.page import write_report
        from rankllm_composer.report.run_record import read_run, with_reranked

    records = []
    for folder in runs:
        with screen.doing(f"reading {folder}"):
            records.append(read_run(folder))
        if records[-1].num_damaged:
            screen.report(f"warning: {folder}: {records[-1].num_damaged:,} damaged lines and values are left out")
    records = with_reranked(records, runs, map(read_rerank_result, reranked or ()))
    target = output or runs[0] / "report.html"
    with screen.doing(f"drawing {target}"):
        drawn = write_report(records, target, png)
    screen.say(f"{target}: {', '.join(drawn) or 'no pictures, as nothing was measured'}")


@app.command("demo")
def demo(
    folder: Annotated[Path, typer.Option(help="Folder for the collection, the shards, the run and the model.")] = Path(
        "runs/demo"
    ),
    train_queries: Annotated[
        int, typer.Option(min=1, help="Lists to train on; fewer than a few thousand teach it little.")
    ] = 20000,
    overrides: Overrides = None,
) -> None:
    """Create a small collection, train a small reranker on it from scratch, and measure it."""
    from rankllm_composer.demo import run_demo

    recipe = find_recipe("demo")
    run_demo(folder, recipe, overrides or [], num_train_queries=train_queries, report=screen.say)
