"""Model cards: what they tell, the verdict, and that nothing secret gets into one."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_contract import new_contract
from tiny_training import new_tokenizer

from rankllm_composer.model_card import BLOTTED, CardFacts, redact, render_card, verdict

FACTS = CardFacts(
    name="first_mistral",
    base_model="mistralai/Mistral-7B-Instruct-v0.3",
    base_licence="apache-2.0",
    contract=new_contract("combined"),
    data=("rryisthebest/rank_zephyr_training_data_alpha",),
    num_lists=40_000,
    losses={"language modelling": 1.0, "ranknet": 10.0},
    hyperparameters={"learning rate": 5e-6, "global batch": 128},
    progress="epoch_2 (after 936 batches)",
)
# Split, so that no scanner takes the examples for the real thing.
SECRETS = [
    "AKIA" + "IOSFODNN7EXAMPLE",
    "wJalrXUtnFEMI/K7MDENG/bPxRfiCY" + "EXAMPLEKE1",
    "hf_" + "abcdefghijklmnopqrstuvwxyz0123",
    "ghp_" + "0123456789abcdefghij0123456789abcdef",
    "github_pat_" + "11ABCDEFG0123456789_abcdefghijkl",
    "sk-" + "proj-0123456789abcdefghij",
    "xoxb-" + "123456789012-abcdefghij",
    "AIza" + "SyA0123456789abcdefghijklmnopqrstuv",
    "eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
    "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n-----END RSA PRIVATE KEY-----",
]
# text → what must be gone, what must stay
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


def test_a_card_tells_what_was_trained_and_how():
    card = render_card(FACTS)
    for text in (
        "# first_mistral",
        "fine-tuned from `mistralai/Mistral-7B-Instruct-v0.3`",
        "epoch_2 (after 936 batches)",
        "| objective | combined |",
        "| identifiers | letters, A to T |",
        "| weight of ranknet | 10 |",
        "| training lists | 40,000 |",
        "| data | rryisthebest/rank_zephyr_training_data_alpha |",
        "| learning rate | 5e-06 |",
        "its licence (apache-2.0)",
        "begin with 2 beginning-of-sequence tokens",
    ):
        assert text in card


def test_front_matter_is_what_a_hub_reads():
    front = yaml.safe_load(render_card(FACTS).split("---\n")[1])
    assert front["base_model"] == "mistralai/Mistral-7B-Instruct-v0.3"
    assert front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "text-ranking"
    assert "license" not in yaml.safe_load(render_card(dataclasses.replace(FACTS, base_licence=None)).split("---\n")[1])


@pytest.mark.parametrize(
    ("measured", "expected"),
    # 2.5 % of 0.8 is 0.02
    [
        (None, "not measured"),
        (0.7799, "below"),
        (0.7801, "within tolerance"),
        (0.8199, "within tolerance"),
        (0.8201, "above"),
    ],
)
def test_verdict_against_a_published_figure(measured, expected):
    assert verdict(measured, 0.8) == expected


def test_figures_stand_beside_the_published_ones():
    card = render_card(
        dataclasses.replace(
            FACTS,
            figures={"DL20, BM25 top 100": 0.65, "held-out windows": 0.9},
            published={"DL20, BM25 top 100": 0.7043, "DL19, BM25 top 100": 0.7294},
        )
    )
    assert "| DL20, BM25 top 100 | 0.6500 | 0.7043 | below |" in card
    assert "| DL19, BM25 top 100 | not measured | 0.7294 | not measured |" in card
    assert "| held-out windows | 0.9000 | – | – |" in card
    assert "Tolerance: 2.5%" in card


def test_without_figures_it_says_so():
    assert "Not measured." in render_card(FACTS)
    assert "| held-out windows | 0.9000 |" in render_card(dataclasses.replace(FACTS, figures={"held-out windows": 0.9}))


@pytest.mark.parametrize(
    ("objective", "style", "options", "arguments"),
    [
        ("combined", "letters", "--use_alpha --use_logits", "use_alpha=True, use_logits=True"),
        ("generation", "letters", "--use_alpha", "use_alpha=True)"),
        ("generation", "numbers", "--variable_passages\n", "stride=10)"),
    ],
)
def test_commands_serve_the_model_as_it_was_trained(objective, style, options, arguments):
    card = render_card(dataclasses.replace(FACTS, contract=new_contract(objective, identifier_style=style)))
    assert options in card
    assert arguments in card
    assert ("--use_logits" in card) == (objective == "combined")


def test_a_ranking_model_is_not_offered_to_a_client_that_cannot_serve_it():
    card = render_card(dataclasses.replace(FACTS, contract=new_contract("ranking")))
    assert "run_rank_llm.py" not in card
    assert "cannot serve this model" in card
    assert "rankllm-composer rerank" in card


def test_paths_of_the_machine_stay_out():
    single_bos = new_contract("combined", new_tokenizer(adds_bos=False))
    card = render_card(
        dataclasses.replace(
            FACTS, base_model="/home/me/models/tiny", data=("/home/me/lists.jsonl",), contract=single_bos
        )
    )
    assert "`tiny`" in card
    assert "lists.jsonl" in card
    assert "/home/me" not in card
    assert "base_model:" not in card
    assert "beginning-of-sequence" not in card
    scratch = render_card(dataclasses.replace(FACTS, base_model=None))
    assert "trained from random weights" in scratch


def test_tables_survive_what_is_put_into_them():
    card = render_card(dataclasses.replace(FACTS, hyperparameters={"a|b": "c\nd"}))
    assert "| a\\|b | c d |" in card


@pytest.mark.parametrize("secret", SECRETS, ids=lambda secret: secret[:6])
def test_known_shapes_of_credentials_are_blotted_out(secret):
    text = redact(f"before {secret} after", {})
    assert text == f"before {BLOTTED} after"
    assert secret not in render_card(dataclasses.replace(FACTS, hyperparameters={"key": secret}, notes=(secret,)))


@pytest.mark.parametrize(("text", "gone", "stays"), IN_CONTEXT, ids=lambda text: text[:20])
def test_values_known_by_their_place_are_blotted_out(text, gone, stays):
    redacted = redact(text, {})
    assert gone not in redacted
    assert stays in redacted
    assert BLOTTED in redacted


@pytest.mark.parametrize("text", HARMLESS, ids=lambda text: text[:20])
def test_what_is_no_secret_stays(text):
    assert redact(text, {}) == text


def test_values_of_the_environment_are_blotted_out(monkeypatch):
    value = "correct horse battery"
    assert redact(f"x {value} y", {"MY_SECRET": value}) == f"x {BLOTTED} y"
    assert redact(f"x {value} y", {"GREETING": value}) == f"x {value} y"
    assert redact("a short value", {"MY_SECRET": "short"}) == "a short value"
    monkeypatch.setenv("WANDB_API_KEY", value)
    assert value not in redact(value)


def test_a_card_of_harmless_facts_has_nothing_blotted_out():
    assert BLOTTED not in render_card(FACTS)


@given(st.text(max_size=300))
def test_redacting_twice_is_redacting_once(text):
    once = redact(text, {})
    assert redact(once, {}) == once


@given(st.text(max_size=100), st.sampled_from(SECRETS), st.text(max_size=100))
def test_no_surroundings_save_a_secret(before, secret, after):
    assert secret not in redact(f"{before} {secret} {after}", {})
