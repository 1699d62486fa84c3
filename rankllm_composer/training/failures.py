"""What libraries raise while a run loads, trains, saves and logs, as errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.checkpoint.api import CheckpointException

from rankllm_composer.errors import CheckpointError, RankLLMComposerError, RunError, first_line

RESUME = "then rerun the same command to resume."
LOGGERS = {
    "wandb": ("wandb", "Set WANDB_API_KEY (or WANDB_MODE=offline)"),
    "mlflow": ("mlflow", "Correct tracking_uri and MLFLOW_TRACKING_TOKEN"),
    "databricks": ("mlflow", "Correct tracking_uri, DATABRICKS_HOST and DATABRICKS_TOKEN"),
    "tensorboard": ("tensorboard", "Correct its log_dir"),
}
"""Package of an error → Composer's name of its logger, and the remedy."""


@contextmanager
def explained_failures() -> Iterator[None]:
    """Replace known errors of libraries by those of this package, whose text gives cause and remedy."""
    try:
        yield
    except BaseException as error:  # torch's CheckpointException is no Exception
        known = explain(error)
        if known is None:
            raise
        raise known from error


def explain(error: BaseException) -> RankLLMComposerError | None:
    """The error that says what to do about an error of a library; None if it is not known, or is one of ours."""
    if isinstance(error, RankLLMComposerError):
        return None
    if isinstance(error, CheckpointException):
        causes = {rank: cause for rank, (cause, _) in sorted(error.failures.items())}
        ours = next((cause for cause in causes.values() if isinstance(cause, RankLLMComposerError)), None)
        if ours is not None:
            return ours
        reasons = [f"rank {rank}: {type(cause).__name__}: {first_line(cause)}" for rank, cause in causes.items()]
        return CheckpointError(
            f"a sharded checkpoint could not be written or read ({'; '.join(reasons)}); complete checkpoints are "
            f"intact. Free space or correct the permissions, {RESUME}"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return RunError(
            f"the GPU has too little memory ({first_line(error)}). Lower batch.microbatch_tokens, raise "
            f"model.activation_checkpointing, or see what fits with `rankllm-composer plan`; {RESUME}"
        )
    if "EADDRINUSE" in str(error):
        return RunError(
            "the port on which the ranks meet (MASTER_PORT) is taken by another process, such as another run. Pass "
            "another one: composer --master_port 29501 …"
        )
    names = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    for package, (logger, remedy) in LOGGERS.items():
        if package in names:
            return RunError(
                f"logging.loggers.{logger}: {type(error).__name__}: {first_line(error)}. {remedy}, or remove "
                f"logging.loggers.{logger}."
            )
    return None
