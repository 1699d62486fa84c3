"""The recipes that come with the package, by name."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from rankllm_composer.environment import expand_path
from rankllm_composer.errors import RunError
from rankllm_composer.recipe.names import did_you_mean


def recipe_folder() -> Path:
    """The folder of the recipes: in the installed package, or `yamls/` beside it in a source tree."""
    package = Path(str(resources.files("rankllm_composer")))
    installed = package / "yamls"
    return installed if installed.is_dir() else package.parent / "yamls"


def recipe_names() -> list[str]:
    """Names of the recipes of the package."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe of the package, such as "rank_zephyr"; raise RunError if there is none of that name."""
    path = recipe_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if Path(name).name == name and path.is_file():
        return path
    known = recipe_names()
    beside = [file for file in (f"{name}.yaml", f"{name}.yml", f"./{name}") if Path(file).is_file()]
    remedy = f"Did you mean {beside[0]}?" if beside else did_you_mean(name, known, "`recipes list` describes them.")
    raise RunError(f"recipe is {name}; expected a path with / or .yaml, or one of {', '.join(known)}. {remedy}")


def recipe_path(file: str) -> Path:
    """The file of a recipe that is given by its path or its name."""
    return Path(expand_path(file)) if "/" in file or file.endswith((".yaml", ".yml")) else find_recipe(file)
