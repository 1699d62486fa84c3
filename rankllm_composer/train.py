"""Train a recipe and export Hugging Face model folders.

composer -n 8 rankllm_composer/train.py yamls/first_mistral.yaml [key=value …]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import rankllm_composer.processes  # noqa: F401  # records the launcher before the slow imports
from rankllm_composer.errors import StoreError
from rankllm_composer.screen import doing, plain_warnings, report, say
from rankllm_composer.storage.scratch import temporary_files_in_scratch
from rankllm_composer.training.devices import set_allocator
from rankllm_composer.training.run import TrainedRun, run_recipe, train

if TYPE_CHECKING:
    from rankllm_composer.recipe.sections import Recipe

DRY_RUN = "--dry-run"


def main(arguments: Sequence[str]) -> int:
    """Run the command line: a recipe and its overrides. Returns the exit code."""
    from rankllm_composer.recipe.keys import keys_as_text

    if not arguments or arguments[0] in ("-h", "--help"):
        say("usage: rankllm-composer train RECIPE [-n PROCESSES] [--dry-run] [key=value ...]")
        say(f"       composer -n PROCESSES {Path(__file__).name} RECIPE [key=value ...]\n")
        say(keys_as_text())
        return 0 if arguments else 2
    try:
        with temporary_files_in_scratch(), plain_warnings():
            return _train(arguments)
    except StoreError as error:  # the temporary directory cannot be written
        report(f"error: {error}")
        return 2


def _train(arguments: Sequence[str]) -> int:
    with doing("loading torch, Composer and transformers"):
        from rankllm_composer.recipe.load import load_recipe
        from rankllm_composer.training.stopping import PeerWatch, Preempted

    recipe, *overrides = [argument for argument in arguments if argument != DRY_RUN]
    watch = PeerWatch()
    try:
        try:
            run_recipe(load_recipe(recipe, overrides), watch, dry_run=DRY_RUN in arguments)
        except (Preempted, SystemExit):
            raise
        except BaseException as failure:
            return watch.exit_code(failure)
    except Preempted as request:  # also if it arrived while the failure of another rank was being reported
        return watch.exit_preempted(request)
    return 0


class _CallableModule(ModuleType):
    """A module that can be called: `rankllm_composer.train(recipe)` works even after this module was imported."""

    def __call__(self, recipe: Recipe) -> TrainedRun:
        return train(recipe)


sys.modules[__name__].__class__ = _CallableModule


if __name__ == "__main__":
    set_allocator()
    sys.path.pop(0)  # Python puts this folder first, where our modules would shadow other packages
    sys.exit(main(sys.argv[1:]))
