"""Measure few layers for many: equal ones allocate the same, one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

from rankllm_composer.model.reranker import decoder_layers
from rankllm_composer.preflight.tracking import PARTS, Section

NUM_ENDS = 2
"""Layers at either end that always stay: FSDP2 gathers and frees weights there at other times than in the middle."""


class FewLayers:
    """The layers of a model, after those in its middle that equal another one were removed from it.

    Args:
        model: a causal LM, with or without PEFT, before FSDP2 shards it.
        few: whether to remove any.

    Attributes:
        kept: the layers that remain, first to last.
        stand_ins: for each layer that the model had, the number of the one in `kept` that is its like.
    """

    def __init__(self, model: Any, few: bool = True) -> None:
        layers = decoder_layers(model)
        chosen = list(range(len(layers)))
        container = next((part for part in model.modules() if _holds(part, layers)), None)
        if few and container is not None and not _share_weights(layers):
            kinds = _kinds(layers, model.config)
            middle = chosen[NUM_ENDS:-NUM_ENDS]
            first_of_kind = {kinds[number]: number for number in reversed(middle)}
            chosen[NUM_ENDS:-NUM_ENDS] = [first_of_kind[kinds[number]] for number in middle]
        numbers = sorted(set(chosen))
        self.kept = [layers[number] for number in numbers]
        self.stand_ins = [numbers.index(number) for number in chosen]
        if container is not None and len(numbers) < len(layers):
            for number, layer in enumerate(self.kept):
                container[number] = layer
            del container[len(numbers) :]
            for name, values in _lists(model.config, len(layers)).items():
                setattr(model.config, name, [values[number] for number in numbers])
            model.config.num_hidden_layers = len(numbers)

    def weights(self, model: torch.nn.Module) -> list[tuple[torch.Tensor, int]]:
        """Weights and buffers of a model of the layers kept, and how many of each the whole model has."""
        times = Counter(self.stand_ins)
        of_layers = {id(weight): times[n] for n, layer in enumerate(self.kept) for weight in _weights(layer)}
        return [(weight, of_layers.get(id(weight), 1)) for weight in _weights(model)]

    def whole(self, sections: Sequence[Section], num_bytes: int) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes by part of the whole model: when most are in use, and at the end.

        Args:
            sections: a step of the layers kept.
            num_bytes: of the weights that were left out.
        """
        times, now = Counter(self.stand_ins), sections[0].start.copy()
        now[PARTS.index("weights")] += num_bytes
        highest = now
        for section in self._in_order(sections):
            highest = max(highest, now + section.highest - section.start, key=sum)
            now = now + section.end - section.start
            now -= sum((times[layer] - 1) * num_freed for layer, num_freed in section.freed.items())
        return dict(zip(PARTS, highest.tolist())), dict(zip(PARTS, now.tolist()))

    def _in_order(self, sections: Sequence[Section]) -> Iterator[Section]:
        """The sections of a step of the whole model."""
        for direction, group in groupby(sections, key=lambda section: section.direction):
            if direction is None:
                yield from group
                continue
            of_layer = {section.layer: section for section in group}
            order = self.stand_ins if direction == "forward" else reversed(self.stand_ins)
            yield from (of_layer[number] for number in order if number in of_layer)


def _holds(part: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> bool:
    return isinstance(part, torch.nn.ModuleList) and list(part) == list(layers)


def _weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _share_weights(layers: Sequence[torch.nn.Module]) -> bool:
    found = [id(weight) for layer in layers for weight in layer.parameters()]
    return len(set(found)) < len(found)


def _kinds(layers: Sequence[torch.nn.Module], config: Any) -> list[Hashable]:
    """What each layer holds and computes, as its weights, its settings and the configuration say."""
    lists = _lists(config, len(layers)).values()
    return [(_settings(layer), *(str(values[number]) for values in lists)) for number, layer in enumerate(layers)]


def _settings(layer: torch.nn.Module) -> Hashable:
    return tuple(
        (name, type(part), key, value)
        for name, part in layer.named_modules()
        for key, value in vars(part).items()
        if key != "layer_idx" and isinstance(value, int | float | str | None)
    ) + tuple((name, weight.shape, weight.dtype, weight.requires_grad) for name, weight in layer.named_parameters())


def _lists(config: Any, num_layers: int) -> dict[str, list[Any]]:
    """Values that the configuration gives for each layer."""
    return {key: value for key, value in vars(config).items() if isinstance(value, list) and len(value) == num_layers}
