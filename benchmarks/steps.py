"""The training steps that are compared: the packed step, and a plain Hugging Face loop like the published one.

All train FirstMistral's combined objective, LM + 10 × weighted RankNet, on the same lists with the same fused AdamW.
The learning rate is 0: the arithmetic is the same as for any other rate, but the weights do not change, so losses can
be compared after any number of steps. "plain" computes the loss as the published code does; "short plain" computes the
same in fewer operations, for a GPU, where each operation has a fixed cost.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from rankllm_composer.data.packing import TokenizedList, split_batch
from rankllm_composer.model.losses import ranknet_loss
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.reranker import ListwiseReranker, checkpoint_activations

RANKING_WEIGHT = 10.0
SMOOTHING = 0.0
STEPS = ("plain", "packed")


def recipe_device(device: torch.device | str) -> str:
    """Return a device's name in recipes, "gpu" or "cpu"."""
    return "gpu" if torch.device(device).type == "cuda" else "cpu"


def padded(lists: list[TokenizedList], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad lists on the right to the longest; return input ids and labels, both (B, L), with -100 for no label."""
    longest = max(len(item.encoded.input_ids) for item in lists)
    input_ids = torch.zeros(len(lists), longest, dtype=torch.int64)
    labels = torch.full_like(input_ids, -100)
    for row, item in enumerate(lists):
        ids = torch.from_numpy(item.encoded.input_ids).long()
        input_ids[row, : len(ids)] = ids
        labels[row, item.encoded.response_start : len(ids)] = ids[item.encoded.response_start :]
    return input_ids.to(device), labels.to(device)


def all_logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Compute the logits of every position, (B, L, V).

    Attention is the model's, SDPA by default, and causal, like flash-attn in the published runs: no real token attends
    to the padding after it. The attention mask is all ones, because with a real padding mask, or none, transformers
    4.53 would build an (L, L) mask, and SDPA would compute both halves of it.
    """
    return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits


def plain_loss(model: PreTrainedModel, lists: list[TokenizedList]) -> torch.Tensor:
    """Compute the loss as the published code does: padded lists, logits at every position, loops over lists and pairs.

    The LM part computes the log-softmax of all logits except those of the last position, and its sum over the
    vocabulary for label smoothing, even though the smoothing is 0. Scores are read from the full logits at each list's
    score position.
    """
    input_ids, labels = padded(lists, model.device)
    logits = all_logits(model, input_ids)
    shifted, targets = logits[:, :-1].contiguous(), labels[:, 1:]
    nll = -F.log_softmax(shifted, dim=-1)
    is_target = targets != -100
    per_token = nll.gather(-1, targets.clamp(min=0)[..., None])[..., 0].where(is_target, 0.0)
    smoothing = nll.sum(-1, dtype=torch.float32).where(is_target, 0.0).sum()
    language_modeling = per_token.sum() / is_target.sum() + SMOOTHING * smoothing
    list_losses = []
    for row, item in enumerate(lists):
        token_ids = torch.from_numpy(item.encoded.identifier_token_ids).long()
        scores = logits[row, item.encoded.score_position][token_ids]
        pair_losses = [
            F.softplus(scores[worse] - scores[better]) / float(2 + ranks[better] + ranks[worse])
            for ranks in [item.encoded.ranks]
            for better, worse in itertools.permutations(range(len(ranks)), 2)
            if ranks[better] < ranks[worse]
        ]
        list_losses.append(torch.stack(pair_losses).mean())
    return language_modeling + RANKING_WEIGHT * torch.stack(list_losses).mean()


def short_plain_loss(model: PreTrainedModel, lists: list[TokenizedList]) -> torch.Tensor:
    """Compute the loss of `plain_loss` with torch's cross-entropy and all lists and pairs at once."""
    input_ids, labels = padded(lists, model.device)
    logits = all_logits(model, input_ids)
    language_modeling = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    rows = torch.arange(len(lists), device=model.device)
    places = torch.tensor([item.encoded.score_position for item in lists]).to(model.device)
    columns = torch.stack([torch.from_numpy(item.encoded.identifier_token_ids).long() for item in lists])
    ranks = torch.stack([torch.from_numpy(item.encoded.ranks) for item in lists]).to(model.device)
    scores = logits[rows, places].gather(1, columns.to(model.device))
    return language_modeling + RANKING_WEIGHT * ranknet_loss(scores, ranks)


def microbatch(lists: list[TokenizedList], device: torch.device | str) -> dict[str, Any]:
    """Pack lists into one microbatch on a device."""
    (batch,) = split_batch({"sequences": lists}, max_lists=len(lists))
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def packed_loss(reranker: ListwiseReranker, lists: list[TokenizedList]) -> torch.Tensor:
    """Compute the loss of all lists as one packed microbatch."""
    batch = microbatch(lists, next(reranker.parameters()).device)
    return reranker.loss(reranker(batch), batch)["total"]


def shard(reranker: ListwiseReranker) -> None:
    """Wrap a model in FSDP2 with bfloat16 parameters, as recipes do, over the ranks of the process group."""
    from composer.core.precision import Precision
    from composer.distributed.fsdp2 import prepare_fully_shard
    from composer.distributed.fsdp2_utils import generate_composer_model_policy
    from composer.utils.parallelism import FSDP2Config
    from torch.distributed.device_mesh import init_device_mesh

    device = next(reranker.parameters()).device.type
    config = FSDP2Config(device_mesh=init_device_mesh(device, (torch.distributed.get_world_size(),)))
    prepare_fully_shard(reranker, config, Precision("amp_bf16"), generate_composer_model_policy(reranker))


PLAIN_LOSSES = {"plain": plain_loss, "short plain": short_plain_loss}


@dataclass
class Stepper:
    """A model, its optimizer, the loss function of a step, and whether it runs under autocast to bfloat16."""

    model: torch.nn.Module
    loss: Callable[[torch.nn.Module, list[TokenizedList]], torch.Tensor]
    optimizer: torch.optim.Optimizer
    bf16: bool = False

    def run(self, lists: list[TokenizedList]) -> torch.Tensor:
        """Run one optimizer step, without waiting for the device; return the loss."""
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16) if self.bf16 else nullcontext():
            loss = self.loss(self.model, lists)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def __call__(self, lists: list[TokenizedList]) -> tuple[float, float]:
        """Run one optimizer step; return its seconds and the loss.

        With one thread, CPU time is measured, which depends little on other processes of the machine.
        """
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        started = clock()
        loss = float(self.run(lists))
        return clock() - started, loss


