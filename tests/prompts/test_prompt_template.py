"""Templates of one's own: which files are refused, what is written, and the records that they are written for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from support.templates import LETTERS, TEMPLATES
from support.tiny_rerankers import new_tokenizer, record_of

from rankllm_composer.errors import ModelError, PromptError, RecipeError
from rankllm_composer.prompts.contract import CONTRACT_FILE, decoding_contract, read_contract
from rankllm_composer.prompts.encoding import encode_record, render_prompt
from rankllm_composer.prompts.prompt_template import Prompt, PromptTemplate, read_prompt_template
from rankllm_composer.prompts.record import augment_record
from rankllm_composer.prompts.windows import fit_window, record_window

GOOD = "method: singleturn_listwise\nprefix: '{query}: '\nbody: '[{rank}] {candidate} '\n" + LETTERS


def written(folder: Path, text: str) -> Path:
    path = folder / "prompt.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("{rank}", "rank"), "{0}:3: body is without {rank}; expected {rank} and {candidate}. Add it."),
        (("{candidate}", ""), "{0}:3: body is without {candidate}; expected"),
        (("{query}", "query"), "{0}:2: prefix is without {query}, as is suffix; expected {query} in one of them."),
        (("{rank}", "{rank} {score}"), "{0}:3: body is with {score}, the first stage's score, which training lists"),
        (("{rank}", "{ranks}"), "{0}:3: body is with {ranks}; expected of placeholders, only {rank}, {candidate}."),
        (("{query}", "{query} {num_docs}"), "{0}:2: prefix is with {num_docs}; expected of placeholders, only {query}"),
        (("{query}", "{query.__class__}"), "{0}:2: prefix is with {query.__class__}; expected of placeholders"),
        (("{query}", "{query!r:>9}"), "{0}:2: prefix is with {query!r:>9}; expected of placeholders"),
        (("{query}", "{query} {}"), "{0}:2: prefix is with {}; expected of placeholders"),
        (("{query}", "{query} }"), "{0}:2: prefix is not a format string (Single '}'"),
        (("singleturn", "multiturn"), "{0}:1: method is 'multiturn_listwise', several turns; expected singleturn_"),
        (("singleturn_listwise", "pairwise"), "{0}:1: method is 'pairwise', two passages at a time; expected single"),
        (("singleturn_listwise", "[1]"), "{0}:1: method is of type list; expected text."),
        (("method: singleturn_listwise\n", ""), "{0}:1: method is missing; expected text, as rank_llm requires. Add"),
        (("'[{rank}] {candidate} '", "7"), "{0}:3: body is of type int; expected text. Write text, in quotes"),
        (("'[{rank}] {candidate} '", ""), "{0}:3: body is empty; expected text."),
        (("body:", "bodies:"), "{0}:3: bodies is an unknown key; expected one of method, system_message, prefix"),
        (("prefix:", "body: '{rank} {candidate}'\nprefix:"), "{0}:4: body is there twice, first in line 2; expected"),
        (("prefix:", "system_message: Rank by {query}\nprefix:"), "{0}:2: system_message is with {query}, which rank_"),
        (("prefix:", 'system_message: "a {"\nprefix:'), "{0}:2: system_message is not a format string (Single '{'"),
        (("prefix:", r'system_message: "\ud800"' + "\nprefix:"), "{0}:2: system_message is not valid Unicode"),
        ((r"r\"\[([A-Z])\]\"".replace('\\"', '"'), "'[A-Z'"), "{0}:6: output_extraction_regex is not a regular expr"),
        ((r'r"\[([A-Z])\]"', "'r\"[A-Z]'"), "{0}:6: output_extraction_regex is not a regular expression"),
        ((r'r"\[([A-Z])\]"', r"'\[([A-Z])\](.?)'"), "{0}:6: output_extraction_regex is a pattern that reads [('A', '"),
        (("[A-Z]\\]( > \\[[A-Z]\\])*$", "PASSAGE1\\]$"), "{0}:5: output_validation_regex is a pattern that does not"),
        ((GOOD, "- a"), "{0} is a list; expected a prompt template of rank_llm, a YAML mapping."),
        ((GOOD, ""), "{0} is empty; expected a prompt template"),
        ((GOOD, "a: [1\nb"), "{0}:2 is not valid YAML"),
        ((GOOD, "a: !!python/object/apply:os.getcwd []"), "{0}:1 is not valid YAML (could not determine a constructor"),
    ],
    ids=str,
)
def test_templates_that_cannot_be_used_are_refused_by_line(tmp_path, change, message):
    assert GOOD.count(change[0]) == 1 or change[0] in ("{rank}", "{query}", "prefix:")
    path = written(tmp_path, GOOD.replace(*change))
    with pytest.raises(RecipeError) as failure:
        read_prompt_template(path)
    assert message.replace("{0}", str(path)) in str(failure.value)


def test_several_problems_are_named_at_once_and_a_missing_file_is_named(tmp_path):
    text = GOOD.replace("{rank}", "").replace("prefix: '{query}: '", "prefix: '{rank}'")
    with pytest.raises(RecipeError, match=r"2 problems\n.*:2: prefix is with \{rank\}.*\n.*:3: body is without"):
        read_prompt_template(written(tmp_path, text))
    with pytest.raises(RecipeError, match=r"none\.yaml is not a file; expected a prompt template"):
        read_prompt_template(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"body: \xe4")
    with pytest.raises(RecipeError, match=r"latin\.yaml is not readable"):
        read_prompt_template(tmp_path / "latin.yaml")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_file_of_an_export_is_the_template(tmp_path, name):
    template = read_prompt_template(written(tmp_path, TEMPLATES[name][1]))
    text = template.to_yaml()
    assert text.isascii() and yaml.safe_load(text) == {k: v for k, v in dataclasses.asdict(template).items() if v}
    assert read_prompt_template(written(tmp_path, text)) == template


def own_words(folder: Path) -> PromptTemplate:
    return read_prompt_template(written(folder, TEMPLATES["own_words"][1]))


def test_a_record_is_written_in_the_template_also_reordered_and_in_windows(tmp_path):
    template, tokenizer = own_words(tmp_path), new_tokenizer()
    record = record_of([3, 7, 5], template=template)
    system = "You sort texts."
    texts = [f"[{name}] wing w{value}\n" for name, value in zip("ABC", (3, 7, 5))]
    user = "Question: heat flow\nThere are 3 texts.\n" + "".join(texts) + "Sort them: [B] > [A]."
    assert record.prompt_turns == (system, user)
    assert render_prompt(record, tokenizer) == f"<s>[INST] {system}[INST] {user}[/INST]"
    encoded = encode_record(record, tokenizer, "combined")
    assert encoded.ranks.tolist() == [2, 0, 1]

    swapped = record_window(record, tokenizer, [1, 0, 2]).input_ids.tolist()
    shown = record_of([7, 3, 5], template=template)
    assert swapped == record_window(shown, tokenizer).input_ids.tolist()
    served = fit_window(
        "w", "heat flow", ["wing w7", "wing w3", "wing w5"], tokenizer, prompt=Prompt("letters", template)
    )
    assert served.input_ids.tolist() == swapped

    shuffled = augment_record(record, seed=1, epoch=0, shuffle_passages=True, identifiers=None)
    assert shuffled.template == template and shuffled.user != record.user


def test_passages_that_cannot_be_told_apart_are_not_written_in_another_template(tmp_path):
    record = record_of([3, 7], template=own_words(tmp_path))
    twice = dataclasses.replace(record, user=record.user.replace("wing w3", "wing w3\n[B] and more"))
    with pytest.raises(PromptError, match=r"record 'r': a line in a passage opens like the next .* Build the shards"):
        encode_record(twice, new_tokenizer(), "combined")
    assert encode_record(dataclasses.replace(twice, template=None), new_tokenizer(), "combined").ranks.tolist() == [
        1,
        0,
    ]


def test_a_contract_holds_its_template_and_only_one_that_reads_its_identifiers(tmp_path):
    tokenizer, template = new_tokenizer(), own_words(tmp_path)
    contract = decoding_contract(tokenizer, "combined", template=template)
    assert (contract.prompt_template, contract.prompt) == ("prompt_template.yaml", Prompt("letters", template))
    (tmp_path / CONTRACT_FILE).write_text(contract.to_json())
    assert read_contract(tmp_path) == contract
    assert "template" not in json.loads(decoding_contract(tokenizer, "combined").to_json())
    with pytest.raises(
        PromptError, match=r"output_validation_regex does not match the answer .* named by numbers. Use"
    ):
        decoding_contract(tokenizer, "generation", "numbers", template=template)
    nine = dataclasses.replace(template, output_validation_regex=r"^(\[[A-I]\]( > )?)*$")
    decoding_contract(tokenizer, "combined", num_identifiers=9, template=nine)
    with pytest.raises(PromptError, match=r"does not match the answer \[A\] > .*; the lists are of 10 candidates"):
        decoding_contract(tokenizer, "combined", num_identifiers=10, template=nine)
    damaged = json.loads(contract.to_json())
    damaged["template"]["body"] = "{candidate}"
    (tmp_path / CONTRACT_FILE).write_text(json.dumps(damaged))
    with pytest.raises(ModelError, match=r"reranker.json: prompt template: 1 problem\n  body is without \{rank\}"):
        read_contract(tmp_path)
