"""`rankllm-composer …`: thin commands over the other rooms. Each imports what it needs when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rankllm_composer import __version__
from rankllm_composer.prompts.permutations import IdentifierStyle
from rankllm_composer.redaction import BLOTTED, redact

recipes_app = typer.Typer(help="List, copy and check recipes.", no_args_is_help=True)

RecipeName = Annotated[str, typer.Argument(help="As `recipes list` prints it.")]

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name of `recipes list`.")]

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Laid over the file.")]


def recipe_folder() -> Path:
    """Where the recipes are: in the installed package, or in `yamls/` beside it in a source tree."""
    package = Path(str(resources.files("rankllm_composer")))
    installed = package / "yamls"
    return installed if installed.is_dir() else package.parent / "yamls"


def find_recipe(name: str) -> Path:
    """The recipe file of a name such as "rank_zephyr".

    Raises:
        ValueError: there is none of that name.
    """
    path = recipe_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if Path(name).name == name and path.is_file():
        return path
    known = ", ".join(sorted(found.stem for found in recipe_folder().glob("*.yaml")))
    raise ValueError(f"recipe: found {name}; allowed: {known}; choose one, `rankllm-composer recipes list` says more")


def recipe_path(file: str) -> Path:
    """A recipe by its file, or by its name."""
    return Path(file) if "/" in file or file.endswith((".yaml", ".yml")) else find_recipe(file)


@recipes_app.command("list")
def recipes_list() -> None:
    """List the recipes that come with the package."""
    paths = sorted(recipe_folder().glob("*.yaml"))
    width = max((len(path.stem) for path in paths), default=0)
    for path in paths:
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        typer.echo(f"{path.stem:<{width}}  {first.removeprefix('#').strip()}")


@recipes_app.command("show")
def recipes_show(name: RecipeName) -> None:
    """Print a recipe."""
    typer.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("copy")
def recipes_copy(
    name: RecipeName,
    destination: Annotated[Path, typer.Argument(help="File or folder to copy to.", show_default="here")] = Path(),
    force: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
) -> None:
    """Copy a recipe, to change it."""
    source = find_recipe(name)
    target = destination / source.name if destination.is_dir() else destination
    if target.exists() and not force:
        raise ValueError(f"destination: found {target}, which exists; choose another name, or replace it with --force")
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    typer.echo(str(target))


@recipes_app.command("check")
def recipes_check(
    file: Annotated[str, typer.Argument(help="A YAML file, or a name of `recipes list`.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Laid over the file.")] = None,
    num_ranks: Annotated[
        int | None, typer.Option("--num-ranks", "-n", min=1, help="Also check that the batch divides over these ranks.")
    ] = None,
) -> None:
    """Print the merged recipe with the origin of each value, then all that is wrong with it (and exit code 2)."""
    from rankllm_composer.errors import RecipeError
    from rankllm_composer.recipe.checks import check_world, is_secret, missing_files
    from rankllm_composer.recipe.keys import show
    from rankllm_composer.recipe.load import merge_recipe

    path = recipe_path(file)
    merged = merge_recipe(path, overrides or [])
    width = max(len(row.key) for row in merged.keys)
    for row in merged.keys:
        value = BLOTTED if is_secret(row.key, row.value) else show(row.value)
        typer.echo(f"{row.origin:<8}  {row.key:<{width}}  {value}")
    problems = [*merged.problems, *missing_files(merged.recipe)]
    if num_ranks is not None and not merged.problems:
        try:
            check_world(merged.recipe, num_ranks)
        except RecipeError as error:
            problems += error.problems
    for sentence in merged.warnings:
        typer.echo(f"warning: {sentence}", err=True)
    if problems:
        raise RecipeError(str(path), problems)
    typer.echo(f"{path}: no problems")


@recipes_app.command("keys")
def recipes_keys(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the page docs/recipe.md.")] = False,
) -> None:
    """Print every key a recipe can hold, with default, unit, meaning and what is allowed."""
    from rankllm_composer.recipe.keys import keys_as_markdown, keys_as_text

    typer.echo(keys_as_markdown() if markdown else keys_as_text())


app = typer.Typer(
    name="rankllm-composer",
    help="Train listwise LLM rerankers with MosaicML Composer, and look after what that needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


shards_app = typer.Typer(help="Build, join and check sets of training lists (MDS shards).", no_args_is_help=True)


app.add_typer(shards_app, name="shards")


app.add_typer(recipes_app, name="recipes")


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. What a user can cause ends in a readable line on stderr and exit code 2.

    Args:
        arguments: of the command line; None = those of the process.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        app(args=given, prog_name="rankllm-composer")
    except (ValueError, OSError) as error:
        if "--traceback" in given:
            raise
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        typer.echo(f"error: {redact(text)}", err=True)
        raise SystemExit(2) from None


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
) -> None:
    pass


def _progress(text: str) -> None:
    typer.echo(text, err=True)


Output = Annotated[str, typer.Option(help="Folder or URL (s3://, gs://, …) of the set.")]


Target = Annotated[str, typer.Argument(help="Folder or URL of the set.")]


@shards_app.command("build")
def shards_build(
    context: typer.Context,
    output: Output,
    input: Annotated[str | None, typer.Option(help="Records: .json, .jsonl or a HF dataset id.")] = None,
    split: Annotated[str, typer.Option(help="Split of a HF dataset.")] = "train",
    run: Annotated[str | None, typer.Option(help="Instead of --input: first-stage run in TREC format.")] = None,
    judgments: Annotated[str | None, typer.Option(help="With --run: TREC judgments that order its lists.")] = None,
    teacher_run: Annotated[str | None, typer.Option(help="With --run: TREC run of a teacher that orders them.")] = None,
    queries: Annotated[str | None, typer.Option(help="With --run: queries, JSONL.")] = None,
    docs: Annotated[str | None, typer.Option(help="With --run: documents, JSONL.")] = None,
    window: Annotated[int, typer.Option(help="With --run: candidates a list.")] = 20,
    stride: Annotated[int, typer.Option(help="With --run: candidates from one list to the next.")] = 10,
    lists_per_query: Annotated[int, typer.Option(help="With --run: lists a query; 0 = one for each window.")] = 1,
    depth: Annotated[int, typer.Option(help="With --run: candidates of the run that are used, from the top.")] = 100,
    max_passage_words: Annotated[
        int | None, typer.Option(help="With --run: words a passage; default: 300, 300 * 20 / n in lists of n < 20.")
    ] = None,
    identifiers: Annotated[IdentifierStyle, typer.Option(help="With --run: identifiers of candidates.")] = "letters",
    seed: Annotated[int, typer.Option(help="With --run: of the choice of lists.")] = 42,
    require_relevant: Annotated[
        bool | None,
        typer.Option(
            help="With --run: leave out lists without a relevant candidate; default: where judgments give the order."
        ),
    ] = None,
    on_error: Annotated[
        Literal["stop", "quarantine"], typer.Option(help="At a bad record: stop, or write it aside and count it.")
    ] = "stop",
    part: Annotated[str | None, typer.Option(metavar="I/N", help="Build part I of N only; `merge` joins them.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a CPU.")] = None,
    shard_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a shard before compression.")] = 16777216,
    compression: Annotated[str, typer.Option(help="zstd, zstd:LEVEL, gz, br, bz2, snappy or none.")] = "zstd",
    hash: Annotated[list[str] | None, typer.Option(help="Hash of each shard; repeatable.  [default: xxh64]")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace another set at the same place.")] = False,
    staging: Annotated[str | None, typer.Option(help="Local folder that an upload is prepared in.")] = None,
) -> None:
    """Turn training records, or a first-stage run with judgments or a teacher's run, into shards."""
    from rankllm_composer.options import BuildOptions, SourceOptions
    from rankllm_composer.recipe.advice import FROM_RUN
    from rankllm_composer.shards.build import build_shards

    chosen = _chosen(context)
    if input is not None:
        _warn_without_effect(chosen & set(FROM_RUN), "--input")
    elif run is not None:
        _warn_without_effect(chosen & {"split"}, "--run")
    source = SourceOptions(
        input=input,
        split=split,
        run=run,
        judgments=judgments,
        teacher_run=teacher_run,
        queries=queries,
        docs=docs,
        window=window,
        stride=stride,
        lists_per_query=lists_per_query,
        depth=depth,
        max_passage_words=max_passage_words,
        identifiers=identifiers,
        seed=seed,
        require_relevant=require_relevant,
        on_error=on_error,
    )
    options = BuildOptions(
        part=part,
        num_processes=processes,
        shard_bytes=shard_bytes,
        compression=None if compression == "none" else compression,
        hashes=tuple(hash or ("xxh64",)),
        overwrite=overwrite,
        staging=staging,
    )
    build_shards(output, source, options, _progress)


