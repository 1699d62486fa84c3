"""Predict the memory of one rank: one training update of the real model under FSDP2, on tensors without data.

Fake tensors stand in for the weights and a fake process group for the other ranks, so a plan for 7 billion parameters
on 512 ranks takes one CPU process. Nothing is computed; torch's memory trackers record what would be allocated.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rankllm_composer.data import packing
from rankllm_composer.errors import RunError
from rankllm_composer.model.attention import PACKED_SDPA, kernel_problem
from rankllm_composer.model.loading import new_causal_lm
from rankllm_composer.model.lora import check_adapter_names
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.reranker import ListwiseReranker, checkpoint_activations
from rankllm_composer.preflight.layers import FewLayers
from rankllm_composer.preflight.tracking import MemoryTracker, ReplicaTracker, ShardTracker
from rankllm_composer.prompts.encoding import EncodedRecord

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PretrainedConfig

FAKE_KERNEL = "allocations_of_a_kernel"  # transformers 5 loads a package for any name with "flash"


@dataclass(frozen=True)
class Workload:
    """What one rank holds and computes, with settings named as in a recipe."""

    config: PretrainedConfig
    objective: Objective
    lengths: tuple[int, ...]  # tokens of each list in the largest microbatch
    num_targets: int = 80  # response tokens per list
    num_candidates: int = 20
    num_ranks: int = 1
    accumulates: bool = True  # several microbatches per update: gradients exist while activations do
    fsdp: bool = True
    reshard_after_forward: bool = True
    mixed_precision: str = "DEFAULT"
    precision: Literal["fp32", "amp_bf16"] = "amp_bf16"
    activation_checkpointing: float = 0.0
    keeps_attention: bool = False
    attention: Literal["packed_varlen", "packed_sdpa", "flash_attention_2"] = "packed_varlen"
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    peft_config: PeftConfig | None = None
    frozen_precision: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True)
class Memory:
    """Bytes per part that one rank allocates: when most memory is in use, and during the optimizer's step."""

    at_peak: dict[str, int]
    held: dict[str, int]
    num_parameters: int
    num_trained: int

    @property
    def peak(self) -> int:
        """Most bytes in use at once."""
        return max(sum(self.at_peak.values()), sum(self.held.values()))


def plan_memory(work: Workload, *, few_layers: bool = True) -> Memory:
    """Predict the memory of one rank during any update after the first, in a process without a process group.

    Args:
        few_layers: whether to run one of equal layers for all, in a fraction of the time; False = run all.

    Not included: what CUDA and NCCL allocate for themselves, fragmentation, embedding noise, and what torch.compile
    saves or adds.
    """
    quiet, fake = _quiet_composer(), FakeTensorMode(allow_non_fake_inputs=True)
    with quiet, _no_collections(), fake_process_group(work.num_ranks) as mesh, fake:
        model, layers = _build_model(work, mesh, few_layers)
        counted = layers.weights(model)
        weights = [(weight, times) for weight, times in counted if isinstance(weight, torch.nn.Parameter)]
        trained = [(weight, times) for weight, times in weights if weight.requires_grad]
        tracker = ShardTracker(model) if work.fsdp else ReplicaTracker(model)
        tracker.count_logits_of(model.output_head)
        with tracker:
            tracker.begin_at_layers(layers.kept)
            batch = _microbatch(work)
            outputs = _forward_and_backward(model, batch, work, tracker) if work.accumulates else None
            tracker.reset_mod_stats()
            outputs = _forward_and_backward(model, batch, work, tracker)
            tracker.end()
        del outputs
        left_out = sum((times - 1) * _shard(weight).nbytes for weight, times in counted)
        at_peak, at_update = layers.whole(tracker.sections, left_out)
        at_peak["optimizer"] = at_update["optimizer"] = sum(n * _optimizer_bytes(work, weight) for weight, n in trained)
        if not work.fsdp and work.num_ranks > 1:  # DDP copies gradients into buckets
            at_peak["buffers"] = at_update["buffers"] = sum(times * weight.nbytes for weight, times in trained)
        held = ("weights", "gradients", "optimizer") + (() if work.fsdp else ("buffers",))
        num_parameters = sum(times * weight.numel() for weight, times in weights)
        num_trained = sum(times * weight.numel() for weight, times in trained)
        return Memory(at_peak, {part: at_update[part] for part in held}, num_parameters, num_trained)


