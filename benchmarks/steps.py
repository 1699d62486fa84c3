"""The two training steps that are compared: the packed step, and a plain Hugging Face loop like the published one.

Both train FirstMistral's combined objective, LM + 10 × weighted RankNet, on the same lists with the same fused AdamW.
The learning rate is 0: the arithmetic is the same as for any other rate, but the weights do not change, so losses can
be compared after any number of steps.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from rankllm_composer.data.packing import TokenizedList, split_batch
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.reranker import ListwiseReranker, checkpoint_activations

RANKING_WEIGHT = 10.0
SMOOTHING = 0.0
STEPS = ("plain", "packed")


def plain_loss(model: PreTrainedModel, lists: list[TokenizedList]) -> torch.Tensor:
    """Compute the loss as the published code does: padded lists, logits at every position, loops over lists and pairs.

    Lists are padded on the right to the longest. The LM part computes the log-softmax of all logits except those of the
    last position, and its sum over the vocabulary for label smoothing, even though the smoothing is 0. Scores are read
    from the full logits at each list's score position. Attention is SDPA, transformers' default without flash-attn, and
    causal, like flash-attn in the published runs: no real token attends to the padding after it. The attention mask is
    all ones, because with a real padding mask, or none, transformers 4.53 would build an (L, L) mask, and SDPA would
    compute both halves of it.
    """
    longest = max(len(item.encoded.input_ids) for item in lists)
    input_ids = torch.zeros(len(lists), longest, dtype=torch.int64)  # (B, L)
    labels = torch.full_like(input_ids, -100)
    for row, item in enumerate(lists):
        ids = torch.from_numpy(item.encoded.input_ids).long()
        input_ids[row, : len(ids)] = ids
        labels[row, item.encoded.response_start : len(ids)] = ids[item.encoded.response_start :]
    logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits  # (B, L, V)
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


def packed_loss(reranker: ListwiseReranker, lists: list[TokenizedList]) -> torch.Tensor:
    """Compute the loss of all lists as one packed microbatch."""
    (batch,) = split_batch({"sequences": lists}, max_lists=len(lists))
    return reranker.loss(reranker(batch), batch)["total"]


@dataclass
class Stepper:
    """A model, its optimizer, and the loss function of one of the two steps."""

    model: torch.nn.Module
    loss: Callable[[torch.nn.Module, list[TokenizedList]], torch.Tensor]
    optimizer: torch.optim.Optimizer

    def __call__(self, lists: list[TokenizedList]) -> tuple[float, float]:
        """Run one optimizer step; return its seconds and the loss.

        With one thread, CPU time is measured, which depends little on other processes of the machine.
        """
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        started = clock()
        loss = self.loss(self.model, lists)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return clock() - started, float(loss)


def new_stepper(
    kind: str, model: PreTrainedModel, *, activation_checkpointing: float = 0.0, compile_layers: bool = False
) -> Stepper:
    """Create one of the two steps.

    Args:
        kind: "plain" or "packed".
        model: from `workload.new_model`.
        activation_checkpointing: share of layers whose activations are recomputed.
        compile_layers: compile each layer with torch.compile; packed only.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    checkpoint_activations(model, activation_checkpointing)
    if kind == "plain":
        return Stepper(model, plain_loss, optimizer)
    reranker = ListwiseReranker(model, None, Objective("combined", ranking_weight=RANKING_WEIGHT))
    if compile_layers:
        reranker.compile_layers()
    return Stepper(reranker, packed_loss, optimizer)
