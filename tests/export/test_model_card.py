"""Model cards: their content, the comparison with published results, and no secrets in them."""

from __future__ import annotations

import dataclasses
import shlex

import pytest
import yaml
from support.contracts import new_contract
from support.launching import REPOSITORY
from support.secret_texts import SECRETS
from support.tiny_training import new_tokenizer

from rankllm_composer.errors import ModelError
from rankllm_composer.export.model_card import (
    CardFacts,
    add_figures,
    published_figures,
    render_card,
    serving_command,
    verdict,
)
from rankllm_composer.prompts.clients import CLIENT_VERSIONS
from rankllm_composer.redaction import REDACTED

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


def test_a_card_describes_the_training():
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


def test_front_matter_is_readable_by_the_hub():
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
def test_verdict_against_a_published_metric(measured, expected):
    assert verdict(measured, 0.8) == expected


def test_metrics_are_next_to_the_published_ones():
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


def test_later_metrics_are_added_to_the_card(tmp_path):
    published = {"dl19-bm25/nDCG@10": 0.7294, "dl20-bm25/nDCG@10": 0.7043}
    early = {"eval/first_token/ndcg@10": 0.5}
    card = tmp_path / "README.md"
    card.write_text(render_card(dataclasses.replace(FACTS, published=published, figures=early)))
    before = card.read_text()
    add_figures(card, {"dl20-bm25/nDCG@10": 0.69})
    add_figures(card, {"dl20-bm25/nDCG@10": 0.65, "other/RR@10": -0.25})
    text = card.read_text()
    later = early | {"dl20-bm25/nDCG@10": 0.65, "other/RR@10": -0.25}
    assert text == render_card(dataclasses.replace(FACTS, published=published, figures=later))
    assert "| dl20-bm25/nDCG@10 | 0.6500 | 0.7043 | below |" in text and "0.6900" not in text
    assert "| dl19-bm25/nDCG@10 | not measured | 0.7294 | not measured |" in text
    card.write_text(before.replace("A listwise reranker", "My words: a listwise reranker"))
    add_figures(card, {"dl20-bm25/nDCG@10": 0.7})
    assert "My words" in card.read_text() and "within tolerance" in card.read_text()
    for facts in (FACTS, dataclasses.replace(FACTS, figures=early)):  # nothing is published
        card.write_text(render_card(facts))
        add_figures(card, {"x": 1.0})
        assert card.read_text() == render_card(dataclasses.replace(facts, figures={**facts.figures, "x": 1.0}))
    card.write_text("# other")
    with pytest.raises(ModelError, match="has no section '## Results'"):
        add_figures(card, {"x": 1.0})


def test_published_metrics_match_those_in_the_recipes():
    for name, published in (
        ("first_mistral", 4),
        ("rank_zephyr", 4),
        ("first_qwen3_0.6b", 3),
        ("first_mistral_lora", 0),
        ("demo", 0),
    ):
        figures = published_figures(name)
        header = (REPOSITORY / "yamls" / f"{name}.yaml").read_text().partition("\nrun:")[0].replace("#", "")
        words = " ".join(header.split())
        assert len(figures) == published
        for figure, value in figures.items():
            at, first_stage = figure.removesuffix("/nDCG@10").split("-")
            if at == "beir":
                assert f"11 BEIR sets: {value:.4f}".replace("0.", ".") in words
                continue
            stage = {"bm25": "BM25 top 100: ", "splade": "SPLADE++ top 100: "}[first_stage]
            told = words.split(stage)[1].split(";")[0]
            assert f"{at.upper()} {value:.4f}".replace(" 0.", " .") in told


def test_a_card_without_metrics_states_that():
    assert "Not measured." in render_card(FACTS)
    assert "| held-out windows | 0.9000 |" in render_card(dataclasses.replace(FACTS, figures={"held-out windows": 0.9}))


