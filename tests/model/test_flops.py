"""FLOP counts against torch's counter on a packed step, and against values computed by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from composer import DataSpec, Trainer
from composer.callbacks import SpeedMonitor
from composer.loggers import InMemoryLogger
from support.packed_models import FAMILIES, random_sequences
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig

from rankllm_composer.data.packing import num_samples_in_batch, num_tokens_in_batch, split_batch
from rankllm_composer.model.flops import forward_flops, layer_matmul_parameters, training_flops
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.reranker import ListwiseReranker, checkpoint_activations

HEAD_DIM, HEADS, LAYERS, HIDDEN, VOCABULARY = 8, 4, 4, 32, 96  # of test_model's models


def attention_by_query(
    module, query, key, value, attention_mask, scaling, sliding_window=None, cu_seq_lens_q=None, **_
):
    """Multiply each query only by the keys it attends to, so that torch's counter counts only the causal half."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1)[0], value.repeat_interleave(groups, 1)[0]  # (H, T, d)
    rows = []
    for start, stop in zip(cu_seq_lens_q[:-1].tolist(), cu_seq_lens_q[1:].tolist()):
        for place in range(start, stop):
            first = start if sliding_window is None else max(start, place + 1 - sliding_window)
            scores = query[0, :, place : place + 1] @ key[:, first : place + 1].mT * scaling  # (H, 1, seen)
            rows.append(scores.softmax(-1) @ value[:, first : place + 1])
    return torch.cat(rows, 1).transpose(0, 1)[None], None


AttentionInterface.register("by_query", attention_by_query)


def packed_batch(num_lists: int = 2):
    """Lists of different lengths in one microbatch."""
    (batch,) = split_batch({"sequences": random_sequences("combined", num=num_lists)}, max_lists=10)
    return batch


def counted_reranker(family: str, checkpointing: float = 0.0) -> ListwiseReranker:
    """Create a tiny model whose attention torch's counter can count."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]), attn_implementation="sdpa")
    checkpoint_activations(model, checkpointing)
    reranker = ListwiseReranker(model, None, Objective("combined"))
    model.config._attn_implementation = "by_query"
    return reranker


def rotary_flops(batch) -> int:
    """Operations that torch counts and we do not: the (d / 2) frequencies times T positions, once per forward pass."""
    return 2 * (HEAD_DIM // 2) * batch["input_ids"].shape[1]


@pytest.mark.parametrize("family", ["mistral", "mistral_windowed", "mistral_tied", "llama", "qwen3"])
def test_flops_equal_torchs_counter(family):
    batch = packed_batch()
    reranker = counted_reranker(family)
    sizes = reranker.config, batch["lengths"], len(batch["logit_positions"])
    with FlopCounterMode(display=False) as forward:
        logits = reranker(batch)["logits"]
    assert forward.get_total_flops() == forward_flops(*sizes) + rotary_flops(batch)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert backward.get_total_flops() == 2 * forward_flops(*sizes)
    assert training_flops(*sizes) == 3 * forward_flops(*sizes)


def test_models_with_and_without_windowed_layers():
    """Some of Qwen2's layers have a window; the count assumes it for all, so only attention is undercounted."""
    batch = packed_batch()
    reranker = counted_reranker("qwen2_windowed")
    with FlopCounterMode(display=False) as forward:
        reranker(batch)
    ours = forward_flops(reranker.config, batch["lengths"], len(batch["logit_positions"])) + rotary_flops(batch)
    assert 0.9 < ours / forward.get_total_flops() <= 1.0


def test_recomputed_activations_are_not_counted():
    """With every layer checkpointed, torch also counts each layer's second forward pass, except its last product, whose
    output no gradient needs."""
    batch = packed_batch()
    reranker = counted_reranker("mistral", checkpointing=1.0)
    config, lengths = reranker.config, batch["lengths"]
    with FlopCounterMode(display=False) as step:
        reranker(batch)["logits"].sum().backward()
    last_product = LAYERS * 2 * config.intermediate_size * HIDDEN * sum(lengths)
    recomputed = forward_flops(config, lengths, 0) - last_product
    useful = training_flops(config, lengths, len(batch["logit_positions"]))
    assert step.get_total_flops() == useful + recomputed + rotary_flops(batch)