def new_stepper(
    kind: str,
    model: PreTrainedModel,
    *,
    activation_checkpointing: float = 0.0,
    keeps_attention: bool = False,
    compile_layers: bool = False,
    attention: str = "auto",
    bf16: bool = False,
    sharded: bool = False,
) -> Stepper:
    """Create one of the steps.

    Args:
        kind: "plain", "short plain" or "packed".
        model: from `workload.new_model`.
        activation_checkpointing: share of layers whose activations are recomputed.
        keeps_attention: keep the output of attention in these layers.
        compile_layers: compile each layer with torch.compile; packed only.
        attention: of the packed step, as in a recipe.
        bf16: whether to run under autocast to bfloat16.
        sharded: wrap the model in FSDP2 with bfloat16 parameters; packed only. Needs a process group.
    """
    checkpoint_activations(model, activation_checkpointing, keeps_attention)
    loss, trained = PLAIN_LOSSES.get(kind, packed_loss), model
    if kind == "packed":
        objective = Objective("combined", ranking_weight=RANKING_WEIGHT)
        device = recipe_device(model.device)
        trained = ListwiseReranker(model, None, objective, attention=attention, device=device)
        if compile_layers:
            trained.compile_layers()
        if sharded:
            shard(trained)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    return Stepper(trained, loss, optimizer, bf16)
