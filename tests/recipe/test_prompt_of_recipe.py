"""`data.prompt_template`: the file that it names is read, checked and kept in the recipe of the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.recipes import problems
from support.templates import TEMPLATES

from rankllm_composer.errors import RunError
from rankllm_composer.prompts.prompt_template import read_prompt_template
from rankllm_composer.recipe.load import load_recipe, merge_recipe, recipe_to_yaml
from rankllm_composer.recipe.resume import check_same_recipe


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_run_keeps_the_template_and_not_the_file(minimal_recipe, tmp_path, name):
    path = write(tmp_path / "own.yaml", TEMPLATES[name][1])
    recipe = load_recipe(minimal_recipe, [f"data.prompt_template={path}"])
    assert recipe.data.prompt_template == read_prompt_template(path)
    kept = write(tmp_path / "recipe.yaml", recipe_to_yaml(recipe))
    Path(path).unlink()
    assert load_recipe(kept) == recipe
    merged = merge_recipe(kept)
    assert {row.origin for row in merged.keys if row.key.startswith("data.prompt_template.")} == {"yaml"}


def test_another_template_is_refused_when_a_run_is_resumed_and_a_moved_one_is_not(minimal_recipe, tmp_path):
    path = write(tmp_path / "own.yaml", TEMPLATES["own_words"][1])
    moved = write(tmp_path / "moved.yaml", TEMPLATES["own_words"][1])
    other = write(tmp_path / "other.yaml", TEMPLATES["own_words"][1].replace("texts", "passages"))
    first, same, changed, published = (
        recipe_to_yaml(load_recipe(minimal_recipe, [f"data.prompt_template={value}"]))
        for value in (path, moved, other, "null")
    )
    assert check_same_recipe(first, same, "here") == same
    with pytest.raises(
        RunError, match=r"data.prompt_template.prefix was .*There are \{num\} texts.* is now .*passages"
    ):
        check_same_recipe(first, changed, "here")
    for before, after in ((first, published), (published, first)):
        with pytest.raises(RunError, match=r"holds a run of another recipe \(data\.prompt_template\.body was "):
            check_same_recipe(before, after, "here")


def test_what_is_wrong_with_a_template_is_a_problem_of_the_recipe(minimal_recipe, tmp_path):
    path = write(tmp_path / "own.yaml", TEMPLATES["own_words"][1].replace("{rank}", "{number}"))
    write(tmp_path / "numbers.yaml", TEMPLATES["no_system_message"][1])
    keys = "{body: '{rank} {candidate}', prefix: '{query}', output_validation_regex: x, output_extraction_regex: x}"
    for value, message in (
        (path, f"data.prompt_template ({path}:7: body) is with {{number}}; expected of placeholders, only {{rank}}, "),
        ("none.yaml", "data.prompt_template (none.yaml) is not a file; expected a prompt template of rank_llm"),
        ("7", "data.prompt_template is 7; expected a YAML file or its keys, or null."),
        (keys, "data.prompt_template.output_validation_regex is a pattern that does not match the answer [A] > [B];"),
        (keys.replace("body", "bodies"), "data.prompt_template.bodies is an unknown key; expected one of method, "),
        (path.replace("own", "numbers"), "data.prompt_template is for numbers; expected one for letters, as are"),
        (keys.replace("x, ", "7, "), "data.prompt_template.output_validation_regex is 7; expected text."),
    ):
        found = problems(minimal_recipe, "data.train.identifiers=letters", f"data.prompt_template={value}")
        assert any(str(problem).startswith(message) for problem in found.values()), (value, found)
