"""`rankllm-composer recipes …`: find, show, copy and check the recipes that come with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from rankllm_composer.redaction import BLOTTED

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
    from rankllm_composer.recipe_check import check_world, missing_files
    from rankllm_composer.recipe_merge import merge_recipe
    from rankllm_composer.recipe_schema import RecipeError, show
    from rankllm_composer.recipe_secrets import is_secret

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
    from rankllm_composer.recipe import describe_keys
    from rankllm_composer.recipe_schema import keys_as_markdown, keys_as_text

    rows = describe_keys()
    typer.echo(keys_as_markdown(rows) if markdown else keys_as_text(rows))
