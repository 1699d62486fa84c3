"""Train a tiny model with NEFTune and record the outputs of its input embedding."""

from __future__ import annotations

import numpy as np
import torch
from composer import DataSpec, Trainer
from composer.utils import dist
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from rankllm_composer.data.packing import TokenizedList, num_samples_in_batch, num_tokens_in_batch, split_batch
from rankllm_composer.model.neftune import NEFTune
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.reranker import ListwiseReranker, checkpoint_activations
from rankllm_composer.prompts.encoding import EncodedRecord

ALPHA, SEED = 5.0, 17


def new_model(objective: str = "combined", activation_checkpointing: float = 0.0, **options) -> ListwiseReranker:
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings="peft_config" not in options,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    checkpoint_activations(model, activation_checkpointing)
    return ListwiseReranker(model, None, Objective(objective), **options)


def new_lists(num: int) -> list[TokenizedList]:
    generator = np.random.default_rng(3)
    lists = []
    for index in range(num):
        num_candidates, prompt = int(generator.integers(2, 5)), int(generator.integers(5, 20))
        encoded = EncodedRecord(
            input_ids=generator.integers(0, 48, prompt + 2 * num_candidates).astype(np.int32),
            response_start=prompt,
            score_position=prompt,
            identifier_token_ids=np.arange(30, 30 + num_candidates, dtype=np.int32),
            ranks=generator.permutation(num_candidates),
        )
        lists.append(TokenizedList(encoded, f"list {index}", 1000 + index))
    return lists


def record_outputs(model: ListwiseReranker) -> list[torch.Tensor]:
    """Record the output of every later call of the input embedding."""
    outputs: list[torch.Tensor] = []
    model.model.get_input_embeddings().register_forward_hook(lambda _, __, output: outputs.append(output.detach()))
    return outputs


def data_spec(lists: list[TokenizedList], batch_size: int, max_lists: int) -> DataSpec:
    sampler = dist.get_sampler(lists, shuffle=False)
    return DataSpec(
        DataLoader(lists, batch_size, sampler=sampler, collate_fn=lambda rows: {"sequences": rows}),
        split_batch=lambda batch, _: split_batch(batch, max_lists=max_lists),
        get_num_samples_in_batch=num_samples_in_batch,
        get_num_tokens_in_batch=num_tokens_in_batch,
    )


def new_trainer(model: ListwiseReranker, spec: DataSpec, duration: str, noise: bool = True, **options) -> Trainer:
    return Trainer(
        model=model,
        train_dataloader=spec,
        max_duration=duration,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.5),
        algorithms=[NEFTune(ALPHA, SEED)] if noise else [],
        device="cpu",
        device_train_microbatch_size=len(spec.dataloader.dataset),
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
        seed=1,
        **options,
    )
