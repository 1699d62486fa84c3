"""A tokenizer, models and a Trainer small enough to train and export in a test."""

from __future__ import annotations

import copy

import torch
from composer import Trainer
from composer.models import HuggingFaceModel
from composer.utils import dist
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen2Config

WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[",
    "]",
    ">",
    "query",
    "cat",
    "dog",
    "fish",
    *"ABCDEFGHIJKLMNOPQRST",
]
CHAT_TEMPLATE = "<s>{% for m in messages %}[INST] {{ m['content'] }} {% endfor %}[/INST]"
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "mistral": MistralConfig(**SIZES),
    "llama_tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
}


def new_tokenizer(adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """Create a word-level tokenizer; its template writes <s>, and with `adds_bos` the tokenizer adds another."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["[INST]", "[/INST]"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_hf_model(family: str = "mistral"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), attn_implementation="sdpa")


class RandomLists(Dataset):
    """Rows of random tokens, with the same tokens as labels."""

    def __init__(self, num_rows: int) -> None:
        self.rows = torch.randint(3, 40, (num_rows, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def new_loader(num_rows: int = 8, batch_size: int = 2) -> DataLoader:
    rows = RandomLists(num_rows)
    return DataLoader(rows, batch_size=batch_size, sampler=dist.get_sampler(rows, shuffle=False))


def new_trainer(model, duration: str = "2ep", num_rows: int = 8, **options) -> Trainer:
    return Trainer(
        model=model if isinstance(model, HuggingFaceModel) else HuggingFaceModel(model, new_tokenizer()),
        train_dataloader=new_loader(num_rows),
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-2),
        max_duration=duration,
        device="cpu",
        progress_bar=False,
        seed=1,
        **options,
    )


def probe_logits(model) -> torch.Tensor:
    """Compute the logits of two fixed rows: (2, 8, V)."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=RandomLists(2).rows).logits
