"""Decoding contracts of a tiny tokenizer."""

from __future__ import annotations

import dataclasses

from rankllm_composer.prompts.contract import DecodingContract, decoding_contract
from support.tiny_training import new_tokenizer


def new_contract(objective: str = "combined", tokenizer=None, **changes) -> DecodingContract:
    return dataclasses.replace(decoding_contract(tokenizer or new_tokenizer(), objective), **changes)
