"""What a run refuses before its first step, because lists in a pack would not be what they are alone."""

from __future__ import annotations

import copy

import pytest
import torch
from support.packed_models import SIZES
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Phi3Config

from rankllm_composer.errors import ModelError
from rankllm_composer.model.attention import choose_attention, packed_sdpa
from rankllm_composer.model.self_check import attention_for_inference, check_model


def check(config, packing: bool = True, max_length_tokens: int = 100, **options) -> str:
    return check_model(config, packing=packing, max_length_tokens=max_length_tokens, **options)


def longrope(original: int) -> Phi3Config:
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 4.0, 6.0, 8.0]}
    sizes = {**SIZES, "max_position_embeddings": 4 * original, "pad_token_id": 0}
    config = Phi3Config(
        **sizes, original_max_position_embeddings=original, rope_scaling={"type": "longrope", **factors}
    )
    config.rope_scaling["rope_type"] = "longrope"
    return config


def test_positions_that_depend_on_the_longest_list():
    """longrope changes all positions of a pack beyond a length: refused there, exact below it and for single lists."""
    assert check(longrope(128)) == "packed_sdpa"
    with pytest.raises(ModelError, match=r"depend on the longest list\. Set batch\.packing=false to train one list"):
        check(longrope(64))
    assert check(longrope(64), packing=False) == "sdpa"

    dynamic = LlamaConfig(**SIZES, rope_scaling={"rope_type": "dynamic", "factor": 2.0})  # 256 positions
    assert check(dynamic, max_length_tokens=256) == "packed_sdpa"
    for packing in (True, False):
        with pytest.raises(ModelError, match=r"on the lists of earlier forward passes.*lower data\.max_length"):
            check(dynamic, packing, max_length_tokens=257)


def test_dropout_in_the_attention_is_found_before_training():
    with pytest.raises(ModelError, match=r"attention_dropout is 0\.1; .*\(attention_dropout=0\.1\)"):
        check(MistralConfig(**SIZES, attention_dropout=0.1))
    assert check(MistralConfig(**SIZES)) == "packed_sdpa"


def test_too_few_positions_for_the_longest_list():
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    with pytest.raises(ModelError, match=r"positions for fewer than data\.max_length_tokens=100 tokens.*lower data"):
        check(config, packing=False)
    assert check(config, packing=False, max_length_tokens=64) == "sdpa"


def test_capped_scores_are_exact_in_packs_and_in_inference():
    """sdpa of transformers drops the cap of gemma2 without a word."""
    config = Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=2.0)
    assert check(config) == "packed_sdpa"
    assert attention_for_inference(config, 100, "packed_sdpa", cached=False) == "packed_sdpa"
    assert attention_for_inference(config, 100, "packed_sdpa", cached=True) == "eager"
    assert attention_for_inference(MistralConfig(**SIZES), 100, "packed_sdpa", cached=True) == "sdpa"


def test_capped_windowed_attention_by_hand():
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    output = packed_sdpa(query, key, value, torch.tensor([0, 3, 9]), scaling=0.5, sliding_window=2, softcap=1.5)
    for head in range(4):
        for place in range(9):
            seen = list(range(max(place - 1, 0 if place < 3 else 3), place + 1))
            scores = torch.stack([query[0, head, place] @ key[0, head // 2, other] * 0.5 for other in seen])
            weights = torch.softmax(1.5 * torch.tanh(scores / 1.5), dim=0)
            expected = sum(weight * value[0, head // 2, other] for weight, other in zip(weights, seen))
            torch.testing.assert_close(output[0, place, head], expected)


def test_an_unknown_argument_of_attention_is_refused(monkeypatch):
    """Attention sinks, as gpt_oss has them, would be dropped."""
    from transformers.models.mistral import modeling_mistral

    forward = modeling_mistral.MistralAttention.forward

    def with_sinks(self, *arguments, **options):
        return forward(self, *arguments, **options, s_aux=torch.zeros(4))

    monkeypatch.setattr(modeling_mistral.MistralAttention, "forward", with_sinks)
    with pytest.raises(ModelError, match="MistralAttention passes s_aux, which attention over packs does not support"):
        check(MistralConfig(**{**SIZES, "vocab_size": 95}))


def test_the_random_state_and_the_configuration_are_left_alone():
    config = MistralConfig(**{**SIZES, "vocab_size": 94})
    before, state = copy.deepcopy(config.to_dict()), torch.random.get_rng_state()
    check(config)
    assert config.to_dict() == before and torch.equal(torch.random.get_rng_state(), state)
    assert choose_attention("auto", "cpu") == "packed_sdpa"
