"""Attention by torch's variable-length kernel, with a stand-in for it on CPU: values, gradients, whole steps."""

from __future__ import annotations

import copy

import pytest
import torch
from support.kernel_stand_in import kernel_on_cpu
from support.packed_models import FAMILIES, SIZES, gradients, new_model, packed_losses, plain_losses, random_sequences
from transformers import AutoModelForCausalLM, DeepseekV3Config, Gemma2Config, LlamaConfig

from rankllm_composer.data.packing import split_batch
from rankllm_composer.model.attention import PACKED_SDPA, PACKED_VARLEN, choose_attention, packed_sdpa, packed_varlen
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.reranker import ListwiseReranker, decoder_layers
from rankllm_composer.options import OBJECTIVES

LAYERS = SIZES["num_hidden_layers"]
STEP = {"attention": "auto", "device": "gpu"}


@pytest.fixture
def kernel():
    with kernel_on_cpu() as calls:
        yield calls


@pytest.mark.parametrize(("heads", "key_value_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("lengths", [[1], [12], [5, 1, 9, 8]])
@pytest.mark.parametrize(("width", "value_width"), [(8, 8), (20, 12), (200, 8)])
def test_equals_packed_sdpa(kernel, heads, key_value_heads, window, lengths, width, value_width):
    """Also where heads are padded: to a multiple of 8, values to the width of keys, 193 to 224 dimensions to 256."""
    torch.manual_seed(0)

    def leaf(count, width):
        return torch.randn(1, sum(lengths), count, width, dtype=torch.float64).transpose(1, 2).requires_grad_()

    inputs = leaf(heads, width), leaf(key_value_heads, width), leaf(key_value_heads, value_width)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    weight = torch.randn(1, sum(lengths), heads, value_width, dtype=torch.float64)
    ours = packed_varlen(*inputs, bounds, max(lengths), scaling=0.3, sliding_window=window)
    expected = packed_sdpa(*inputs, bounds, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
    for mine, right in zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, expected))):
        torch.testing.assert_close(mine, right, rtol=1e-8, atol=1e-11)
    assert len(kernel) == 1


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_step_equals_each_list_alone(kernel, family):
    """Loss and every gradient, against the model's own attention; in float64, as the kernel takes no float32."""
    objective = Objective("combined", language_modelling_weight=0.5, ranking_weight=3.0)
    sequences = random_sequences("combined")
    model, reference = new_model(family).double(), new_model(family).double()
    parts = packed_losses(model, sequences, objective, activation_checkpointing=0.5, **STEP)
    expected = plain_losses(reference, sequences, objective)
    expected["total"].backward()
    assert model.config._attn_implementation == PACKED_VARLEN
    assert len(kernel) == LAYERS + LAYERS // 2  # the checkpointed half again in the backward pass
    assert {call.longest for call in kernel} == {max(len(row.encoded.input_ids) for row in sequences)}
    assert all(call.key[1] == model.config.num_key_value_heads for call in kernel)  # not repeated
    window = FAMILIES[family].sliding_window if "windowed" in family else None
    assert {call.window_left for call in kernel} <= {-1, (window or 0) - 1}
    assert float(parts["total"]) == pytest.approx(float(expected["total"]), rel=1e-6)
    for name, gradient in gradients(reference).items():
        if gradient is None or not gradient.any():  # of an expert that no token reaches
            assert not gradients(model)[name].any()
        else:
            assert float((gradients(model)[name] - gradient).norm() / gradient.norm()) < 1e-6, name


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("limit", [{"max_lists": 1}, {"max_tokens": 60}])
def test_a_step_in_microbatches(kernel, name, limit):
    sequences = random_sequences(name, num=7)
    model, reference = new_model("llama").double(), new_model("llama").double()
    parts = packed_losses(model, sequences, Objective(name), limit=limit, **STEP)
    expected = packed_losses(reference, sequences, Objective(name))
    assert len(kernel) == LAYERS * len(split_batch({"sequences": sequences}, **limit))
    assert float(parts["total"]) == pytest.approx(float(expected["total"]), rel=1e-6)
    for parameter, gradient in gradients(reference).items():
        assert float((gradients(model)[parameter] - gradient).norm() / gradient.norm()) < 1e-6, parameter


