"""A loss or gradient that is not finite: no update, the lists it came from, on every rank."""

from __future__ import annotations

import math

import pytest
import torch
from composer import ComposerModel, Trainer
from composer.core import Callback, DataSpec
from torch.utils.data import DataLoader

from rankllm_composer.loss_guard import LossError, LossGuard

NAN, INF = math.nan, math.inf


class Tiny(ComposerModel):
    """loss = mean of value * weight over the microbatch; `slope` multiplies the gradient alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, batch):
        return self.weight * batch["values"]

    def loss(self, outputs, batch):
        if torch.isinf(batch["slopes"]).any():
            outputs = outputs + 0 * (outputs - outputs.detach()).sqrt()  # value 0, gradient infinite
        return {"total": outputs.mean()}


class Weights(Callback):
    """The weight after every batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def batch_end(self, state, logger):
        self.seen.append(state.model.weight.item())


def run(values: list[float], guard: LossGuard, slopes: list[float] | None = None) -> list[float]:
    """Weight after each batch of two microbatches of one value; learning rate 1."""
    rows = [
        {"values": torch.tensor([value]), "slopes": torch.tensor([slope]), "record_ids": [f"q{index}"]}
        for index, (value, slope) in enumerate(zip(values, slopes or [0.0] * len(values)))
    ]

    def collate(pair):
        return {"microbatches": pair}

    weights, model = Weights(), Tiny()
    Trainer(
        model=model,
        train_dataloader=DataSpec(
            DataLoader(rows, batch_size=2, collate_fn=collate),
            split_batch=lambda batch, size: batch["microbatches"],
            get_num_samples_in_batch=lambda batch: len(batch.get("microbatches", [0])),
        ),
        optimizers=torch.optim.SGD(model.parameters(), lr=1.0),
        max_duration="1ep",
        device="cpu",
        progress_bar=False,
        callbacks=[guard, weights],
    ).fit()
    return weights.seen


def test_finite_losses_pass():
    guard = LossGuard()
    assert run([0.5, 0.5, 0.25, 0.25], guard) == [0.5, 0.25]
    assert guard.num_skipped == 0


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_loss_stops_before_the_update(bad):
    with pytest.raises(LossError, match=r"batch 2: found a loss that is not finite \(rank 0: q3\); the weights are"):
        run([0.5, 0.5, 0.25, bad], LossGuard())


def test_a_bad_gradient_behind_a_good_loss():
    with pytest.raises(LossError, match=r"gradient that is not finite from finite losses \(lists of the batch: q0, q1"):
        run([0.5, 0.5], LossGuard(), slopes=[0.0, INF])


def test_so_many_updates_are_left_out_and_no_more():
    guard = LossGuard(max_skipped_updates=2)
    assert run([0.5, 0.5, NAN, 1, 0.25, 0.25, 1, INF], guard) == [0.5, 0.5, 0.25, 0.25]
    assert guard.num_skipped == 2
    resumed = LossGuard(max_skipped_updates=2)
    resumed.load_state_dict(guard.state_dict())
    with pytest.raises(LossError, match=r"batch 1: .*, after 2 updates were left out; .*max_skipped_updates"):
        run([NAN, NAN], resumed)
