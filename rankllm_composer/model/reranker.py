"""A Hugging Face causal LM as a Composer model for listwise reranking."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from composer.models import HuggingFaceModel
from composer.utils import dist
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rankllm_composer.errors import ModelError, counted
from rankllm_composer.model.attention import (
    OUR_ATTENTION,
    OWN_ATTENTION,
    AttentionCalls,
    choose_attention,
    watch_attention,
)
from rankllm_composer.model.experts import reach_all_experts
from rankllm_composer.model.flops import forward_flops, training_flops
from rankllm_composer.model.forward import head_rows, list_logits, num_layers
from rankllm_composer.model.lora import check_adapter_names
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.recomputation import keep_attention
from rankllm_composer.screen import say

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the transformer layers of a causal LM, first to last, with or without PEFT."""
    layers: list[torch.nn.Module] = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    names = set(getattr(model, "_no_split_modules", None) or ())  # of models with layers of an older kind
    return layers or [part for part in model.modules() if type(part).__name__ in names]


def checkpoint_activations(model: PreTrainedModel, fraction: float, keeps_attention: bool = False) -> None:
    """Recompute the activations of a fraction (0 to 1) of the layers in the backward pass, spread over the depth.

    Args:
        keeps_attention: keep the output of attention in these layers, and recompute the rest.
    Raises:
        ModelError: the fraction is out of range, or the layers cannot be recomputed.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ModelError(f"model.activation_checkpointing is {fraction}; expected a fraction from 0 to 1.")
    if fraction == 0.0:
        return
    layers = [layer for layer in decoder_layers(model) if isinstance(layer, GradientCheckpointingLayer)]
    if not model.supports_gradient_checkpointing or not layers:
        raise ModelError(
            f"model.activation_checkpointing is {fraction}, but {type(model).__name__} cannot recompute its layers; "
            "expected 0. Set model.activation_checkpointing=0."
        )
    options: dict[str, Any] = {"use_reentrant": False}
    if keeps_attention:
        options["context_fn"] = keep_attention
    model.gradient_checkpointing_enable(options)
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = int((index + 1) * fraction + 1e-9) > int(index * fraction + 1e-9)


class ListwiseReranker(HuggingFaceModel):
    """Computes packed forward passes, logits only where the loss needs them, and the loss of an objective.

    Args:
        model: a decoder-only HF causal LM that `self_check.check_model` accepts (Mistral, Llama, Qwen, …).
        tokenizer: its tokenizer; saved with checkpoints.
        objective: the training objective.
        attention: "auto", "packed_varlen", "packed_sdpa" or "flash_attention_2"; "sdpa" or "eager" = the model's own as
            it was built, which takes one list per forward pass.
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
        if attention not in OWN_ATTENTION:
            for config in (model.config, model.config.get_text_config()):
                config._attn_implementation = choose_attention(attention, device)
        model.config.use_cache = False
        if peft_config is not None:
            check_adapter_names(model, peft_config)
        super().__init__(
            model,
            tokenizer,  # type: ignore[arg-type]
            use_logits=True,
            metrics=[],
            peft_config=peft_config,
            # Composer's choice of an adapter's weights leaves out whole modules that are trained beside it.
            should_save_peft_only=not getattr(peft_config, "modules_to_save", None),
        )
        self.objective = objective
        self._is_counted = self._is_compiled = False
        self.bf16_on_cpu = bf16_on_cpu
        reach_all_experts(decoder_layers(self.model))
        layer_types = {type(layer) for layer in decoder_layers(self.model)}
        self.model.fsdp_wrap_fn = lambda module: type(module) in layer_types  # type: ignore[assignment]

    def compile_layers(self, **options: Any) -> None:
        """Compile each decoder layer; the options are those of `torch.compile`."""
        self._is_compiled = True
        for layer in decoder_layers(self.model):
            layer.compile(**options)

    def get_metadata(self) -> dict[str, Any]:
        """Return what Composer adds to a checkpoint about config and tokenizer: nothing, as the recipe names both.

        Composer would save the tokenizer into every checkpoint, and fails on one with several chat templates.
        """
        return {}

    @property
    def output_head(self) -> torch.nn.Module:
        return self.model.get_output_embeddings()

    def forward(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Run the model on a microbatch of `packing.split_batch` and return {"logits": (R, V)}.

        For `ranking` the logits are (R, C), those of `batch["scored_token_ids"]`.
        """
        if not self._is_counted:
            self._is_counted = True
            with watch_attention() as calls:
                logits = self._uncompiled_logits(batch) if self._is_compiled else self._logits(batch)
            self._check_attention(calls)
            if not self._is_compiled:
                return {"logits": logits}
        return {"logits": self._logits(batch)}

    def _logits(self, batch: Mapping[str, Any]) -> torch.Tensor:
        call = (self.model, batch["input_ids"], batch["position_ids"], batch["cu_seqlens"], batch["logit_positions"])
        of_all = self.objective.trains_language_modelling or not batch["record_ids"]
        with (
            torch.autocast("cpu", torch.bfloat16) if self.bf16_on_cpu else nullcontext(),
            nullcontext() if of_all else head_rows(self.model, batch["scored_token_ids"]),
        ):
            return list_logits(*call, batch["longest"])

    def _uncompiled_logits(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Run the layers uncompiled, in evaluation mode, so that no random number is drawn."""
        was_training = self.training
        self.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits = self._logits(batch)
        self.train(was_training)
        return logits

    def _check_attention(self, calls: AttentionCalls) -> None:
        """Check after the first forward pass that no layer of the real model has an attention of its own."""
        attention, expected = self.model.config._attn_implementation, num_layers(self.model.config)
        if attention in OUR_ATTENTION and calls.number != expected:
            raise ModelError(
                f"model.name_or_path: packed attention was called {counted(calls.number, 'time')} in {expected} "
                "layers; expected once per layer, or lists of a pack see each other. Set batch.packing=false."
            )
        if calls.fallbacks and dist.get_global_rank() == 0:
            say(
                f"model.attention: {attention} cannot be used, as {' and '.join(sorted(calls.fallbacks))}; packed_sdpa "
                "computes the attention, list by list"
            )

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
