"""Redaction: what is redacted and what stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.secret_texts import SECRETS

from rankllm_composer.redaction import REDACTED, redact

# text, what is redacted, what stays
IN_CONTEXT = [
    ("s3_secret_access_key: hunter2", "hunter2", "s3_secret_access_key"),
    ('{"password": "my pass phrase"}', "pass phrase", "password"),
    ("WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567 composer -n 8", "0123456789abcdef", "composer -n 8"),
    ("HF_TOKEN='abc'", "abc", "HF_TOKEN"),
    ("Authorization: Bearer abcdef0123456789", "abcdef0123456789", "Bearer"),
    ("https://user:pa55@host/data", "pa55", "host/data"),
    ("git clone https://tok3n@host/repo", "tok3n", "host/repo"),
    (
        "https://b.s3.amazonaws.com/k?X-Amz-Credential=A%2Fb&X-Amz-Signature=ff00&X-Amz-Expires=60 next",
        "ff00",
        "b.s3.amazonaws.com/k",
    ),
    ("https://a.blob.core.windows.net/c/b?sv=2022&se=2030&sig=Zm9v", "Zm9v", "a.blob.core.windows.net/c/b"),
    ("https://storage.googleapis.com/b/o?GoogleAccessId=x&Expires=1&Signature=Zm9v", "Zm9v", "googleapis.com/b/o"),
    ("AccountKey=Zm9vYmFy;EndpointSuffix=core.windows.net", "Zm9vYmFy", "EndpointSuffix"),
]
HARMLESS = [
    "eos_token: </s>, pad_token=</s>, bos_token_id: 1",
    "tokens_per_second: 1234.5, max_length_tokens: 4096, accumulate_train_batch_on_tokens: true",
    "https://huggingface.co/docs?page=2&lang=en",
    "chat_template_sha256: 8f434346648f6b96df89dda901c5176b10a6d83961dd3c1ac88b59b2dc327aa4",
    "commit 8f434346648f6b96df89dda901c5176b10a6d839",
    "secret: null, password: None, use_auth_token: false",
    "s3://bucket/shards/train, hf://datasets/name",
    "rryisthebest/rank_zephyr_training_data_alpha, lr 5e-06, betas (0.9, 0.999)",
]


@pytest.mark.parametrize("secret", SECRETS, ids=lambda secret: secret[:6])
def test_known_formats_of_credentials_are_redacted(secret):
    text = redact(f"before {secret} after", {})
    assert text == f"before {REDACTED} after"
    assert redact(f"It is {secret}.", {}) == f"It is {REDACTED}."


@pytest.mark.parametrize(("text", "gone", "stays"), IN_CONTEXT, ids=lambda text: text[:20])
def test_values_are_redacted_by_their_context(text, gone, stays):
    redacted = redact(text, {})
    assert gone not in redacted
    assert stays in redacted
    assert REDACTED in redacted


@pytest.mark.parametrize("text", HARMLESS, ids=lambda text: text[:20])
def test_harmless_text_stays(text):
    assert redact(text, {}) == text


def test_values_of_the_environment_are_redacted(monkeypatch):
    value = "correct horse battery"
    assert redact(f"x {value} y", {"MY_SECRET": value}) == f"x {REDACTED} y"
    assert redact(f"x {value} y", {"GREETING": value}) == f"x {value} y"
    assert redact("a short value", {"MY_SECRET": "short"}) == "a short value"
    monkeypatch.setenv("WANDB_API_KEY", value)
    assert value not in redact(value)


@given(st.text(max_size=300))
def test_redaction_is_idempotent(text):
    once = redact(text, {})
    assert redact(once, {}) == once


@given(st.text(max_size=100), st.sampled_from(SECRETS), st.text(max_size=100))
def test_secrets_are_redacted_in_any_context(before, secret, after):
    assert secret not in redact(f"{before} {secret} {after}", {})
