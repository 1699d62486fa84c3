"""A run with a prompt template of one's own: trained, exported, inspected, served and resumed in it."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
from support.templates import TEMPLATES
from typer.testing import CliRunner

import rankllm_composer as rc
from rankllm_composer.cli import app
from rankllm_composer.demo import build_model_folder
from rankllm_composer.preflight.inspection import inspect_recipe
from rankllm_composer.prompts.prompt_template import read_prompt_template
from rankllm_composer.prompts.user_turn import render_user_turn
from rankllm_composer.training import assembly

WORDS = ("apple", "cherry", "mango", "plum")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with a model, records of the published prompt, a template and a finished run."""
    made = tmp_path_factory.mktemp("prompt")
    build_model_folder(made / "model", (*WORDS, "texts", "passages"))
    records = []
    for query in WORDS:
        turns = {"system": "", "human": render_user_turn(query, [WORDS[0], query, WORDS[3]]), "gpt": "[B] > [A] > [C]"}
        records.append({"id": query, "conversations": [{"from": k, "value": v} for k, v in turns.items()]})
    (made / "records.json").write_text(json.dumps(records))
    (made / "own.yaml").write_text(TEMPLATES["own_words"][1], encoding="utf-8")
    rc.train(load(made))
    return made


def load(folder, *overrides: str) -> rc.Recipe:
    keys = [
        f"run.folder={folder / 'run'}",
        "run.max_duration=2ba",
        "schedule.warmup=0ba",
        f"model.name_or_path={folder / 'model'}",
        f"data.prompt_template={folder / 'own.yaml'}",
        f"data.train.local={folder / 'shards'}",
        f"data.train.source={{input: {folder / 'records.json'}}}",
        f"data.eval={{local: {folder / 'shards'}}}",
        "data.num_workers=0",
        "batch.global_lists=2",
        "evaluation={interval: 1ba, num_shuffles: 1, decodings: [first_token]}",
        "checkpoint.export.interval=1ep",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rc.load_recipe("demo", [*keys, *overrides])


def command(*arguments: object):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_the_export_holds_the_template_and_is_prompted_by_it(folder):
    (export,) = (folder / "run" / "hf").glob("epoch_*")
    template = read_prompt_template(folder / "own.yaml")
    contract = json.loads((export / "reranker.json").read_text())
    assert contract["prompt_template"] == "prompt_template.yaml" and contract["template"]["body"] == template.body
    assert read_prompt_template(export / "prompt_template.yaml") == template
    assert "--prompt-template-path=PATH/prompt_template.yaml --dataset" in (export / "README.md").read_text()
    reranker = rc.Reranker.from_pretrained(export)
    window = reranker._window("w", "plum", ["apple", "plum"])
    shown = reranker.tokenizer.decode(window.input_ids)
    assert "2 texts" in shown and "passages" not in shown
    assert {passage.text for passage in reranker.rerank("plum", ["apple", "plum"])} == {"apple", "plum"}

    shown = command("inspect", "--model", export)
    assert shown.exit_code == 0 and "identical" in shown.output and "prompt_template.yaml" in shown.output
    copy = shutil.copytree(export, folder / "copy")
    (copy / "prompt_template.yaml").write_text(TEMPLATES["own_words"][1].replace("Sort them", "Order them"))
    shown = command("inspect", "--model", copy)
    assert shown.exit_code == 1 and "reranker.json: template.suffix is 'Sort them" in " ".join(shown.output.split())


def test_training_and_inspection_present_the_template(folder):
    recipe = load(folder)
    found = inspect_recipe(recipe, 0, loss=False)
    assert found.problems == [] and any("that of data.prompt_template" in note for note in found.notes)
    assert "texts" in "".join(found.tokens) and "passages" not in "".join(found.tokens)
    assert (folder / "run" / "evaluations.jsonl").read_text().count("first_token") >= 2


def test_another_template_does_not_resume_the_run_and_the_same_one_does_without_its_file(folder):
    (folder / "other.yaml").write_text(TEMPLATES["own_words"][1].replace("Sort", "Order"), encoding="utf-8")
    with pytest.raises(rc.RankLLMComposerError, match=r"prompt_template\.suffix was .*Resume with the same recipe"):
        rc.train(load(folder, f"data.prompt_template={folder / 'other.yaml'}"))
    kept = rc.load_recipe(folder / "run" / "recipe.yaml")
    assert kept.data.prompt_template == read_prompt_template(folder / "own.yaml")
    exported = folder / "exported"
    assert command("export", folder / "run", "--output", exported).exit_code == 0
    assert (exported / "prompt_template.yaml").is_file()


def test_the_next_stage_is_told_of_another_prompt(folder, caplog):
    (export,) = (folder / "run" / "hf").glob("epoch_*")
    for changes, message in (
        ([], ""),
        (["data.prompt_template=null"], f"was trained with another prompt. Set data.prompt_template={export}/prompt_"),
    ):
        caplog.clear()
        recipe = load(folder, f"model.name_or_path={export}", "model.random_weights=false", *changes)
        contract_of(recipe)
        assert message in caplog.text and bool(message) == ("another prompt" in caplog.text)


def contract_of(recipe: rc.Recipe):
    return assembly.build_contract(recipe, assembly.build_tokenizer(recipe), assembly.training_contents(recipe))


def test_lists_of_other_identifiers_than_the_template_reads_are_refused_and_renamed(folder):
    (folder / "numbers.yaml").write_text(TEMPLATES["no_system_message"][1], encoding="utf-8")
    template = f"data.prompt_template={folder / 'numbers.yaml'}"
    with pytest.raises(rc.RankLLMComposerError, match=r"of 3 candidates named by letters.*identifiers=numbers"):
        contract_of(load(folder, template))
    renamed = contract_of(load(folder, template, "data.train.identifiers=numbers"))
    assert (renamed.identifier_style, renamed.prompt_template) == ("numbers", "prompt_template.yaml")
