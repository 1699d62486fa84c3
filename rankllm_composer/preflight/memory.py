"""How much memory a rank will need: the real model and the real FSDP2 wrapping, run once on tensors without data.

A process group that sends nothing stands in for any number of ranks, fake tensors for the weights, so a 7B model on 512
ranks is planned on a laptop. Every allocation of a forward and backward pass is entered in a ledger with its purpose.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

import numpy as np
import torch
import torch.distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AutoModelForCausalLM

from rankllm_composer.data import packing
from rankllm_composer.model.losses import Objective
from rankllm_composer.model.reranker import ListwiseReranker
from rankllm_composer.preflight.ledger import PARTS, Ledger
from rankllm_composer.prompts.encoding import EncodedRecord

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PretrainedConfig

FLASH_STAND_IN = "flash_attention_without_data"


@dataclass(frozen=True)
class Workload:
    """What one rank computes and holds.

    Attributes:
        config: the HF configuration of the model.
        objective: what is trained.
        lengths: tokens of each list of the fullest microbatch.
        num_targets: response tokens of each list.
        num_candidates: of each list.
        num_ranks: over which weights are sharded, or copied.
        accumulates: True = an update takes several microbatches, so gradients are there while activations are.
        fsdp: True = sharded with FSDP2, False = copied (DDP).
        reshard_after_forward, mixed_precision: as FSDP2Config takes them.
        precision: "fp32" or "amp_bf16".
        activation_checkpointing: share of the layers that are computed again.
        attention: "flash_attention_2" or "packed_sdpa".
        optimizer: "adamw" or "adamw_8bit".
        peft_config: of the adapters; None = all weights are trained.
        frozen_precision: "fp32" or "bf16", of the weights that adapters change.
    """

    config: PretrainedConfig
    objective: Objective
    lengths: tuple[int, ...]
    num_targets: int = 80
    num_candidates: int = 20
    num_ranks: int = 1
    accumulates: bool = True
    fsdp: bool = True
    reshard_after_forward: bool = True
    mixed_precision: str = "DEFAULT"
    precision: Literal["fp32", "amp_bf16"] = "amp_bf16"
    activation_checkpointing: float = 0.0
    attention: Literal["flash_attention_2", "packed_sdpa"] = "flash_attention_2"
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    peft_config: PeftConfig | None = None
    frozen_precision: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        at_peak: bytes of each of PARTS at the moment that most are in use.
        held: bytes of weights, whole gradients and optimizer state: what there is at an update.
        num_parameters: of the whole model, and of these trained.
    """

    at_peak: dict[str, int]
    held: dict[str, int]
    num_parameters: int
    num_trained: int

    @property
    def peak(self) -> int:
        """Most bytes in use at once."""
        return max(sum(self.at_peak.values()), sum(self.held.values()))


class _FlashAttention(torch.autograd.Function):
    """The tensors that flash-attn's variable-length kernels make, without what is in them.

    Source:
        Dao-AILab/flash-attention 2.7, csrc/flash_attn/flash_api.cpp: mha_varlen_fwd, mha_varlen_bwd.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_sequences: int
    ) -> torch.Tensor:
        total, num_heads, _ = query.shape
        output = torch.empty_like(query, memory_format=torch.contiguous_format)  # (T, H, d)
        normaliser = query.new_empty((num_heads, total), dtype=torch.float32)
        ctx.num_sequences = num_sequences
        ctx.save_for_backward(query, key, value, output, normaliser)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        total, num_heads, head_dim = query.shape
        padded = total + 128 * ctx.num_sequences
        made = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)]
        temporary = [
            query.new_empty((num_heads, padded), dtype=torch.float32),
            query.new_empty((padded, num_heads, -(-head_dim // 32) * 32), dtype=torch.float32),
        ]
        if key.shape[1] != num_heads:
            temporary += [torch.empty_like(made[0]), torch.empty_like(made[0])]
        del temporary
        return *made, None


def _flash_stand_in(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **arguments: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature; (1, H, T, d) → (1, T, H, d)."""
    halves = [
        tensor[0].transpose(0, 1).to(torch.bfloat16) if tensor.dtype == torch.float32 else tensor[0].transpose(0, 1)
        for tensor in (query, key, value)
    ]
    return _FlashAttention.apply(*halves, len(arguments["cu_seq_lens_q"]) - 1)[None], None


