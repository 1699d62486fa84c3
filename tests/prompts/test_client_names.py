"""A path that the inference client misreads is found by the export and by the recipe check, and no other path is."""

from __future__ import annotations

import warnings

import pytest
from support.client_paths import MISREAD_PATHS, NEW_NAMES, PLAIN_PATHS, WHOLE_PATHS
from support.exporting import new_exporter, write
from support.tiny_training import new_tokenizer

from rankllm_composer.export.model_card import CardFacts, render_card
from rankllm_composer.prompts.client_names import ServingNameWarning, client_names, misread_names
from rankllm_composer.prompts.contract import decoding_contract
from rankllm_composer.recipe.load import merge_recipe


def recipe_warnings(folder: str) -> list[str]:
    merged = merge_recipe("yamls/demo.yaml", [f"checkpoint.export.folder={folder}"])
    return [sentence for sentence in merged.warnings if sentence.startswith("checkpoint.export.folder")]


def test_every_name_has_a_path():
    assert {name for names in MISREAD_PATHS.values() for name in names} == {*client_names(), *WHOLE_PATHS}
    assert set(client_names()) - set(client_names("0.25.7")) == NEW_NAMES


@pytest.mark.parametrize("path", MISREAD_PATHS)
def test_misread_paths_warn_when_a_recipe_is_checked_and_when_a_model_is_exported(tmp_path, path):
    assert misread_names(path) == MISREAD_PATHS[path]
    assert misread_names(path, "0.25.7") == tuple(name for name in MISREAD_PATHS[path] if name not in NEW_NAMES)
    (sentence,) = recipe_warnings(path)
    assert all(name in sentence for name in MISREAD_PATHS[path])
    if path in WHOLE_PATHS:
        assert misread_names(f"x/{path}") == ()
        return
    with pytest.warns(ServingNameWarning, match=f"contains '{MISREAD_PATHS[path][0]}'"):
        write(tmp_path / path)
    with pytest.warns(ServingNameWarning, match=f"contains '{MISREAD_PATHS[path][0]}'"):
        new_exporter(tmp_path / path).init(None, None)


@pytest.mark.parametrize("path", PLAIN_PATHS)
def test_other_paths_do_not_warn(tmp_path, path):
    assert misread_names(path) == ()
    assert recipe_warnings(path) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", ServingNameWarning)
        write(tmp_path / path)


def test_the_card_lists_the_names():
    for version in ("0.26.0", "0.25.7"):
        contract = decoding_contract(new_tokenizer(), "combined", client_version=version)
        card = render_card(CardFacts(name="m", base_model=None, contract=contract))
        assert f"With rank_llm ({version}, vLLM)" in card and f"({', '.join(client_names(version))})" in card