def _chosen(context: typer.Context) -> set[str]:
    """Names of the parameters that were given on the command line."""
    return {
        name for name in context.params if getattr(context.get_parameter_source(name), "name", None) == "COMMANDLINE"
    }


def _warn_without_effect(names: set[str], reason: str) -> None:
    for name in sorted(names):
        typer.echo(f"warning: --{name.replace('_', '-')} has no effect with {reason}", err=True)


@shards_app.command("merge")
def shards_merge(target: Target) -> None:
    """Join the parts that `build --part I/N` left in one place into one set."""
    from rankllm_composer.shards.publish import merge_shards

    merge_shards(target, report=_progress)


@shards_app.command("verify")
def shards_verify(
    target: Target,
    records: Annotated[
        bool, typer.Option(help="Also decode and check every record, and look for repeated ids.")
    ] = False,
) -> None:
    """Check that every shard is there and is what the index says. Exit code 2 if not."""
    from rankllm_composer.shards.verify import verify_shards

    outcome = verify_shards(target, records=records, report=_progress)
    counts = f"{outcome.num_records:,} records in {outcome.num_shards:,} shards"
    if outcome.num_duplicates:
        counts += f", {outcome.num_duplicates:,} repeated ids ({', '.join(outcome.duplicate_ids)})"
    if outcome.problems:
        raise ValueError(f"{outcome.target}: {len(outcome.problems)} problems, see above ({counts})")
    typer.echo(f"{outcome.target}: all is well, {counts}")


