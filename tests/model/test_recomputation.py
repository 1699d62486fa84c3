"""Recomputed layers that keep the output of attention: the same gradients, and attention is computed once."""

from __future__ import annotations

import pytest
import torch
from support.packed_models import gradients, new_model, packed_losses, random_sequences
from torch.utils._python_dispatch import TorchDispatchMode

from rankllm_composer.model.objective import Objective
from rankllm_composer.model.recomputation import ATTENTION_OPERATIONS


class Attentions(TorchDispatchMode):
    """Counts the calls of attention kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        self.number += operation._schema.name in ATTENTION_OPERATIONS
        return operation(*arguments, **(keywords or {}))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("family", ["mistral", "mistral_windowed", "qwen3_moe"])
def test_gradients_are_those_without_recomputation(family, half):
    """Grouped queries, windows of 9 tokens in lists of up to 60, and experts; 4 layers."""
    sequences = random_sequences("combined")
    steps = {}
    for name, options in {
        "plain": {},
        "recomputed": {"activation_checkpointing": 1.0},
        "kept": {"activation_checkpointing": 1.0, "keeps_attention": True},
        "half of the layers": {"activation_checkpointing": 0.5, "keeps_attention": True},
    }.items():
        model, attentions = new_model(family), Attentions()
        with attentions:
            losses = packed_losses(model, sequences, Objective("combined"), bf16_on_cpu=half, **options)
        steps[name] = losses, gradients(model), attentions.number
    losses, expected, number = steps.pop("plain")
    assert number >= 4 * len(sequences)
    for name, (others, found, count) in steps.items():
        assert count == (2 * number if name == "recomputed" else number), name
        for part, value in losses.items():
            assert torch.equal(value, others[part])
        for weight, gradient in expected.items():
            assert torch.equal(gradient, found[weight]), (name, weight)


def test_every_kernel_exists_in_this_version_of_torch():
    for name in ATTENTION_OPERATIONS:
        namespace, _, operation = name.partition("::")
        if namespace == "aten":  # of packages that need a GPU there is none here
            assert getattr(torch.ops.aten, operation).default._schema.name == name
