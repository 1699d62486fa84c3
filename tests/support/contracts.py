"""Shared by tests: contracts."""

from __future__ import annotations

from rankllm_composer.prompts.contract import DecodingContract, decoding_contract
from support.tiny_training import new_tokenizer

LETTERS = tuple("ABCDEFGHIJKLMNOPQRST")


def new_contract(objective: str = "combined", tokenizer=None, **changes) -> DecodingContract:
    values = {"identifier_style": "letters", "identifiers": LETTERS, "identifier_token_ids": tuple(range(12, 32))}
    return decoding_contract(tokenizer or new_tokenizer(), objective=objective, **values | changes)