@pytest.mark.parametrize(
    ("objective", "style", "options", "arguments"),
    [
        ("combined", "letters", "--use-alpha --use-logits", "use_alpha=True, use_logits=True"),
        ("ranking", "letters", "--use-alpha --use-logits", "use_alpha=True, use_logits=True"),
        ("combined", "numbers", "--variable-passages --use-logits", "stride=10, use_logits=True"),
        ("generation", "letters", "--use-alpha", "use_alpha=True)"),
        ("generation", "numbers", "--variable-passages\n", "stride=10)"),
    ],
)
def test_commands_serve_the_model_as_it_was_trained(objective, style, options, arguments):
    contract = new_contract(objective, identifier_style=style)
    card = render_card(dataclasses.replace(FACTS, contract=contract))
    assert options in card
    assert arguments in card
    assert ("--use-logits" in card) == (objective != "generation")
    assert ("never learned to write an answer" in card) == (objective == "ranking")
    older = render_card(dataclasses.replace(FACTS, contract=contract.with_client("0.25.7")))
    assert ("--use_logits" in older) == (objective == "combined" and style == "letters")
    assert ("run_rank_llm.py" in older) == (objective != "ranking")
    assert ("rank_llm 0.25.7 reads letters only" in older) == (style == "numbers" and objective == "combined")


def test_words_of_a_passage_are_given_to_the_client_that_takes_them():
    contract = new_contract(max_passage_words=45)
    card = render_card(dataclasses.replace(FACTS, contract=contract))
    assert "--max-passage-words=45" in card and "max_passage_words=45" in card
    older = dataclasses.replace(contract.with_client("0.25.7"), max_passage_words=45)
    card = render_card(dataclasses.replace(FACTS, contract=older))
    assert "words=" not in card and "shows up to 300 words of a passage in windows of 20, where the model was" in card


def test_a_ranking_model_is_not_offered_to_a_client_that_cannot_serve_it():
    card = render_card(dataclasses.replace(FACTS, contract=new_contract("ranking").with_client("0.25.7")))
    assert "run_rank_llm.py" not in card
    assert "rank_llm 0.25.7 cannot serve it" in card
    assert "rankllm-composer rerank" in card


def test_local_paths_are_left_out():
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


def test_table_cells_are_escaped():
    card = render_card(dataclasses.replace(FACTS, hyperparameters={"a|b": "c\nd"}))
    assert "| a\\|b | c d |" in card


@pytest.mark.parametrize("secret", SECRETS, ids=lambda secret: secret[:6])
def test_no_secret_gets_into_a_card(secret):
    assert secret not in render_card(dataclasses.replace(FACTS, hyperparameters={"key": secret}, name=secret))


def test_a_card_without_secrets_is_not_redacted():
    assert REDACTED not in render_card(FACTS)


@pytest.mark.parametrize("client", CLIENT_VERSIONS)
@pytest.mark.parametrize("objective", ["generation", "combined"])
@pytest.mark.parametrize("style", ["letters", "numbers"])
@pytest.mark.parametrize("window, stride", [(20, 10), (20, 5), (9, 4)])
def test_the_serving_command_follows_the_page(client, objective, style, window, stride):
    """The rules of docs/serving.md, for every kind of model: with numbers, rank_llm 0.25.7 can only generate."""
    page = (REPOSITORY / "docs" / "serving.md").read_text()
    changes = {"identifier_style": style, "window_size": window, "stride": stride, "max_passage_words": 45}
    contract = dataclasses.replace(new_contract(**changes).with_client(client), objective=objective)
    words = shlex.split(serving_command(contract, "my models/a$b").replace("\\\n", " "))
    assert " ".join(word for word in words if not word.startswith("--")) in page
    flags = " ".join(word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--"))
    assert ("_" in flags, "-" in flags) == (client == "0.25.7", client == "0.26.0")
    words = [word.replace("_", "-") for word in words if word.startswith("--")]
    assert ("--max-passage-words=45" in words) is (client == "0.26.0")
    assert "--model-path=my models/a$b" in words
    assert ("--use-alpha" in words) is (style == "letters")
    assert ("--use-logits" in words) is (objective == "combined" and (style == "letters" or client == "0.26.0"))
    assert {f"--window-size={window}", f"--stride={stride}"} <= set(words) or (window, stride) == (20, 10)
    for word in words:  # the page explains each flag that is not in its example
        assert word.partition("=")[0] in page
    card = render_card(CardFacts("name", None, contract))
    assert "\n".join(f"    {line}" for line in serving_command(contract).splitlines()) in card
    assert ("use_logits=True" in card) is ("--use-logits" in words)