@pytest.mark.parametrize("family", ["mistral_windowed", "qwen3"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_step_in_bfloat16(kernel, family, weights):
    """Qwen3 normalizes queries and keys with weights in float32, while its values come out of autocast in bfloat16."""
    model = new_model(family).to(weights)
    reranker = ListwiseReranker(model, None, Objective("combined"), bf16_on_cpu=weights == torch.float32, **STEP)
    (batch,) = split_batch({"sequences": random_sequences("combined")}, max_lists=10)
    loss = reranker.loss(reranker(batch), batch)["total"]
    loss.backward()
    assert [call.dtype for call in kernel] == [torch.bfloat16] * LAYERS
    exact = plain_losses(new_model(family), random_sequences("combined"), Objective("combined"))
    assert float(loss) == pytest.approx(float(exact["total"]), rel=0.03)


def test_a_microbatch_with_nothing_to_train(kernel):
    (batch,) = split_batch({"sequences": []}, max_lists=4)
    reranker = ListwiseReranker(new_model("mistral").bfloat16(), None, Objective("combined"), **STEP)
    assert reranker.loss(reranker(batch), batch)["total"] == 0.0
    assert [call.longest for call in kernel] == [1] * LAYERS


SMALL = SIZES | {"head_dim": 8}
UNFIT = {
    "attention is computed in float32": (LlamaConfig(**SIZES), torch.float32),
    "the heads have 264 dimensions, more than 256": (LlamaConfig(**SIZES | {"head_dim": 264}), torch.float64),
    "the model caps its attention scores": (Gemma2Config(**SMALL, sliding_window=9), torch.float64),
}


@pytest.mark.parametrize("reason", UNFIT)
def test_what_the_kernel_cannot_compute_goes_to_sdpa_and_is_said_once(kernel, capsys, reason):
    config, dtype = UNFIT[reason]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa").to(dtype)
    reference = copy.deepcopy(model)
    sequences, objective = random_sequences("combined"), Objective("combined")
    parts = packed_losses(model, sequences, objective, limit={"max_lists": 3}, **STEP)
    assert capsys.readouterr().out == (
        f"model.attention: packed_varlen cannot be used, as {reason}; "
        "packed_sdpa computes the attention, list by list\n"
    )
    assert not kernel
    expected = packed_losses(reference, sequences, objective)
    assert reference.config._attn_implementation == PACKED_SDPA and capsys.readouterr().out == ""
    assert float(parts["total"]) == pytest.approx(float(expected["total"]), rel=2e-6)


def test_keys_wider_than_values(kernel):
    """Multi-head latent attention."""
    config = DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4},
        first_k_dense_replace=SIZES["num_hidden_layers"],
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double()
    reference = copy.deepcopy(model)
    sequences, objective = random_sequences("combined"), Objective("combined")
    parts = packed_losses(model, sequences, objective, **STEP)
    assert [call.query[2] for call in kernel] == [16] * LAYERS
    expected = plain_losses(reference, sequences, objective)
    assert float(parts["total"]) == pytest.approx(float(expected["total"]), rel=1e-6)


def test_compiled_layers_are_one_graph_each(kernel):
    """No graph break, and no compilation per list length: one graph of fixed and one of variable length."""
    objective = Objective("combined")
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    try:
        model, plain = new_model("mistral_windowed").double(), new_model("mistral_windowed").double()
        compiled = ListwiseReranker(model, None, objective, **STEP)
        eager = ListwiseReranker(plain, None, objective, **STEP)
        compiled.compile_layers(backend="aot_eager")
        for seed in range(3):
            (batch,) = split_batch({"sequences": random_sequences("combined", num=2 + seed, seed=seed)}, max_lists=9)
            losses = [reranker.loss(reranker(batch), batch)["total"] for reranker in (compiled, eager)]
            for loss in losses:
                loss.backward()
            assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)
        counters = torch._dynamo.utils.counters
        assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 2
        assert len(decoder_layers(model)) == LAYERS
        for name, gradient in gradients(plain).items():
            assert float((gradients(model)[name] - gradient).norm() / gradient.norm()) < 1e-5, name
    finally:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()


def test_choice_of_attention(kernel):
    assert choose_attention("auto", "gpu") == choose_attention("packed_varlen", "gpu") == PACKED_VARLEN
    assert choose_attention("auto", "cpu") == PACKED_SDPA
    with pytest.raises(ValueError, match=r"packed_varlen needs a CUDA device with .* kernel, but the device is cpu"):
        choose_attention("packed_varlen", "cpu")