def _build_model(work: Workload, mesh: DeviceMesh, few_layers: bool) -> tuple[ListwiseReranker, FewLayers]:
    from composer.core.precision import Precision
    from composer.distributed.fsdp2 import prepare_fully_shard
    from composer.distributed.fsdp2_utils import generate_composer_model_policy
    from composer.utils.parallelism import FSDP2Config

    dtype = torch.bfloat16 if work.frozen_precision == "bf16" else torch.float32
    if work.peft_config is None:
        causal_lm = new_causal_lm(work.config, dtype).train()  # .to(dtype) fails on fake tensors
    else:
        causal_lm = _new_adapters(work.config, work.peft_config, dtype)
    checkpoint_activations(causal_lm, work.activation_checkpointing, work.keeps_attention)
    layers = FewLayers(causal_lm, few_layers)
    model = ListwiseReranker(causal_lm, None, work.objective, attention="packed_sdpa")
    if work.attention != "packed_sdpa":
        AttentionInterface.register(FAKE_KERNEL, partial(_fake_kernel, work.attention == "packed_varlen"))
        model.config._attn_implementation = FAKE_KERNEL
    if work.fsdp:
        reshard, mixed_precision = work.reshard_after_forward, work.mixed_precision
        config = FSDP2Config(device_mesh=mesh, reshard_after_forward=reshard, mixed_precision=mixed_precision)
        prepare_fully_shard(model, config, Precision(work.precision), generate_composer_model_policy(model))
    return model, layers


def _new_adapters(config: PretrainedConfig, peft_config: PeftConfig, dtype: torch.dtype) -> Any:
    """A model with adapters, built on the meta device: PEFT moves them by Module.to, which fails on fake tensors."""
    from peft import get_peft_model

    with unset_fake_temporarily(), torch.device("meta"):
        base = new_causal_lm(config, dtype).train()
        check_adapter_names(base, peft_config)
        model = get_peft_model(base, peft_config)
    made: dict[int, torch.Tensor] = {}  # by the weight that is replaced: some are shared
    for module in list(model.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            fake = torch.nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad)
            setattr(module, name, made.setdefault(id(weight), fake))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return model


def placeholder_lists(work: Workload) -> list[packing.TokenizedList]:
    """Lists with the workload's lengths and token id 0 everywhere, to pack as one microbatch."""
    rows = []
    for number, length in enumerate(work.lengths):
        candidates = np.arange(work.num_candidates)
        start = length if work.objective.name == "ranking" else max(1, length - work.num_targets)
        place = min(start, length - 1)
        encoded = EncodedRecord(np.zeros(length, np.int32), start, place, candidates.astype(np.int32), candidates)
        rows.append(packing.TokenizedList(encoded, f"list {number}", number))
    return rows


def _microbatch(work: Workload) -> dict[str, Any]:
    batch = packing.pack(placeholder_lists(work))
    batch["cu_seqlens"] = _ReadableBounds([0, *np.cumsum(work.lengths).tolist()])
    batch["language_modelling_scale"] = batch["ranking_scale"] = 1.0
    return batch


def _forward_and_backward(
    model: ListwiseReranker, batch: dict[str, Any], work: Workload, tracker: MemoryTracker
) -> dict[str, torch.Tensor]:
    """Process one microbatch as Composer's Trainer does; it keeps the outputs until the next forward pass."""
    tracker.begin(None)
    with torch.autocast("cpu", torch.bfloat16, enabled=work.precision == "amp_bf16"):
        outputs: dict[str, torch.Tensor] = model(batch)
        tracker.count_logits(True)
        loss = model.loss(outputs, batch)["total"]
    tracker.begin(None)  # without the weights that autocast had converted
    loss.backward()  # type: ignore[no-untyped-call]
    tracker.count_logits(False)
    return outputs