@shards_app.command("info")
def shards_info(target: Target) -> None:
    """Say what a set holds and where it came from, without reading its shards."""
    from rankllm_composer.shards.verify import shards_info

    for line in shards_info(target).lines():
        typer.echo(line)


@app.command("inspect")
def inspect(
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML file, or a name of `recipes list`; none with --model.")
    ] = None,
    overrides: Overrides = None,
    record: Annotated[int, typer.Option(min=0, help="Which record of data.train, counted from 0.")] = 0,
    loss: Annotated[
        bool, typer.Option("--loss", help="Load the model on the CPU and compute the record's loss parts.")
    ] = False,
    model: Annotated[Path | None, typer.Option(help="Instead of a recipe: an exported folder to check.")] = None,
) -> None:
    """Show a record as the model will see it, or check an exported folder and a request, token by token, against the
    client's. Exit code 2 if something is wrong."""
    from rankllm_composer.export.serving_check import inspect_folder
    from rankllm_composer.preflight.inspection import inspect_recipe
    from rankllm_composer.recipe.load import load_recipe

    if (recipe is None) == (model is None):
        raise ValueError("inspect: found neither or both of RECIPE and --model; give one of them")
    if model is not None:
        found: Any = inspect_folder(model)
    else:
        found = inspect_recipe(load_recipe(recipe_path(str(recipe)), overrides or []), record, loss=loss)
    for line in found.lines(colour=sys.stdout.isatty()):
        typer.echo(line)
    if found.problems:
        raise ValueError(f"{model or recipe}: {len(found.problems)} to put right, see above")


@app.command("plan")
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    num_ranks: Annotated[int, typer.Option("--num-ranks", "-n", min=1, help="GPUs to train on.")] = 8,
    gpu: Annotated[str, typer.Option(help="GPU: h100-80gb, a100-80gb, rtx4090-24gb, …")] = "h100-80gb",
    mfu: Annotated[float | None, typer.Option(help="Assumed MFU (default 0.4; not measured).")] = None,
    lists: Annotated[
        int | None,
        typer.Option(min=1, help="Training lists, if neither shards nor source are on this machine."),
    ] = None,
) -> None:
    """Estimate steps, memory per rank, FLOPs and hours."""
    from rankllm_composer.preflight.plan import plan_recipe
    from rankllm_composer.recipe.load import load_recipe

    found = plan_recipe(
        load_recipe(recipe_path(recipe), overrides or []),
        num_ranks,
        gpu=gpu,
        mfu=mfu,
        num_lists=lists,
        report=_progress,
    )
    for line in found.lines():
        typer.echo(line)


