"""Train a one-weight model on chosen losses and gradients under a LossGuard."""

from __future__ import annotations

import math

import torch
from composer import ComposerModel, Trainer
from composer.core import Callback, DataSpec
from torch.utils.data import DataLoader

from rankllm_composer.training.guards import LossGuard

NAN, INF = math.nan, math.inf


class Tiny(ComposerModel):
    """Loss: mean of value * weight. An infinite `slope` makes the gradient infinite, but not the loss."""

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
    """Record the weight after every batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def batch_end(self, state, logger):
        self.seen.append(state.model.weight.item())


def run(values: list[float], guard: LossGuard, slopes: list[float] | None = None) -> list[float]:
    """Return the weight after each batch of two microbatches with one value each; the learning rate is 1."""
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
