"""The contract of a run: identifiers, window and stride of the lists that it trains, or the reason why it cannot."""

from __future__ import annotations

import logging

import pytest
from support.list_shards import build_from_file
from support.recipes import PUBLISHED  # FirstMistral, RankZephyr
from support.synthetic_records import conversation, write_jsonl

from rankllm_composer.errors import PromptError
from rankllm_composer.preflight.inspection import inspect_recipe
from rankllm_composer.recipe.load import load_recipe
from rankllm_composer.shards.contents import SetContents
from rankllm_composer.training.assembly import build_contract, training_contents


def test_the_contract_names_what_was_trained(mistral_v3_tokenizer, caplog):
    recipe = load_recipe(PUBLISHED[1], ["data.max_length_tokens=900"])
    runs = SetContents({("letters", 4): 3, ("letters", 2): 9}, windows=((4, 3, 60),))
    contract = build_contract(recipe, mistral_v3_tokenizer, runs)
    assert (contract.identifiers, contract.window_size, contract.stride) == (("A", "B", "C", "D"), 4, 3)
    assert (contract.context_size_tokens, contract.max_passage_words) == (900, 60)
    assert (contract.client_version, caplog.records) == ("0.26.0", [])
    older = load_recipe(PUBLISHED[1], ["data.client_version=0.25.7"])
    with caplog.at_level(logging.WARNING):
        contract = build_contract(older, mistral_v3_tokenizer, runs)
    assert (contract.client_version, contract.max_passage_words) == ("0.25.7", 12)  # 12 * 20 / 4 = 60 words
    assert "rank_llm 0.25.7 shows up to 1500 words of a passage in windows of 4, where the model was" in caplog.text
    mixed = SetContents({("letters", 26): 2, ("numbers", 30): 5})
    with caplog.at_level(logging.WARNING):
        contract = build_contract(recipe, mistral_v3_tokenizer, mixed)
    assert (contract.identifier_style, contract.identifiers[-1], contract.window_size) == ("numbers", "30", 30)
    assert "2 of 7 lists have other identifiers than numbers" in caplog.text
    letters = load_recipe(PUBLISHED[0], ["data.train.identifiers=letters"])
    assert build_contract(letters, mistral_v3_tokenizer, SetContents({("numbers", 20): 1})).identifiers[-1] == "T"


def test_training_and_inspection_refuse_the_same_lists(tmp_path, mistral_v3_folder, mistral_v3_tokenizer):
    """Numbers up to 9 are single tokens: lists of 9 are trained, one list of 12 stops both, whichever is looked at."""
    for longest in (9, 12):
        sizes = (4, longest, 4)
        records = [conversation(i, num_candidates=n, style="numbers") for i, n in enumerate(sizes)]
        source = write_jsonl(tmp_path / f"{longest}.jsonl", records)
        build_from_file(tmp_path / str(longest), source)
        keys = [f"data.train.local={tmp_path / str(longest)}", f"data.train.source.input={source}"]
        recipe = load_recipe(PUBLISHED[0], [*keys, f"model.name_or_path={mistral_v3_folder}", "neftune=null"])
        contents = training_contents(recipe)
        found = inspect_recipe(recipe, 0, loss=False)
        assert found.encoded is not None
        if longest == 9:
            assert build_contract(recipe, mistral_v3_tokenizer, contents).window_size == 9
            assert found.problems == []
        else:
            with pytest.raises(PromptError, match=r"lists of 12 candidates named by numbers") as refused:
                build_contract(recipe, mistral_v3_tokenizer, contents)
            assert found.problems == [str(refused.value)]