@app.command("rerank")
def rerank(
    model: Annotated[Path, typer.Option(help="Exported folder, with reranker.json.")],
    queries: Annotated[
        Path, typer.Option(help="Queries: JSONL with qid and text, a BEIR folder, or irds:ID of ir_datasets.")
    ],
    docs: Annotated[Path, typer.Option(help="Documents: JSONL with docid, title and text, a BEIR folder, or irds:ID.")],
    run: Annotated[Path, typer.Option(help="First-stage run in TREC format, or irds:ID that comes with one.")],
    output: Annotated[Path, typer.Option(help="TREC run to write.")],
    qrels: Annotated[
        Path | None, typer.Option(help="Judgments, TREC, BEIR or irds:ID: compare with the first stage.")
    ] = None,
    measure: Annotated[list[str] | None, typer.Option(help="ir-measures' name; may be given again.")] = None,
    name: Annotated[
        str | None, typer.Option(help="With --qrels: of this set in figures, such as dl20-bm25; default: --run's name.")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="With --qrels: add the figures to the model's card.")] = False,
    decoding: Annotated[
        Literal["first_token", "generation"] | None, typer.Option(help="Default: what the contract is for.")
    ] = None,
    window: Annotated[int | None, typer.Option(min=2, help="Candidates in a prompt; default: the contract's.")] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Candidates a window moves; default: the contract's.")
    ] = None,
    passes: Annotated[int, typer.Option(min=1, help="Times over the list, bottom to top.")] = 1,
    top_k: Annotated[int, typer.Option(min=2, help="Candidates of a query that are reranked.")] = 100,
    constrained: Annotated[bool, typer.Option("--constrained", help="Generate permutations only.")] = False,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one forward pass.")] = 16384,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Type of the weights; default: as stored on cuda, float32 on cpu."),
    ] = None,
) -> None:
    """Rerank a run with an exported model; a job that was stopped goes on where it was."""
    from rankllm_composer.export.model_card import add_figures
    from rankllm_composer.options import RerankOptions
    from rankllm_composer.ranking.comparison import DEFAULT_MEASURES
    from rankllm_composer.ranking.rerank import RerankFiles, rerank_files

    if qrels is None and (card or name is not None):
        raise ValueError("rerank: found --card or --name without --qrels, so nothing is measured; give --qrels")
    report = rerank_files(
        model,
        RerankFiles(queries=queries, documents=docs, first_stage=run, output=output, judgments=qrels),
        RerankOptions(
            window_size=window,
            stride=stride,
            passes=passes,
            top_k=top_k,
            decoding=decoding,
            constrained=constrained,
            batch_tokens=batch_tokens,
            dtype=dtype,
        ),
        measures=measure or DEFAULT_MEASURES,
        name=name,
    )
    typer.echo(report.text)
    if card and report.result is not None:
        add_figures(model / "README.md", report.result.figures())
        typer.echo(f"{model / 'README.md'}: figures of {report.result.name} added")


@app.command("report")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, shown side by side.")],
    output: Annotated[
        Path | None, typer.Option(help="HTML file; default: report.html in the first run's folder.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Folder for the same pictures as PNG files.")] = None,
    reranked: Annotated[
        list[Path] | None, typer.Option(help="OUTPUT.figures.json of `rerank --qrels`; may be given again.")
    ] = None,
) -> None:
    """Draw what runs did: losses, learning rate, throughput, nDCG, gains, lengths, position bias, in one HTML page."""
    from rankllm_composer.errors import RecipeError
    from rankllm_composer.preflight.list_lengths import measure_lists
    from rankllm_composer.ranking.comparison import read_rerank_result
    from rankllm_composer.recipe.load import load_recipe
    from rankllm_composer.report.page import write_report
    from rankllm_composer.report.run_record import read_run, with_reranked

    records = []
    for folder in runs:
        try:
            lengths = measure_lists(load_recipe(folder / "recipe.yaml"), sample=1000).tokens
        except RecipeError:
            lengths = ()
        records.append(read_run(folder, lengths))
    records = with_reranked(records, runs, map(read_rerank_result, reranked or ()))
    target = output or runs[0] / "report.html"
    drawn = write_report(records, target, png)
    typer.echo(f"{target}: {', '.join(drawn) or 'no pictures, nothing was measured'}")


@app.command("demo")
def demo(
    folder: Annotated[Path, typer.Option(help="Takes the collection, the shards, the run and the model.")] = Path(
        "runs/demo"
    ),
    overrides: Overrides = None,
) -> None:
    """Make a small collection, train a small reranker on it from scratch, show what it learned."""
    from rankllm_composer.demo import run_demo

    run_demo(folder, find_recipe("demo"), overrides or [], report=typer.echo)
