"""Every causal LM that transformers registers, at a tiny size: how it is trained here, and the page that lists them.

Run it to write the page: python tests/support/families.py > docs/models.md
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rankllm_composer.errors import ModelError
from rankllm_composer.model.attention import PACKED_SDPA
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.self_check import check_model
from rankllm_composer.model.tiny_copy import tiny_config, tiny_model
from support.packed_models import gradients, packed_losses, plain_losses, random_sequences

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MAX_LENGTH_TOKENS = 64
OVERRIDES = {  # for configurations whose defaults cannot be built
    "dbrx": {"attn_config": {"clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "granitemoehybrid": {"layer_types": (["mamba"] * 5 + ["attention"]) * 5 + ["mamba"] * 2},
    "nemotron": {"num_key_value_heads": 8},
}
WITHOUT_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")
OBJECTIVE = Objective("combined", ranking_weight=3.0)
PAGE = """# Models

How each kind of causal language model that transformers {version} registers is trained. `tests/model/test_families.py`
tries all of them at a tiny size and compares this page with the result (`python tests/support/families.py` writes it).

A run tries the same before its first step, on a tiny copy of its model: the logits of lists in a pack must be those of
each list alone. So a model that is not listed here, or that comes with its own code, is trained exactly or refused.

## In packs

Loss and gradient of a pack equal those of each list alone, under the model's own plain attention:

{packed}

Positions that depend on the longest list (`rope_scaling` of type `longrope` or `dynamic`) are refused in packs if
`data.max_length_tokens` exceeds the limit from which they do. Single lists are exact with `longrope`; `dynamic` also
depends on earlier lists and is refused. Attention with a score cap (gemma2) needs memory quadratic in a list's length.

## One list per forward pass

`batch.packing=false` trains these exactly, with their own attention, one list at a time:

{alone}

## Refused

{refused}

## Adapters and quantized models

`model.lora` trains low-rank adapters; every name in `target_modules` and `modules_to_save` must be that of a layer.
`frozen_precision: bf16` halves the frozen weights on one GPU or under DDP; FSDP2 (torch 2.7) needs one type per layer.
Quantized bases (GPTQ, AWQ, bitsandbytes, FP8), and so QLoRA, are refused: use the model that they were made from.
"""


class Judgment(NamedTuple):
    """How a kind of model is trained: "packed", "alone" or "refused", and why not better."""

    way: str
    reason: str


def config_of(kind: str) -> PretrainedConfig:
    """The default configuration of a kind, with a window that the lists of a test exceed, and no attention dropout."""
    config = CONFIG_MAPPING[kind](**OVERRIDES.get(kind, {}))
    text = config.get_text_config()
    if getattr(text, "sliding_window", None):
        text.sliding_window = 32
    for name in WITHOUT_DROPOUT:
        if isinstance(getattr(text, name, None), float):
            setattr(text, name, 0.0)
    return config


@functools.cache
def judge(kind: str) -> Judgment:
    """Try a kind of model as a run does, first packed and then one list at a time."""
    try:
        config = config_of(kind)
    except ValueError as error:
        return Judgment("refused", f"its configuration has no defaults: {error}")
    reason = ""
    for packing in (True, False):
        try:
            check_model(config, packing=packing, max_length_tokens=MAX_LENGTH_TOKENS)
            return Judgment("packed" if packing else "alone", reason)
        except ModelError as error:
            text = str(error)
            reason = text[text.index(": ", text.index("cannot be trained")) + 2 :].partition(". ")[0]
            if "batch.packing=false" not in text:
                break
    return Judgment("refused", reason)


def compare_step(kind: str) -> None:
    """Hold loss and gradient of a tiny model against those of each list alone in plain attention."""
    tiny = tiny_config(config_of(kind), MAX_LENGTH_TOKENS)
    sequences = random_sequences("combined", num=3)
    reference = tiny_model(tiny, "eager")
    expected = plain_losses(reference, sequences, OBJECTIVE)
    expected["total"].backward()
    if judge(kind).way == "packed":
        model = tiny_model(tiny, PACKED_SDPA)
        parts = packed_losses(model, sequences, OBJECTIVE)
    else:
        attention = check_model(config_of(kind), packing=False, max_length_tokens=MAX_LENGTH_TOKENS)
        model = tiny_model(tiny, attention)
        parts = packed_losses(model, sequences, OBJECTIVE, attention=attention, limit={"max_lists": 1})
    torch.testing.assert_close(parts["total"], expected["total"].detach(), rtol=2e-5, atol=0)
    wanted = gradients(reference)
    scale = max(float(gradient.abs().max()) for gradient in wanted.values() if gradient is not None)
    assert scale > 0
    for name, gradient in gradients(model).items():
        right = wanted[name] if wanted[name] is not None else torch.zeros(())
        found = gradient if gradient is not None else torch.zeros(())
        assert float((found - right).abs().max()) <= 2e-4 * scale, name


def page() -> str:
    """The text of docs/models.md."""
    judged = {kind: judge(kind) for kind in sorted(KINDS)}
    packed = ", ".join(f"`{kind}`" for kind, judgment in judged.items() if judgment.way == "packed")
    tables = {
        way: "\n".join(
            ["| model type | reason |", "|---|---|"]
            + [f"| `{kind}` | {reason} |" for kind, (found, reason) in judged.items() if found == way]
        )
        for way in ("alone", "refused")
    }
    return PAGE.format(version=transformers.__version__, packed=packed, **tables)


if __name__ == "__main__":
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    sys.stdout.write(page())
