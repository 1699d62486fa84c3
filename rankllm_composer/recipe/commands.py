"""`rankllm-composer recipes …`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from rankllm_composer.errors import RunError
from rankllm_composer.recipe.bundled import find_recipe, recipe_folder, recipe_names
from rankllm_composer.recipe.command_line import Commands
from rankllm_composer.screen import say

SCHEMA_NAME = "recipe.schema.json"


def _names(incomplete: str) -> list[str]:
    """Completions of a shell for the name of a recipe or a file beside it."""
    beside = [str(path) for ending in ("yaml", "yml") for path in Path().glob(f"*.{ending}")]
    return [name for name in [*recipe_names(), *beside] if name.startswith(incomplete)]


RecipeName = Annotated[str, typer.Argument(help="As `recipes list` prints it.", autocompletion=_names)]
RecipeFile = Annotated[
    str, typer.Argument(metavar="RECIPE", help="YAML file, or a name from `recipes list`.", autocompletion=_names)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that override those of the file.")
]
recipes_app = Commands(help="List, copy and check recipes.")


@recipes_app.command("list")
def recipes_list() -> None:
    """List the recipes of the package."""
    paths = sorted(recipe_folder().glob("*.yaml"))
    width = max((len(path.stem) for path in paths), default=0)
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines()
        title = next(line for line in lines if SCHEMA_NAME not in line)
        say(f"{path.stem:<{width}}  {title.removeprefix('#').strip()}")


@recipes_app.command("show")
def recipes_show(name: RecipeName) -> None:
    """Print a recipe."""
    say(find_recipe(name).read_text(encoding="utf-8"), end="")


@recipes_app.command("copy")
def recipes_copy(
    name: RecipeName,
    destination: Annotated[Path, typer.Argument(help="File or folder to copy to.", show_default="here")] = Path(),
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Copy a recipe, to change it. `run.name` becomes the name of the file."""
    source = find_recipe(name)
    target = destination / source.name if destination.is_dir() else destination
    if target.exists() and not force:
        raise RunError(f"destination is {target}; expected a file that does not exist. Choose another, or add --force.")
    schema = (source.parent / SCHEMA_NAME).resolve().as_posix()  # the copy is beside no schema
    line = rf"(?m)^(# yaml-language-server: \$schema=){SCHEMA_NAME}$"
    text = re.sub(line, rf"\g<1>{schema}", source.read_text("utf-8"))
    target.write_text(_renamed(text, source.stem, target.stem), encoding="utf-8")
    say(str(target))


def _renamed(text: str, old: str, new: str) -> str:
    """A recipe with another `run.name`, also in the comments on its folders; unchanged if no name can be made of it."""
    name = re.sub(r"[^\w.-]+", "-", new).lstrip("-.")
    if not name:
        return text
    line = re.compile(rf"(?m)^  name: {re.escape(old)}( +)(?=#)")
    text = line.sub(lambda found: f"  name: {name} ".ljust(len(found[0])), text, count=1)
    return re.sub(rf"(?m)(; null = runs/){re.escape(old)}(?=/|$)", rf"\g<1>{name}", text)


@recipes_app.command("keys")
def recipes_keys(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/recipe.md.")] = False,
) -> None:
    """Print every key of a recipe, with default, unit, meaning and the values it may have."""
    from rankllm_composer.recipe.keys import keys_as_markdown, keys_as_text

    say(keys_as_markdown() if markdown else keys_as_text())


@recipes_app.command("schema")
def recipes_schema() -> None:
    """Print the JSON Schema of recipes, with which editors complete and check keys."""
    from rankllm_composer.recipe.keys import recipe_schema

    say(recipe_schema())
