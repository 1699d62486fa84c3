"""Model cards: their content, the comparison with published results, and no secrets in them."""

from __future__ import annotations

import dataclasses
import shlex

import pytest
import yaml
from huggingface_hub import ModelCard
from support.contracts import new_contract
from support.launching import REPOSITORY
from support.secret_texts import SECRETS
from support.tiny_training import new_tokenizer

from rankllm_composer.errors import ModelError
from rankllm_composer.export.card_metadata import base_model_id, data_set_ids, public_name
from rankllm_composer.export.model_card import CardFacts, add_figures, render_card, serving_command
from rankllm_composer.export.published import published_figures, verdict
from rankllm_composer.prompts.clients import CLIENT_VERSIONS
from rankllm_composer.redaction import REDACTED

FACTS = CardFacts(
    name="first_mistral",
    base_model="mistralai/Mistral-7B-Instruct-v0.3",
    base_id="mistralai/Mistral-7B-Instruct-v0.3",
    base_license="apache-2.0",
    contract=new_contract("combined"),
    data=("rryisthebest/rank_zephyr_training_data_alpha[train]", "mine.jsonl"),
    num_lists=40_000,
    trained_lists={"total": 119_808, "too_long": 3},
    losses={"language modelling": 1.0, "ranknet": 10.0},
    hyperparameters={"learning rate": 5e-6, "global batch": 128, "NEFTune alpha": None},
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
        "| lists trained | 119,808 in epochs of 40,000; 3 too long in the last epoch |",
        "| data | rryisthebest/rank_zephyr_training_data_alpha[train] |",
        "| data | mine.jsonl |",
        "| learning rate | 5e-06 |",
        "| NEFTune alpha | none |",
        "its license (apache-2.0)",
        "begin with 2 beginning-of-sequence tokens",
    ):
        assert text in card


def test_front_matter_is_readable_by_the_hub():
    figures = {"dl20-bm25/nDCG@10": 0.69, "eval/first_token/ndcg@10": 0.5, "eval/windows": 20.0, "x/AP": float("nan")}
    data = ModelCard(render_card(dataclasses.replace(FACTS, figures=figures))).data
    assert data.base_model == "mistralai/Mistral-7B-Instruct-v0.3"
    assert data.datasets == ["rryisthebest/rank_zephyr_training_data_alpha"]
    assert (data.license, data.pipeline_tag, data.model_name) == ("apache-2.0", "text-ranking", "first_mistral")
    found = [(one.dataset_name, one.metric_name, one.metric_type, one.metric_value) for one in data.eval_results]
    held_out = ("held-out windows, first token", "nDCG@10", "ndcg_at_10", 0.5)
    assert found == [("dl20-bm25", "nDCG@10", "ndcg_at_10", 0.69), held_out]
    bare = ModelCard(render_card(CardFacts("scratch", None, FACTS.contract, data=("mine.jsonl",)))).data
    assert (bare.base_model, bare.datasets, bare.license, bare.eval_results) == (None, None, None, None)


def test_hub_ids_of_models_and_data_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)  # looks like a hub id
    assert base_model_id("models/tiny") is None and public_name("models/tiny") == "tiny"
    assert base_model_id("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B" and base_model_id("/models/zephyr-7b-beta") is None
    assert base_model_id("/cache/hub/models--Qwen--Qwen3-0.6B/snapshots/c1899d") == "Qwen/Qwen3-0.6B"
    stage = tmp_path / "runs" / "one" / "hf" / "epoch_2"  # an export names the model that it was made from
    stage.mkdir(parents=True)
    (stage / "README.md").write_text(render_card(FACTS))
    (stage / "reranker.json").write_text("{}")
    assert base_model_id(str(stage)) == FACTS.base_model
    card = render_card(dataclasses.replace(FACTS, base_model=str(stage)))
    assert "from `epoch_2`, which was made from `mistralai/Mistral-7B-Instruct-v0.3`, with" in card
    assert ModelCard(card).data.base_model == FACTS.base_model
    sources = ["a/b[train]", "a/c:en[train[:5]]", "a/b[test]", "folder[train]", "run.trec", "irds:a/b"]
    assert data_set_ids(sources) == ["a/b", "a/c"]


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
            first_stage={"DL20, BM25 top 100": 0.5},
            published={"DL20, BM25 top 100": 0.7043, "DL19, BM25 top 100": 0.7294},
        )
    )
    assert "| DL20, BM25 top 100 | 0.5000 | 0.6500 | 0.7043 | below |" in card
    assert "| DL19, BM25 top 100 | – | not measured | 0.7294 | not measured |" in card
    assert "| held-out windows | – | 0.9000 | – | – |" in card
    assert "Tolerance: 2.5%" in card