class _Bounds(list):  # type: ignore[type-arg]
    """Cumulative lengths that can be read where tensors hold no data."""

    def tolist(self) -> list[int]:
        return list(self)


@contextlib.contextmanager
def _silent_ranks(num_ranks: int) -> Iterator[DeviceMesh]:
    """A process group of any size in which this process is rank 0 and nothing is sent."""
    import torch.distributed._tools.fake_collectives  # teaches fake tensors the collectives
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.distributed.is_initialized():
        raise ValueError(
            "plan: found a process group in this process, allowed is none; plan in a process that does not train"
        )
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield init_device_mesh("cpu", (num_ranks,))
    finally:
        torch.distributed.destroy_process_group()


def plan_memory(work: Workload) -> Memory:
    """Memory of one rank in an update after the first, at its fullest.

    The optimizer's state is laid out, not computed. Not in it: what CUDA and NCCL take for themselves, fragments, noise
    on the embeddings, and what torch.compile saves or adds.

    Raises:
        ValueError: this process has a process group already.
    """
    with _without_remarks(), _silent_ranks(work.num_ranks) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        ledger = Ledger()
        model = _build(work, mesh)
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.book(tensor, "weights")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with ledger, _booked_by_part(ledger, model):
            batch = _microbatch(work)
            outputs = _pass(ledger, model, batch, work) if work.accumulates else None
            with ledger.booking("optimizer"):
                state = [_optimizer_state(parameter, work.optimizer) for parameter in trained]
            if not work.fsdp and work.num_ranks > 1:  # DDP copies gradients into buckets
                with ledger.booking("buffers"):
                    state.append([torch.empty_like(parameter) for parameter in trained])
            outputs = _pass(ledger, model, batch, work)
        held = {part: ledger.bytes_of[part] for part in ("weights", "gradients", "optimizer")}
        if not work.fsdp:
            held["buffers"] = ledger.bytes_of["buffers"]
        del outputs, state
        return Memory(
            at_peak={part: ledger.at_peak[part] for part in PARTS},
            held=held,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            num_trained=sum(parameter.numel() for parameter in trained),
        )


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Without what Composer says of a missing tokenizer and of FSDP2's age: a plan is about neither."""
    log = logging.getLogger("composer.models.huggingface")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FSDP2 Config/APIs are experimental")
            yield
    finally:
        log.setLevel(level)


def _build(work: Workload, mesh: DeviceMesh) -> ListwiseReranker:
    from composer.core.precision import Precision
    from composer.distributed.fsdp2 import prepare_fully_shard
    from composer.distributed.fsdp2_utils import generate_composer_model_policy
    from composer.utils.parallelism import FSDP2Config

    dtype = torch.bfloat16 if work.frozen_precision == "bf16" else torch.float32
    model = ListwiseReranker(
        AutoModelForCausalLM.from_config(work.config).to(dtype).train(),
        None,
        work.objective,
        attention="packed_sdpa",
        activation_checkpointing=work.activation_checkpointing,
        peft_config=work.peft_config,
    )
    if work.attention == "flash_attention_2":
        AttentionInterface.register(FLASH_STAND_IN, _flash_stand_in)
        model.config._attn_implementation = FLASH_STAND_IN
    if work.fsdp:
        prepare_fully_shard(
            model,
            FSDP2Config(
                device_mesh=mesh,
                reshard_after_forward=work.reshard_after_forward,
                mixed_precision=work.mixed_precision,
            ),
            Precision(work.precision),
            generate_composer_model_policy(model),
        )
    return model


