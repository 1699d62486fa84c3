"""A CPU kernel for `aten::_flash_attention_forward` and its backward pass, so that the path of a GPU runs without one.

torch's own autograd formula calls it, as it calls the CUDA kernels; what those demand of their arguments is asserted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Call:
    query: tuple[int, ...]
    key: tuple[int, ...]
    dtype: torch.dtype
    longest: int
    window_left: int


@contextmanager
def kernel_on_cpu() -> Iterator[list[Call]]:
    """In this context torch has the kernel for CPU tensors of any type but float32; yields the forward calls."""
    calls: list[Call] = []

    def forward(query, key, value, bounds, key_bounds, longest, longest_key, dropout, causal, debug, **options):
        _check(query, key, value, bounds, longest)
        assert bounds is key_bounds or torch.equal(bounds, key_bounds)
        assert (longest_key, dropout, debug) == (longest, 0.0, False)
        assert options.get("alibi_slopes") is options.get("seqused_k") is None
        calls.append(Call(tuple(query.shape), tuple(key.shape), query.dtype, longest, options["window_size_left"]))
        scores = _scores(query, key, bounds, causal, options)
        log_sum = scores.logsumexp(-1)  # (H, T)
        output = torch.einsum("hqk,khd->qhd", (scores - log_sum[..., None]).exp(), _repeated(value, query))
        state = torch.zeros(2, dtype=torch.uint64)
        return torch.empty_like(query).copy_(output), log_sum, state, state.new_empty(()), query.new_empty(0)

    def backward(gradient, query, key, value, output, log_sum, bounds, _, longest, *rest, **options):
        causal = rest[2]
        weights = (_scores(query, key, bounds, causal, options) - log_sum[..., None]).exp()
        gradient, output = gradient.to(weights.dtype), output.to(weights.dtype)
        of_weights = torch.einsum("qhd,khd->hqk", gradient, _repeated(value, query))
        of_scores = weights * (of_weights - (gradient * output).sum(-1).T[..., None]) * options["scale"]
        of_query = torch.einsum("hqk,khd->qhd", of_scores, _repeated(key, query))
        of_key = torch.einsum("hqk,qhd->khd", of_scores, query.to(weights.dtype))
        of_value = torch.einsum("hqk,qhd->khd", weights, gradient)
        grouped = [part.unflatten(1, (key.shape[1], -1)).sum(2) for part in (of_key, of_value)]
        given = zip((query, key, value), (of_query, *grouped))
        return tuple(torch.empty_like(part).copy_(result) for part, result in given)  # with the strides of the kernel

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield calls


def _check(query, key, value, bounds, longest) -> None:
    """What the CUDA kernel refuses, and what it would compute wrongly."""
    assert query.dtype == key.dtype == value.dtype != torch.float32
    assert query.dim() == 3 and key.shape == value.shape and query.shape[0] == key.shape[0]
    assert query.shape[2] == key.shape[2] <= 256 and query.shape[2] % 8 == 0 and query.shape[1] % key.shape[1] == 0
    assert not 192 < query.shape[2] <= 224
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert bounds.dtype == torch.int32 and bounds.is_contiguous() and bounds[0] == 0 and bounds[-1] == len(query)
    assert type(longest) is int and longest == int(bounds.diff().max())


def _repeated(part: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Heads of keys or values, (T, K, d) → (T, H, d), in the type of the computation."""
    exact = part.double() if part.dtype == torch.float64 else part.float()
    return exact.repeat_interleave(query.shape[1] // part.shape[1], 1)


def _scores(query, key, bounds, causal, options) -> torch.Tensor:
    """(H, T, T) scores of the whole pack, minus infinity where a token does not see another."""
    exact = query.double() if query.dtype == torch.float64 else query.float()
    place = torch.arange(len(query))
    of_list = torch.bucketize(place, bounds[1:].long(), right=True)
    distance = place[:, None] - place[None]
    visible = of_list[:, None] == of_list[None]
    left, right = options["window_size_left"], options["window_size_right"]
    if left >= 0:
        visible &= distance <= left
    if causal or right >= 0:
        visible &= distance >= (0 if causal else -right)
    scores = torch.einsum("qhd,khd->hqk", exact, _repeated(key, query)) * options["scale"]
    return scores.masked_fill(~visible, -torch.inf)
