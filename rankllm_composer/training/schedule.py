"""Learning rate schedule: linear warmup, then a decay until the end of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from rankllm_composer.recipe.times import updates_in

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate_factor(
    update: int, *, name: str, num_updates: int, num_warmup: int, final_fraction: float = 0.0
) -> float:
    """Return the factor of the highest learning rate in one optimizer step.

        warmup:   update / num_warmup
        cosine:   f + (1 - f) * (1 + cos(pi * p)) / 2,  p = (update - num_warmup) / (num_updates - num_warmup)
        linear:   f + (1 - f) * (1 - p)
        constant: 1

    Args:
        update: 0 = the first; those after `num_updates` keep the last factor.
        final_fraction: f, the last factor of cosine and linear.
    Source:
        `get_cosine_schedule_with_warmup` of transformers, which the published runs used; f = 0 there.
    """
    if update < num_warmup:
        return update / num_warmup
    if name == "constant":
        return 1.0
    done = min(1.0, (update - num_warmup) / max(1, num_updates - num_warmup))
    shape = 0.5 * (1.0 + math.cos(math.pi * done)) if name == "cosine" else 1.0 - done
    return final_fraction + (1.0 - final_fraction) * shape


def build_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    name: str,
    warmup: str,
    final_fraction: float,
    max_duration: str,
    updates_per_epoch: int,
    lists_per_update: int,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Build a scheduler that counts optimizer steps itself; the Trainer steps it after every batch.

    Composer's schedulers compute the next rate before the batch is counted, so that their first two steps have the same
    rate and the last value is never reached.

    Raises:
        ValueError: unknown name, or a time in a unit that cannot be counted in updates.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule.name is {name!r}; expected one of {', '.join(SCHEDULES)}")
    in_updates = partial(updates_in, updates_per_epoch=updates_per_epoch, lists_per_update=lists_per_update)
    num_updates = in_updates(max_duration)
    num_warmup = in_updates(warmup, num_updates=num_updates)
    assert num_updates is not None and num_warmup is not None  # the length of an epoch is known

    def factor(update: int) -> float:  # a function, since a scheduler's state would include a partial
        return learning_rate_factor(
            update, name=name, num_updates=num_updates, num_warmup=num_warmup, final_fraction=final_fraction
        )

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def apply_schedule(scheduler: torch.optim.lr_scheduler.LambdaLR, options: Mapping[str, Any]) -> None:
    """Set the options of the optimizer and the rate of its next step; a checkpoint restores those of the previous run.

    Args:
        options: arguments of the optimizer, with `lr`, the highest rate.
    """
    scheduler.base_lrs = [options["lr"] for _ in scheduler.base_lrs]
    for group, factor in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas):
        group.update(options, initial_lr=options["lr"], lr=options["lr"] * factor(scheduler.last_epoch))
