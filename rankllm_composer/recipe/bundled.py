"""The recipes that come with the package, by name."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from rankllm_composer.environment import expand_path
from rankllm_composer.errors import RunError


def recipe_folder() -> Path:
    """The folder of the recipes: in the installed package, or `yamls/` beside it in a source tree."""
    package = Path(str(resources.files("rankllm_composer")))
    installed = package / "yamls"
    return installed if installed.is_dir() else package.parent / "yamls"


def find_recipe(name: str) -> Path:
    """The file of a recipe of the package, such as "rank_zephyr"; raise RunError if there is none of that name."""
    path = recipe_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if Path(name).name == name and path.is_file():
        return path
    known = ", ".join(sorted(found.stem for found in recipe_folder().glob("*.yaml")))
    raise RunError(
        f"recipe is {name}; expected a path with / or .yaml, or one of {known}. `recipes list` describes them."
    )


def recipe_path(file: str) -> Path:
    """The file of a recipe that is given by its path or its name."""
    return Path(expand_path(file)) if "/" in file or file.endswith((".yaml", ".yml")) else find_recipe(file)
