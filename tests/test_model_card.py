"""Model cards: what they tell, the verdict, and that nothing secret gets into one."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from test_contract import new_contract
from test_redaction import SECRETS
from tiny_training import new_tokenizer

from rankllm_composer.model_card import CardFacts, render_card, verdict
from rankllm_composer.redaction import BLOTTED

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
def test_no_secret_gets_into_a_card(secret):
    assert secret not in render_card(dataclasses.replace(FACTS, hyperparameters={"key": secret}, notes=(secret,)))


def test_a_card_of_harmless_facts_has_nothing_blotted_out():
    assert BLOTTED not in render_card(FACTS)
