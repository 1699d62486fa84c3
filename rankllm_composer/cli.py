"""`rankllm-composer …`: thin commands over the folders. Each imports what it needs when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rankllm_composer import __version__, screen
from rankllm_composer.cli_ranking import compare, requests, rerank
from rankllm_composer.cli_shards import shards_app, sources_app
from rankllm_composer.environment import as_written, expand_path
from rankllm_composer.errors import RecipeError, counted, shell_line
from rankllm_composer.recipe.bundled import find_recipe, recipe_path
from rankllm_composer.recipe.command_line import DOES_NOT_FIT, Commands, Json
from rankllm_composer.recipe.commands import Overrides, RecipeFile, recipes_app
from rankllm_composer.redaction import REDACTED, redact

app = Commands(
    name="rankllm-composer",
    help="Train listwise LLM rerankers with MosaicML Composer, from training data to exported model.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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
        if "--json" in given:
            screen.say_json({"error": redact(text)})
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
        with screen.doing(f"checking {model}", is_short=True):
            found: Any = inspect_folder(model, trust_remote_code=trust_remote_code)
    else:
        loaded = load_recipe(str(recipe), overrides or [])
        with screen.doing(f"reading record {record} and the tokenizer", is_short=True):
            found = inspect_recipe(loaded, record, loss=loss)
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
    as_json: Json = False,
) -> None:
    """Estimate steps, memory per rank, FLOPs and hours. Exit code 3 if the run does not fit the GPU."""
    with screen.loading():
        from rankllm_composer.preflight.plan import plan_recipe
        from rankllm_composer.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    found = plan_recipe(loaded, num_ranks, gpu=gpu, mfu=mfu, num_lists=lists, report=screen.report)
    if as_json:
        screen.say_json(found.fields())
    for line in [] if as_json else found.lines():
        screen.say(line)
    if not found.fits:
        raise typer.Exit(DOES_NOT_FIT)


@recipes_app.command("check")
def recipes_check(
    file: RecipeFile,
    overrides: Overrides = None,
    num_ranks: Annotated[
        int | None, typer.Option("--num-ranks", "-n", min=1, help="Also check that the batch divides over these ranks.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the merged recipe with the origin of each value, and everything that is wrong with it, or that a run would
    refuse on this machine (exit code 2)."""
    from rankllm_composer.preflight.refusals import find_refusals
    from rankllm_composer.recipe.checks import check_world, is_secret, missing_files, warmup_warning
    from rankllm_composer.recipe.keys import plain_tree, show
    from rankllm_composer.recipe.load import merge_recipe

    path = recipe_path(file)
    merged = merge_recipe(path, overrides or [])
    width = max(len(row.key) for row in merged.keys)
    values = {row.key: REDACTED if is_secret(row.key, row.value) else as_written(row.value) for row in merged.keys}
    for row in [] if as_json else merged.keys:
        screen.say(f"{row.origin:<8}  {row.key:<{width}}  {show(values[row.key])}")
    refusals = missing_files if merged.problems else find_refusals  # of a recipe with stand-ins, no others are known
    with screen.doing("looking at files and folders", is_short=True):
        problems = [*merged.problems, *refusals(merged.recipe)]
    if num_ranks is not None and not merged.problems:
        try:
            check_world(merged.recipe, num_ranks)
        except RecipeError as error:
            problems += error.problems
    warnings = [*filter(None, [*merged.warnings, warmup_warning(merged.recipe)])]
    for sentence in warnings:
        screen.report(f"warning: {sentence}")
    if as_json:
        found = [{**problem._asdict(), "message": str(problem)} for problem in problems]
        origins = {row.key: row.origin for row in merged.keys}
        screen.say_json(
            {"recipe": str(path), "ok": not problems, "values": plain_tree(values), "origins": origins}
            | {"problems": found, "warnings": warnings}
        )
    if problems and as_json:
        screen.report(f"error: {RecipeError(str(path), problems)}")
        raise typer.Exit(2)
    if problems:
        raise RecipeError(str(path), problems)
    if not as_json:
        screen.say(f"{path}: no problems")


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


app.command("rerank")(rerank)
app.command("compare")(compare)
app.command("requests")(requests)


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
