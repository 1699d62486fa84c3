"""Arguments that transformers passes to flash-attn for a packed microbatch, checked with a CPU implementation."""

from __future__ import annotations

import copy
import importlib.util
import inspect

import pytest
import torch
from support.packed_models import FAMILIES, gradients, new_model, packed_losses, random_sequences
from transformers import AutoModelForCausalLM, modeling_flash_attention_utils

from rankllm_composer.data.packing import split_batch
from rankllm_composer.model.attention import FLASH_ATTENTION
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.reranker import ListwiseReranker
from rankllm_composer.options import OBJECTIVES

LAYERS = 4  # of test_model's models
WINDOWED_LAYERS = {"mistral_windowed": 4, "qwen2_windowed": 2}  # the last ones
CALLS: list[inspect.BoundArguments] = []


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """flash-attn 2.7's function on CPU: (T, H, d), (T, K, d), (T, K, d) → (T, H, d).

    What the kernel demands of its arguments is asserted. A causal query at place i of its sequence sees the keys of
    places i - left … i, both included, where window_size = (left, right); -1 = no bound.
    """
    assert q.dtype == k.dtype == v.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    for bounds, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        assert bounds.dtype == torch.int32 and bounds.is_contiguous()
        assert type(longest) is int and longest == int(bounds.diff().max())
        assert bounds[0] == 0 and bounds[-1] == len(q) == len(k) == len(v)
    assert (dropout_p, softcap, alibi_slopes, return_attn_probs, block_table) == (0.0, 0.0, None, False, None)
    left, right = (len(q) if bound < 0 else bound for bound in window_size)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    outputs = []
    for start, stop in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist()):
        distance = (
            torch.arange(stop - start)[:, None] - torch.arange(stop - start)[None]
        )  # query position - key position
        visible = (distance <= left) & (distance >= (0 if causal else -right))
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) * softmax_scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v[start:stop]))
    return torch.cat(outputs)


@pytest.fixture
def flash(monkeypatch):
    """Make flash-attn appear installed to transformers and `choose_attention`; return the recorded calls."""
    signature = inspect.signature(flash_attn_varlen_func)

    def recorded(*arguments, **named):
        call = signature.bind(*arguments, **named)  # an argument that flash-attn does not have is a TypeError
        CALLS.append(call)
        return flash_attn_varlen_func(*call.args, **call.kwargs)

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: True if name == "flash_attn" else find_spec(name, *rest)
    )
    monkeypatch.setattr(modeling_flash_attention_utils, "flash_attn_2_varlen_func", recorded)
    # Values that transformers derives on import from the signature of flash_attn_func and flash-attn's version.
    monkeypatch.setattr(modeling_flash_attention_utils, "_flash_supports_window_size", True)
    monkeypatch.setattr(modeling_flash_attention_utils, "flash_241", True)
    CALLS.clear()
    return CALLS


def assert_equal_steps(model, reference, parts, expected):
    """Loss parts, and each parameter's gradient relative to its norm."""
    assert parts.keys() == expected.keys()
    for name in parts:
        assert float(parts[name]) == pytest.approx(float(expected[name]), rel=2e-6)
    for name, gradient in gradients(reference).items():
        difference = (gradients(model)[name] - gradient).norm() / gradient.norm()
        assert float(difference) < 1e-4, name


