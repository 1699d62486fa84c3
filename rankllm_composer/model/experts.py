"""Gradients for experts that no token reaches, so that ranks with different tokens reduce the same gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def reach_all_experts(layers: Iterable[torch.nn.Module]) -> None:
    """Give the trained weights of every expert a gradient in every forward pass, zero where no token reaches them.

    A mixture of experts calls only the experts that its tokens choose. Ranks choose different ones, while FSDP2 and DDP
    reduce the gradients of a layer together: they would abort, or reduce the gradients of different weights as one.
    Call it before the model is wrapped, so that weights are gathered when the hooks run.
    """
    for layer in layers:
        experts = [expert for part in layer.modules() if isinstance(part, torch.nn.ModuleList) for expert in part]
        if experts:
            reached: set[torch.nn.Module] = set()
            layer.register_forward_pre_hook(_Forget(reached))
            for expert in experts:
                expert.register_forward_pre_hook(_Remember(reached))
            layer.register_forward_hook(_AddZeros(experts, reached))


class _Forget:
    """Hook before a layer: no expert is reached yet."""

    def __init__(self, reached: set[torch.nn.Module]) -> None:
        self.reached = reached

    def __call__(self, module: torch.nn.Module, inputs: Any) -> None:
        self.reached.clear()


class _Remember(_Forget):
    """Hook before an expert: it is reached."""

    def __call__(self, module: torch.nn.Module, inputs: Any) -> None:
        self.reached.add(module)


class _AddZeros:
    """Hook after a layer: adds 0 * weight to its output for the weights of all experts that were not reached."""

    def __init__(self, experts: list[torch.nn.Module], reached: set[torch.nn.Module]) -> None:
        self.experts, self.reached = experts, reached

    def __call__(self, module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        weights = (weight for expert in self.experts if expert not in self.reached for weight in expert.parameters())
        zeros = [weight.flatten()[:1].sum() * 0.0 for weight in weights if weight.requires_grad]
        if not zeros:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden + torch.stack(zeros).sum().to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
