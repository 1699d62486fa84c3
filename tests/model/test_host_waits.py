"""How often the host waits for a GPU: never in a packed step, once in an update.

On tensors without data, reading any value is an error, so a step that runs on them waits for nothing.
"""

from __future__ import annotations

import sys

import pytest
import torch
from composer.core import Callback
from support import noised_training
from support.packed_models import FAMILIES, random_sequences
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from rankllm_composer.data.packing import split_batch
from rankllm_composer.model.loading import new_causal_lm
from rankllm_composer.model.losses import LOSSES
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.reranker import ListwiseReranker, checkpoint_activations
from rankllm_composer.options import OBJECTIVES
from rankllm_composer.training.guards import EpochGuard, LossGuard

CASES = [
    ("mistral_windowed", Objective("generation")),
    ("qwen3", Objective("combined")),
    *(("mistral", Objective("ranking", ranking_loss=name)) for name in sorted(LOSSES)),
]


@pytest.mark.parametrize(("family", "objective"), CASES, ids=lambda case: getattr(case, "ranking_loss", case))
def test_forward_loss_and_backward_wait_for_nothing(family, objective):
    (batch,) = split_batch({"sequences": random_sequences(objective.name)}, max_lists=10)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = new_causal_lm(FAMILIES[family], torch.bfloat16).train()
        checkpoint_activations(model, 0.5)
        reranker = ListwiseReranker(model, None, objective, attention="auto", device="gpu")
        batch = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
        }
        reranker.loss(reranker(batch), batch)["total"].backward()
        assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("read", [torch.Tensor.tolist, torch.Tensor.item, bool, torch.unique, torch.nonzero])
def test_a_value_that_is_read_would_be_seen(read):
    with FakeTensorMode(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException, RuntimeError)):
        read(torch.ones(()))


READS = {"item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select", "__bool__", "__float__", "__int__"}


class Reads(TorchFunctionMode, Callback):
    """Record which of our modules read values of tensors, by update."""

    def __init__(self) -> None:
        super().__init__()
        self.of_updates: list[list[str]] = []

    def batch_start(self, state, logger):
        self.of_updates.append([])

    def __torch_function__(self, function, types, arguments=(), options=None):
        if getattr(function, "__name__", "") in READS and self.of_updates:
            caller = sys._getframe(1)
            if caller.f_globals["__name__"].startswith("rankllm_composer"):
                self.of_updates[-1].append(f"{caller.f_code.co_name}: {function.__name__}")
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_update_reads_values_once(name):
    """Are losses and gradients finite? On a CPU each microbatch's bounds are read too, once for all its layers."""
    reads = Reads()
    spec = noised_training.data_spec(noised_training.new_lists(12), batch_size=4, max_lists=1)
    options = {"callbacks": [EpochGuard(), LossGuard(), reads]}
    trainer = noised_training.new_trainer(noised_training.new_model(name), spec, "2ba", **options)
    with reads:
        trainer.fit()
    trainer.close()
    assert reads.of_updates == [["_read: tolist"] * 4 + ["after_train_batch: tolist"]] * 2
