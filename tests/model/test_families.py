"""Every causal LM that transformers registers is trained exactly, in packs or one list at a time, or is refused."""

from __future__ import annotations

import pytest
from support.families import KINDS, compare_step, judge, page
from support.launching import REPOSITORY

PACKED = (  # measured without this package's checks
    *("mistral", "llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma", "gemma3_text", "phi3", "olmo", "olmo2"),
    *("cohere", "cohere2", "granite", "glm4", "smollm3", "starcoder2", "helium", "gpt_neox"),
)
MIXED_UP = ("qwen2_moe", "olmoe", "phimoe", "nemotron", "stablelm", "diffllama", "dbrx", "jamba", "falcon_h1", "mamba")
IGNORES_LOGITS_TO_KEEP = ("mpt", "gpt_bigcode")
NOT_CAUSAL = ("bert", "roberta", "electra", "bart", "pegasus", "marian")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_trained_exactly_or_refused(kind):
    way, reason = judge(kind)
    if way == "refused":
        assert reason
    else:
        compare_step(kind)


def test_known_kinds():
    assert {kind: judge(kind).way for kind in PACKED} == dict.fromkeys(PACKED, "packed")
    apart = (*MIXED_UP, *IGNORES_LOGITS_TO_KEEP)
    assert {kind: judge(kind).way for kind in apart} == dict.fromkeys(apart, "alone")
    assert {kind: judge(kind).way for kind in NOT_CAUSAL} == dict.fromkeys(NOT_CAUSAL, "refused")


def test_the_page_lists_every_kind():
    assert (REPOSITORY / "docs" / "models.md").read_text() == page()