def _shard(weight: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _optimizer_bytes(work: Workload, weight: torch.Tensor) -> int:
    """Bytes of optimizer state for this rank's shard of a weight.

    Source:
        torch.optim.AdamW: two averages in the weight's type and a float32 step. bitsandbytes.optim.AdamW8bit: two
        averages of one byte per element, each with a float32 maximum per block of 256 and 256 float32 quantiles;
        float32 averages for weights below 4,096 elements.
    """
    shard = _shard(weight)
    if work.optimizer == "adamw_8bit" and shard.numel() >= 4096:
        num_blocks = -(-shard.numel() // 256)
        return 2 * (shard.numel() + 4 * num_blocks + 4 * 256)
    return 2 * shard.nbytes + 4


@contextlib.contextmanager
def fake_process_group(num_ranks: int) -> Iterator[DeviceMesh]:
    """Rank 0 of a process group of any size that sends nothing."""
    import torch.distributed._tools.fake_collectives  # registers the collectives for fake tensors
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.distributed.is_initialized():
        raise RunError("this process already has a process group. Plan in a process that does not train.")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield init_device_mesh("cpu", (num_ranks,))
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Leave tensors in reference cycles alone, which Python would free at one time or another."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _quiet_composer() -> Iterator[None]:
    """Silence Composer's warnings about the missing tokenizer and experimental FSDP2, which do not concern a plan."""
    log = logging.getLogger("composer.models.huggingface")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FSDP2 Config/APIs are experimental")
            yield
    finally:
        log.setLevel(level)


class _FlashAttentionAllocations(torch.autograd.Function):
    """The allocations of the variable-length kernels of torch and flash-attn, without the computation.

    Source:
        Dao-AILab/flash-attention 2.7, csrc/flash_attn/flash_api.cpp: mha_varlen_fwd, mha_varlen_bwd; the same in
        torch, aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_lists: int) -> torch.Tensor:
        output: torch.Tensor
        bounds, longest = query.new_empty(num_lists + 1, dtype=torch.int32), query.shape[0]
        # (T, H, d) and (H, T) float32; of this operation, as recomputed layers may keep its results.
        output, log_sum_exp, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, bounds, bounds, longest, longest, 0.0, True, False
        )
        ctx.num_lists = num_lists
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        total, num_heads, head_dim = query.shape
        padded = total + 128 * ctx.num_lists
        returned = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)]
        temporary = [
            query.new_empty((num_heads, padded), dtype=torch.float32),
            query.new_empty((padded, num_heads, -(-head_dim // 32) * 32), dtype=torch.float32),
        ]
        if key.shape[1] != num_heads:
            temporary += [torch.empty_like(returned[0]), torch.empty_like(returned[0])]
        del temporary
        return *returned, None


def _fake_kernel(
    falls_back: bool,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *others: Any,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Allocate what the kernel does, under transformers' attention signature; (1, H, T, d) → (1, T, H, d).

    Args:
        falls_back: whether what torch's kernel cannot compute goes to `packed_sdpa`.
    """
    if falls_back and kernel_problem(query, value, arguments.get("softcap")) is not None:
        packed: tuple[torch.Tensor, None] = ALL_ATTENTION_FUNCTIONS[PACKED_SDPA](
            module, query, key, value, *others, **arguments
        )
        return packed
    inputs = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    half = [tensor.to(torch.bfloat16) if tensor.dtype == torch.float32 else tensor for tensor in inputs]
    return _FlashAttentionAllocations.apply(*half, len(arguments["cu_seq_lens_q"]) - 1)[None], None  # type: ignore[no-untyped-call]


class _ReadableBounds(list):  # type: ignore[type-arg]
    """Cumulative lengths that the model can read, as it cannot read a fake tensor."""

    def tolist(self) -> list[int]:
        return list(self)