def test_padding_is_not_counted():
    """The plain loop pads each list to the longest, and computes logits at every position."""
    batch = packed_batch(num_lists=5)
    lengths = batch["lengths"]
    reranker = counted_reranker("llama")
    packed = forward_flops(reranker.config, lengths, len(batch["logit_positions"]))
    reranker.model.config._attn_implementation = "eager"
    padded = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    with FlopCounterMode(display=False) as plain:
        reranker.model(input_ids=padded, attention_mask=torch.ones_like(padded))
    computed = padded.numel()
    square_attention = 4 * LAYERS * HEADS * HEAD_DIM * len(lengths) * max(lengths) ** 2
    head = 2 * HIDDEN * VOCABULARY * computed
    linear = 2 * layer_matmul_parameters(reranker.config) * computed
    rotary = 2 * (HEAD_DIM // 2) * max(lengths)  # once for all lists
    assert plain.get_total_flops() == linear + square_attention + head + rotary
    assert packed < 0.65 * plain.get_total_flops()


def test_flops_computed_by_hand():
    """SmolLM2-135M's shape: 3.54 M weights per layer in matrix products, 106.2 M in total, 28.3 M in the head."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    # query and output 576 * 576 each, key and value 576 * 192 each, gate, up and down 576 * 1536 each
    layer = 2 * 331_776 + 2 * 110_592 + 3 * 884_736
    assert layer_matmul_parameters(config) == 30 * layer == 106_168_320
    # lists of 3 and 2 tokens: query-key pairs 1 + 2 + 3 and 1 + 2; 4 * 576 operations per pair in each of 30 layers
    expected = 2 * 106_168_320 * 5 + 30 * 4 * 576 * 9 + 2 * 576 * 49152 * 4
    assert forward_flops(config, [3, 2], 4) == expected
    assert training_flops(config, [3, 2], 4) == 3 * expected


def test_flops_of_a_device_batch_are_those_of_its_microbatches():
    sequences = random_sequences("combined")
    reranker = counted_reranker("mistral")
    parts = [
        training_flops(reranker.config, batch["lengths"], len(batch["logit_positions"]))
        for batch in split_batch({"sequences": sequences}, max_lists=2)
    ]
    assert reranker.flops_per_batch({"sequences": sequences}) == sum(parts)


def test_the_training_log_has_the_flops_of_each_update():
    """Composer's SpeedMonitor logs the FLOPs of all microbatches of an update; MFU divides their rate by the GPU's."""
    batches = [{"sequences": random_sequences("combined", num=num)} for num in (4, 3, 5)]
    reranker, logger = counted_reranker("mistral"), InMemoryLogger()
    reranker.model.config._attn_implementation = "packed_sdpa"
    loader = DataLoader(batches, batch_size=None)
    trainer = Trainer(
        model=reranker,
        train_dataloader=DataSpec(
            loader,
            split_batch=lambda batch, _: split_batch(batch, max_lists=2),
            get_num_samples_in_batch=num_samples_in_batch,
            get_num_tokens_in_batch=num_tokens_in_batch,
        ),
        max_duration="3ba",
        optimizers=torch.optim.AdamW(reranker.parameters()),
        callbacks=[SpeedMonitor(window_size=2, gpu_flops_available=1e9)],
        loggers=[logger],
        device="cpu",
        device_train_microbatch_size=2,
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    logged = {name: entries[-1][1] for name, entries in logger.data.items() if name.startswith("throughput")}
    seconds = 2 / logged["throughput/batches_per_sec"]  # of the last two updates
    lengths = [[len(s.encoded.input_ids) for s in batch["sequences"]] for batch in batches[1:]]
    responses = [[4 * len(s.encoded.ranks) for s in batch["sequences"]] for batch in batches[1:]]
    flops = sum(training_flops(reranker.config, some, sum(rows)) for some, rows in zip(lengths, responses))
    assert logged["throughput/flops_per_sec"] * seconds == pytest.approx(flops, rel=1e-6)
    assert logged["throughput/device/mfu"] * seconds * 1e9 == pytest.approx(flops, rel=1e-6)
    assert logged["throughput/tokens_per_sec"] * seconds == pytest.approx(sum(map(sum, lengths)), rel=1e-6)