@pytest.mark.parametrize("family", ["mistral", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_flash_step_equals_packed_sdpa(flash, family, name):
    objective = Objective(name, language_modelling_weight=0.5, ranking_weight=3.0)
    sequences = random_sequences(name)
    reference = new_model(family)
    expected = packed_losses(reference, sequences, objective, activation_checkpointing=0.5)
    assert not flash
    model = new_model(family)
    parts = packed_losses(
        model, sequences, objective, activation_checkpointing=0.5, attention=FLASH_ATTENTION, device="gpu"
    )
    assert model.config._attn_implementation == FLASH_ATTENTION
    assert len(flash) == LAYERS + LAYERS // 2  # every layer once, the checkpointed half again in the backward pass
    assert_equal_steps(model, reference, parts, expected)


def test_arguments_of_every_call(flash):
    sequences = random_sequences("combined")
    lengths = [len(s.encoded.input_ids) for s in sequences]
    (batch,) = split_batch({"sequences": sequences}, max_lists=10)
    model = ListwiseReranker(new_model("mistral"), None, Objective("combined"), attention=FLASH_ATTENTION, device="gpu")
    positions = []
    model.model.model.rotary_emb.register_forward_hook(lambda module, inputs, output: positions.append(inputs[1]))
    model(batch)
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert len(flash) == LAYERS
    for call in flash:
        given = call.arguments
        assert given["q"].shape == (sum(lengths), 4, 8)
        assert given["k"].shape == given["v"].shape == (sum(lengths), 2, 8)  # key-value heads are not repeated
        assert given["cu_seqlens_q"].tolist() == given["cu_seqlens_k"].tolist() == bounds
        assert given["max_seqlen_q"] == given["max_seqlen_k"] == max(lengths)
        assert given["causal"] is True and given["softmax_scale"] == 8**-0.5
        assert "window_size" not in given
    # positions restart with each list, although flash-attn uses only cu_seqlens
    assert [p.tolist() for p in positions] == [[[i for length in lengths for i in range(length)]]]


def test_arguments_in_half_precision(flash):
    (batch,) = split_batch({"sequences": random_sequences("combined")}, max_lists=10)
    model = ListwiseReranker(
        new_model("mistral").bfloat16(), None, Objective("combined"), attention=FLASH_ATTENTION, device="gpu"
    )
    model.loss(model(batch), batch)["total"].backward()
    assert {call.arguments[name].dtype for call in flash for name in "qkv"} == {torch.bfloat16}


@pytest.mark.parametrize("limit", [{"max_lists": 1}, {"max_tokens": 60}])
def test_flash_step_in_microbatches(flash, limit):
    """A single list has no second boundary, but transformers must still treat it as a packed batch."""
    sequences = random_sequences("combined", num=7)
    reference, model = new_model("mistral"), new_model("mistral")
    expected = packed_losses(reference, sequences, Objective("combined"), limit=limit)
    parts = packed_losses(model, sequences, Objective("combined"), limit=limit, attention=FLASH_ATTENTION, device="gpu")
    num_microbatches = len(split_batch({"sequences": sequences}, **limit))
    assert len(flash) == LAYERS * num_microbatches
    assert_equal_steps(model, reference, parts, expected)


def test_a_microbatch_with_nothing_to_train_calls_flash_too(flash):
    (batch,) = split_batch({"sequences": []}, max_lists=4)
    model = ListwiseReranker(new_model("mistral"), None, Objective("combined"), attention=FLASH_ATTENTION, device="gpu")
    assert model.loss(model(batch), batch)["total"] == 0.0
    assert [call.arguments["max_seqlen_q"] for call in flash] == [1] * LAYERS


def windowed(family: str, wider: int = 0) -> torch.nn.Module:
    """A model of test_model whose window is `wider` tokens wider, weights unchanged."""
    config = copy.deepcopy(FAMILIES[family])
    config.sliding_window += wider
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


@pytest.mark.parametrize("family", ["mistral_windowed", "qwen2_windowed"])
def test_flash_windows_are_one_token_longer(flash, family):
    """Windows have one token more than with packed_sdpa: in transformers' masks a window of w tokens includes the token
    itself; flash-attn's window_size = (w, w) covers w tokens and the token itself."""
    objective = Objective("combined", ranking_weight=3.0)
    sequences = random_sequences("combined")
    window = FAMILIES[family].sliding_window
    flashed = windowed(family)
    parts = packed_losses(flashed, sequences, objective, attention=FLASH_ATTENTION, device="gpu")
    sizes = [call.arguments.get("window_size") for call in flash]
    assert sizes == [(window, window) if layer >= LAYERS - WINDOWED_LAYERS[family] else None for layer in range(LAYERS)]

    one_wider = windowed(family, wider=1)
    assert_equal_steps(flashed, one_wider, parts, packed_losses(one_wider, sequences, objective))
    same = packed_losses(windowed(family), sequences, objective)
    assert float(parts["total"]) != pytest.approx(float(same["total"]), rel=1e-5)


@pytest.mark.parametrize("family", ["mistral_windowed", "qwen2_windowed"])
def test_a_window_as_long_as_the_lists_changes_nothing(flash, family):
    """As for the published base models: Zephyr's window has 4096 tokens, and lists have at most 4096."""
    objective = Objective("combined")
    sequences = random_sequences("combined")
    longest = max(len(s.encoded.input_ids) for s in sequences)
    wider = longest - FAMILIES[family].sliding_window
    flashed, packed = windowed(family, wider), windowed(family, wider)
    parts = packed_losses(flashed, sequences, objective, attention=FLASH_ATTENTION, device="gpu")
    assert flash[-1].arguments["window_size"] == (longest, longest)
    assert_equal_steps(flashed, packed, parts, packed_losses(packed, sequences, objective))