def test_later_metrics_are_added_to_the_card(tmp_path):
    published = {"dl19-bm25/nDCG@10": 0.7294, "dl20-bm25/nDCG@10": 0.7043}
    early = {"eval/presented/ndcg@10": 0.25, "eval/first_token/ndcg@10": 0.5}
    card = tmp_path / "README.md"
    card.write_text(render_card(dataclasses.replace(FACTS, published=published, figures=early)))
    before = card.read_text()
    assert "| eval/first_token/ndcg@10 | 0.2500 | 0.5000 | – | – |" in before
    add_figures(card, {"dl20-bm25/nDCG@10": 0.69}, {"dl20-bm25/nDCG@10": 0.1})
    add_figures(card, {"dl20-bm25/nDCG@10": 0.65, "other/RR@10": -0.25}, {"dl20-bm25/nDCG@10": 0.48})
    text = card.read_text()
    later = early | {"dl20-bm25/nDCG@10": 0.65, "other/RR@10": -0.25}
    first_stage = {"dl20-bm25/nDCG@10": 0.48}
    changed = dataclasses.replace(FACTS, published=published, figures=later, first_stage=first_stage)
    assert text == render_card(changed)
    assert "| dl20-bm25/nDCG@10 | 0.4800 | 0.6500 | 0.7043 | below |" in text and "0.6900" not in text
    assert "| dl19-bm25/nDCG@10 | – | not measured | 0.7294 | not measured |" in text
    assert {one.metric_value for one in ModelCard(text).data.eval_results} == {0.5, 0.65, -0.25}
    card.write_text(before.replace("A listwise reranker", "My words: a listwise reranker"))
    add_figures(card, {"dl20-bm25/nDCG@10": 0.7})
    assert "My words" in card.read_text() and "within tolerance" in card.read_text()
    for facts in (FACTS, dataclasses.replace(FACTS, figures=early)):  # nothing is published
        card.write_text(render_card(facts))
        add_figures(card, {"x/AP": 1.0}, {"x/AP": 0.5})
        figures = {**facts.figures, "x/AP": 1.0}
        assert card.read_text() == render_card(dataclasses.replace(facts, figures=figures, first_stage={"x/AP": 0.5}))
    card.write_text("---\n: [\n---\n# mine\n## Results\n")  # metadata that a user broke are left alone
    add_figures(card, {"x/AP": 1.0})
    assert card.read_text().startswith("---\n: [\n---\n# mine\n## Results\n\n| figure |")
    card.write_text("# other")
    with pytest.raises(ModelError, match="has no section '## Results'"):
        add_figures(card, {"x": 1.0})


def test_published_metrics_match_those_in_the_recipes():
    for name, published in (
        ("first_mistral", 4),
        ("rank_zephyr", 4),
        ("first_qwen3_0.6b", 3),
        ("first_qwen3_8b", 0),
        ("first_mistral_lora", 0),
        ("demo", 0),
    ):
        recipe = yaml.safe_load((REPOSITORY / "yamls" / f"{name}.yaml").read_text())
        source, base = recipe["data"]["train"]["source"], recipe["model"]["name_or_path"]
        data, objective = [f"{source['input']}[{source.get('split')}]"], recipe["objective"]["name"]
        figures = published_figures(base, data, objective, is_lora=recipe["model"]["lora"] is not None)
        for other in ((base, ["mine.jsonl"], objective), (f"{base}-x", data, objective), (base, data, "ranking")):
            assert published_figures(*other) == {} == published_figures(base, [], objective)
        if not published:
            assert figures == {}
            continue
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
    card = render_card(dataclasses.replace(FACTS, figures={"held-out windows": 0.9}))
    assert "| held-out windows | – | 0.9000 |" in card
    assert "| lists trained | not counted |" in render_card(dataclasses.replace(FACTS, trained_lists={}))


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
            FACTS, base_model="/home/me/models/tiny", base_id=None, data=("/home/me/lists.jsonl",), contract=single_bos
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
    figures = {f"{secret} 20/nDCG@10": 0.5, "x/AP": 0.5}
    card = render_card(dataclasses.replace(FACTS, hyperparameters={"key": secret}, name=secret, figures=figures))
    assert secret not in card and len(ModelCard(card).data.eval_results) == 2


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
