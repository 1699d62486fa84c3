"""A Hugging Face causal LM as a Composer model for listwise reranking."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from composer.models import HuggingFaceModel
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rankllm_composer.model.attention import choose_attention
from rankllm_composer.model.flops import forward_flops, training_flops
from rankllm_composer.model.objective import Objective

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase


def decoder_layers(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the transformer layers of a causal LM, first to last, with or without PEFT."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_activations(model: PreTrainedModel, fraction: float) -> None:
    """Recompute the activations of a fraction (0 to 1) of the layers in the backward pass, spread over the depth."""
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"model.activation_checkpointing is {fraction}; expected a fraction from 0 to 1.")
    if fraction == 0.0:
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for index, layer in enumerate(decoder_layers(model)):
        layer.gradient_checkpointing = int((index + 1) * fraction + 1e-9) > int(index * fraction + 1e-9)


class ListwiseReranker(HuggingFaceModel):
    """Computes packed forward passes, logits only where the loss needs them, and the loss of an objective.

    Args:
        model: any decoder-only HF causal LM whose forward accepts `logits_to_keep` (Mistral, Llama, Qwen, …).
        tokenizer: its tokenizer; saved with checkpoints.
        objective: the training objective.
        attention: "auto", "flash_attention_2" or "packed_sdpa".
        device: device of the forward pass, "gpu" or "cpu".
        bf16_on_cpu: use PyTorch's autocast to bfloat16 on a CPU, where Composer's `amp_bf16` has no effect.
        peft_config: a PEFT LoRA configuration. None = train all weights.
    Raises:
        ValueError: the attention cannot run on this device, or the tokenizer has more tokens than the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        objective: Objective,
        *,
        attention: str = "auto",
        device: str = "cpu",
        bf16_on_cpu: bool = False,
        peft_config: PeftConfig | None = None,
    ) -> None:
        model.config._attn_implementation = choose_attention(attention, device)
        model.config.use_cache = False
        super().__init__(model, tokenizer, use_logits=True, metrics=[], peft_config=peft_config)  # type: ignore[arg-type]
        self.objective = objective
        self.bf16_on_cpu = bf16_on_cpu
        layer_types = {type(layer) for layer in decoder_layers(self.model)}
        self.model.fsdp_wrap_fn = lambda module: type(module) in layer_types  # type: ignore[assignment]

    def compile_layers(self) -> None:
        """Compile each decoder layer."""
        for layer in decoder_layers(self.model):
            layer.compile()

    def get_metadata(self) -> dict[str, Any]:
        """Return what Composer adds to a checkpoint about config and tokenizer: nothing, as the recipe names both.

        Composer would save the tokenizer into every checkpoint, and fails on one with several chat templates.
        """
        return {}

    @property
    def output_head(self) -> torch.nn.Module:
        return self.model.get_output_embeddings()

    @contextmanager
    def _head_rows(self, token_ids: torch.Tensor) -> Iterator[None]:
        """In this context the LM head computes only the rows of these (C,) tokens: (…, D) → (…, C)."""
        head = self.output_head
        bias: torch.Tensor | None = getattr(head, "bias", None)

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            weight: torch.Tensor = head.weight  # type: ignore[assignment]  # read here: under FSDP2 it is unsharded only now
            return F.linear(hidden, weight[token_ids], None if bias is None else bias[token_ids])

        head.forward = forward
        try:
            yield
        finally:
            del head.forward

    def forward(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Run the model on a microbatch of `packing.split_batch` and return {"logits": (R, V)}.

        For `ranking` the logits are (R, C), with C the number of distinct identifiers in the batch, to which the key
        "identifier_columns" is added: (S, N) columns of the logits.
        """
        call = functools.partial(
            self.model,
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            cu_seq_lens_q=batch["cu_seqlens"],
            cu_seq_lens_k=batch["cu_seqlens"],
            max_length_q=max(batch["lengths"]),
            max_length_k=max(batch["lengths"]),
            logits_to_keep=batch["logit_positions"],
            use_cache=False,
        )
        with torch.autocast("cpu", torch.bfloat16) if self.bf16_on_cpu else nullcontext():
            if self.objective.trains_language_modelling or not batch["record_ids"]:
                logits = call().logits
            else:
                token_ids, columns = torch.unique(batch["identifier_token_ids"], return_inverse=True)
                batch["identifier_columns"] = columns  # type: ignore[index]
                with self._head_rows(token_ids):
                    logits = call().logits
        return {"logits": logits[0]}

    def loss(  # type: ignore[override]  # the Trainer logs the values of a dict by name
        self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Return the losses of the objective; Composer minimizes `total` and logs all."""
        return self.objective(outputs["logits"], batch)

    def eval_forward(self, batch: Mapping[str, Any], outputs: Any | None = None) -> Any:
        """Run `forward`; called by the Trainer's evaluation."""
        return self.forward(batch) if outputs is None else outputs

    def flops_per_batch(self, batch: Mapping[str, Any]) -> int:
        """Return the FLOPs of forward and backward on a device batch, for Composer's SpeedMonitor."""
        encoded = [row.encoded for row in batch["sequences"] if row.encoded is not None]
        lengths = [len(item.input_ids) for item in encoded]
        num_logits = sum(max(1, length - item.response_start) for length, item in zip(lengths, encoded))
        if all(weight.requires_grad for weight in self.model.parameters()):
            return training_flops(self.config, lengths, num_logits)
        # Frozen weights need no weight gradient, which is a third of the products.
        return 2 * forward_flops(self.config, lengths, num_logits)
