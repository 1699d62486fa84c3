"""Packed attention against one dense masked attention, and against each sequence alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rankllm_composer.model.attention import PACKED_SDPA, choose_attention, packed_sdpa


def dense(query, key, value, lengths, window):
    """The same attention with one (T, T) mask and repeated key-value heads."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    visible = (sequence[:, None] == sequence[None]) & (place[:, None] >= place[None])
    if window is not None:
        visible &= place[None] > place[:, None] - window
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible).transpose(1, 2)


@pytest.mark.parametrize("heads, key_value_heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("lengths", [[1], [12], [5, 1, 9, 8]])
def test_equals_dense_masked_attention(heads, key_value_heads, window, lengths):
    torch.manual_seed(0)
    total, width = sum(lengths), 8

    def leaf(count):
        return torch.randn(1, total, count, width, dtype=torch.float64).transpose(1, 2).requires_grad_()

    inputs = leaf(heads), leaf(key_value_heads), leaf(key_value_heads)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    weight = torch.randn(1, total, heads, width, dtype=torch.float64)

    ours = packed_sdpa(*inputs, bounds, sliding_window=window)
    expected = dense(*inputs, lengths, window)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    for ours_grad, expected_grad in zip(
        torch.autograd.grad((ours * weight).sum(), inputs), torch.autograd.grad((expected * weight).sum(), inputs)
    ):
        torch.testing.assert_close(ours_grad, expected_grad, rtol=1e-9, atol=1e-12)


def test_wrong_bounds_are_errors():
    tensor = torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match="ends at 4, but the pack has 5 tokens"):
        packed_sdpa(tensor, tensor, tensor, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="first dimension of a pack is 2; expected 1"):
        packed_sdpa(tensor.expand(2, -1, -1, -1), tensor, tensor, torch.tensor([0, 5]))


def test_choice_of_attention():
    assert choose_attention("auto", "cpu") == PACKED_SDPA
    assert choose_attention("packed_sdpa", "gpu") == PACKED_SDPA
    with pytest.raises(ValueError, match="flash_attention_2 needs flash-attn and a CUDA device"):
        choose_attention("flash_attention_2", "cpu")
    with pytest.raises(ValueError, match="'eager'; expected one of auto"):
        choose_attention("eager", "cpu")
