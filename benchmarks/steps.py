"""The two training steps that are compared: ours, and a plain Hugging Face loop that works as the published one does.

Both train the combined objective of FirstMistral, LM + 10 × weighted RankNet, on the same lists with the same fused
AdamW. Its learning rate is 0: the arithmetic is that of any other, and the weights stay, so that losses can be compared
after any number of steps.
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
    """Right-padded to the longest list, logits at every place, then list by list and pair by pair, as published.

    The LM part takes the log-softmax of all logits but the last place's, and its sum over the vocabulary besides, for a
    label smoothing of 0 that counts all the same; scores are read from the full logits at each list's score position.
    Attention is transformers' default where flash-attn is absent, SDPA, and causal as flash-attn's in the published
    runs: no real token sees the padding after it. A padding mask of ones says so; with a true one, or none at all,
    transformers 4.53 would make an (L, L) mask, and SDPA would compute both halves of it.
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
    surprise = -F.log_softmax(shifted, dim=-1)
    is_target = targets != -100
    per_token = surprise.gather(-1, targets.clamp(min=0)[..., None])[..., 0].where(is_target, 0.0)
    smoothing = surprise.sum(-1, dtype=torch.float32).where(is_target, 0.0).sum()
    language_modelling = per_token.sum() / is_target.sum() + SMOOTHING * smoothing
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
    return language_modelling + RANKING_WEIGHT * torch.stack(list_losses).mean()


def packed_loss(reranker: ListwiseReranker, lists: list[TokenizedList]) -> torch.Tensor:
    """All lists as one packed microbatch of ours."""
    (batch,) = split_batch({"sequences": lists}, max_lists=len(lists))
    return reranker.loss(reranker(batch), batch)["total"]


@dataclass
class Stepper:
    """A model, its optimizer and the loss that one of the two steps computes."""

    model: torch.nn.Module
    loss: Callable[[torch.nn.Module, list[TokenizedList]], torch.Tensor]
    optimizer: torch.optim.Optimizer

    def __call__(self, lists: list[TokenizedList]) -> tuple[float, float]:
        """One optimizer step. Returns seconds and the loss.

        Seconds are of CPU time where there is one thread: others on the machine then change them little.
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
    """A step ready to run.

    Args:
        kind: "plain" or "packed".
        model: from `workload.new_model`.
        activation_checkpointing: share of layers whose activations are recomputed.
        compile_layers: torch.compile of each layer; packed only.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    checkpoint_activations(model, activation_checkpointing)
    if kind == "plain":
        return Stepper(model, plain_loss, optimizer)
    reranker = ListwiseReranker(model, None, Objective("combined", ranking_weight=RANKING_WEIGHT))
    if compile_layers:
        reranker.compile_layers()
    return Stepper(reranker, packed_loss, optimizer)