def lists_without_content(work: Workload) -> list[packing.Sequence]:
    """Lists of the workload's lengths, to be packed as one microbatch."""
    rows = []
    for number, length in enumerate(work.lengths):
        candidates = np.arange(work.num_candidates)
        start = length if work.objective.name == "ranking" else max(1, length - work.num_targets)
        place = min(start, length - 1)
        encoded = EncodedRecord(np.zeros(length, np.int32), start, place, candidates.astype(np.int32), candidates)
        rows.append(packing.Sequence(encoded, f"list {number}", number))
    return rows


def _microbatch(work: Workload) -> dict[str, Any]:
    batch = packing.pack(lists_without_content(work))
    batch["cu_seqlens"] = _Bounds([0, *np.cumsum(work.lengths).tolist()])
    batch["language_modelling_scale"] = batch["ranking_scale"] = 1.0
    return batch


def _pass(ledger: Ledger, model: ListwiseReranker, batch: dict[str, Any], work: Workload) -> Any:
    """Forward and backward as the Trainer runs them: outputs live until the next forward."""

    def unique(values: torch.Tensor, return_inverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(work.num_candidates, dtype=values.dtype), torch.zeros_like(values)

    amp = torch.autocast("cpu", torch.bfloat16, enabled=work.precision == "amp_bf16")
    with amp, mock.patch.object(torch, "unique", unique):  # how many differ is known; there is no data to count them
        outputs = model(batch)
        ledger.part = "logits"
        loss = model.loss(outputs, batch)["total"]
    loss.backward()
    ledger.part = "activations"
    return outputs


def _optimizer_state(parameter: torch.nn.Parameter, optimizer: str) -> list[torch.Tensor]:
    """The state of one weight's shard.

    Source:
        torch.optim.AdamW: two averages in the weight's type and a float32 step. bitsandbytes.optim.AdamW8bit: averages
        in one byte an element with a float32 maximum a block of 256, and 256 float32 quantiles each; float32 averages
        for weights below 4,096 elements.
    """
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
    if optimizer == "adamw_8bit" and local.numel() >= 4096:
        blocks = -(-local.numel() // 256)
        return [
            torch.empty(size, dtype=kind)
            for size, kind in ((local.numel(), torch.uint8), (blocks, torch.float32), (256, torch.float32)) * 2
        ]
    return [torch.empty_like(local), torch.empty_like(local), torch.empty((), dtype=torch.float32)]


@contextlib.contextmanager
def _booked_by_part(ledger: Ledger, model: ListwiseReranker) -> Iterator[None]:
    """While open, the ledger knows logits, gathered weights and gradients from other activations."""

    def gathering(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def booked(group: FSDPParamGroup, *args: Any, **kwargs: Any) -> Any:
            with ledger.booking("buffers"):
                result = method(group, *args, **kwargs)
            for item in group.fsdp_params:
                ledger.book(item.sharded_param.grad, "gradients")
                unsharded = getattr(item, "_unsharded_param", None)
                if unsharded is not None and unsharded.requires_grad and id(unsharded) not in watched:
                    watched.add(id(unsharded))  # FSDP2 keeps it for good
                    unsharded.register_post_accumulate_grad_hook(lambda weight: ledger.book(weight.grad, "buffers"))
            return result

        return booked

    def before_head(_: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        ledger.part = "logits"
        if inputs[0].requires_grad:
            inputs[0].register_hook(after_head_gradient)

    def after_head_gradient(_: torch.Tensor) -> None:
        ledger.part = "activations"

    def after_head(*_: Any) -> None:
        ledger.part = "activations"

    watched: set[int] = set()
    with contextlib.ExitStack() as undo:
        for name in ("unshard", "wait_for_unshard", "post_backward"):
            undo.enter_context(mock.patch.object(FSDPParamGroup, name, gathering(getattr(FSDPParamGroup, name))))
        for parameter in model.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                handle = parameter.register_post_accumulate_grad_hook(
                    lambda weight: ledger.book(weight.grad, "gradients")
                )
                undo.callback(handle.remove)
        undo.callback(model.output_head.register_forward_pre_hook(before_head).remove)
        undo.callback(model.output_head.register_forward_hook(after_head).remove)
        yield
