"""Composer's loggers and callbacks by name, with the options of a recipe; loggers write into the run's folder."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer import callbacks, loggers
from composer.loggers import LoggerDestination

from rankllm_composer.environment import expand_path
from rankllm_composer.errors import RunError
from rankllm_composer.recipe.sections import Recipe
from rankllm_composer.training.progress import MetricsFile, ProgressLine
from rankllm_composer.training.run_files import METRICS_FILE

LOGGERS = {"tensorboard": loggers.TensorboardLogger, "wandb": loggers.WandBLogger, "mlflow": loggers.MLFlowLogger}
CALLBACKS = {
    "speed_monitor": callbacks.SpeedMonitor,
    "memory_monitor": callbacks.MemoryMonitor,
    "lr_monitor": callbacks.LRMonitor,
    "optimizer_monitor": callbacks.OptimizerMonitor,
    "nan_monitor": callbacks.NaNMonitor,
}


def build_loggers(recipe: Recipe, folder: Path) -> list[LoggerDestination]:
    """Build the metrics file, the progress line, and the Composer loggers of the recipe."""
    ours: list[LoggerDestination] = []
    if recipe.logging.metrics_file:
        ours.append(MetricsFile(folder / METRICS_FILE))
    if recipe.logging.progress:
        ours.append(ProgressLine())
    given = {name: _logger_options(name, options, folder) for name, options in recipe.logging.loggers.items()}
    return ours + [build_named("loggers", name, LOGGERS[name], options) for name, options in given.items()]


def _logger_options(name: str, given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The options of a logger, which writes into the run's folder unless they or its environment name another."""
    options = dict(given)
    if name == "tensorboard":
        options["log_dir"] = expand_path(options.get("log_dir") or folder / "tensorboard")
    elif name == "wandb" and "WANDB_DIR" not in os.environ:
        settings = dict(options.get("init_kwargs") or {})
        # Absolute: a W&B service that the environment names, such as that of a notebook, has another current folder.
        options["init_kwargs"] = {**settings, "dir": str(Path(expand_path(settings.get("dir") or folder)).absolute())}
    elif name == "mlflow" and (options.get("tracking_uri") or "MLFLOW_TRACKING_URI" not in os.environ):
        options["tracking_uri"] = expand_path(options.get("tracking_uri") or folder.resolve() / "mlruns")
    return options


def build_named(section: str, name: str, kind: type, options: dict[str, Any]) -> Any:
    """Build a Composer logger or callback with the options of the recipe; its library is there, see `check_packages`.

    Raises:
        RunError: an option is not among its arguments.
    """
    key, allowed = f"logging.{section}.{name}", inspect.signature(kind).parameters
    unknown = [option for option in options if option not in allowed]
    if unknown:
        raise RunError(
            f"{key} has unknown options ({', '.join(unknown)}); expected arguments of Composer's {kind.__name__}: "
            f"{', '.join(allowed)}."
        )
    return kind(**options)
