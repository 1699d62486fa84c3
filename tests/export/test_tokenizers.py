"""An exported tokenizer gives the tokens of training, under every version of transformers that reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.contracts import new_contract
from support.exported_tokens import NAMES, TOKENS, base_folder, tokens
from support.exporting import served, write
from support.tiny_training import new_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rankllm_composer.errors import ModelError
from rankllm_composer.export.model_folder import check_export
from rankllm_composer.model.loading import load_causal_lm, load_tokenizer
from rankllm_composer.options import ModelOptions

REPOSITORY = Path(__file__).parents[2]
GOLDEN = json.loads(TOKENS.read_text())
RELOAD = """
import json, sys
from pathlib import Path
from transformers import AutoTokenizer
from support.exported_tokens import tokens
print(json.dumps({path.name: tokens(AutoTokenizer.from_pretrained(path)) for path in map(Path, sys.argv[1:])}))
"""


def new_model(tokenizer, **keys):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **keys))


@pytest.fixture(scope="module")
def bases(pytestconfig, tmp_path_factory) -> dict[str, Path]:
    cache = pytestconfig.cache.mkdir("tokenizers")
    return {name: base_folder(name, cache if "_v" in name else tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.fixture(scope="module")
def exports(bases, tmp_path_factory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("exports"), {}
    for name, base in bases.items():
        tokenizer = load_tokenizer(ModelOptions(name_or_path=str(base)))
        contract = new_contract(tokenizer=tokenizer)
        found[name] = write(folder / name, new_model(tokenizer), tokenizer=tokenizer, contract=contract)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_every_stack_before_and_after_export(name, bases, exports):
    base = load_tokenizer(ModelOptions(name_or_path=str(bases[name])))
    assert tokens(base) == GOLDEN[name]
    for load in (AutoTokenizer.from_pretrained, PreTrainedTokenizerFast.from_pretrained):
        assert tokens(load(exports[name])) == GOLDEN[name]
    again = load_tokenizer(ModelOptions(name_or_path=str(exports[name])))
    assert tokens(again) == GOLDEN[name]
    assert (again.padding_side, again.pad_token, again.eos_token) == (base.padding_side, base.pad_token, base.eos_token)
    assert sorted(again(["a", "b c"], padding=True)) == sorted(base(["a", "b c"], padding=True))
    assert set(again.all_special_tokens) == set(base.all_special_tokens)
    assert again.decode(GOLDEN[name]["texts"][1]) == base.decode(GOLDEN[name]["texts"][1])


def test_an_exported_tokenizer_is_read_as_it_is_written(exports):
    """No reader builds it anew from its vocabulary, and no reader misses what only its own class would know."""
    for name, folder in exports.items():
        keys = json.loads((folder / "tokenizer_config.json").read_text())
        assert keys["tokenizer_class"] == "PreTrainedTokenizerFast", name
        assert {"chat_template", "model_input_names", "padding_side"} <= set(keys), name
        assert not {"legacy", "add_bos_token", "backend", "is_local"} & set(keys), name
        assert not isinstance(keys.get("extra_special_tokens"), list), name


def test_a_configuration_is_read_alike_by_older_readers(tmp_path):
    """They know `torch_dtype`, `rope_theta` and `rope_scaling`, which newer versions of transformers rename."""
    tokenizer = new_tokenizer()
    scaling = {"rope_type": "linear", "factor": 2.0}
    model = new_model(tokenizer, rope_theta=5e5, rope_scaling=scaling)
    folder = write(tmp_path / "m", model, tokenizer=tokenizer, dtype="bfloat16")
    keys = json.loads((folder / "config.json").read_text())
    assert (keys["torch_dtype"], keys["rope_theta"]) == ("bfloat16", 5e5) and "dtype" not in keys
    assert keys["rope_scaling"] | scaling == keys["rope_scaling"]
    loaded = load_causal_lm(ModelOptions(name_or_path=str(folder)))
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_the_other_stack_reads_the_same_tokens(exports):
    """With the other environment that `make test` makes."""
    others = [REPOSITORY / name / "bin" / "python" for name in (".venv", ".venv-current")]
    others = [python for python in others if python.exists() and python.parent.parent != Path(sys.prefix)]
    if not others:
        pytest.skip("no environment of the other stack; make setup STACK=current (or pinned) makes one")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY / "tests"), str(REPOSITORY)])}
    done = subprocess.run(
        [others[0], "-c", RELOAD, *exports.values()], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {name: GOLDEN[name] for name in exports}


def test_a_tokenizer_that_changes_when_it_is_saved_is_refused(bases, tmp_path):
    tokenizer = load_tokenizer(ModelOptions(name_or_path=str(bases["byte_level"])))
    tokenizer.all_special_tokens  # noqa: B018  (built from the file)
    contract = new_contract(tokenizer=tokenizer)

    class Lossy(type(tokenizer)):
        """Adds a token that it does not save."""

        def __call__(self, text, **arguments):
            encoded = super().__call__(text, **arguments)
            encoded["input_ids"] = [0, *encoded["input_ids"]]
            return encoded

    tokenizer.__class__ = Lossy
    model = served(new_model(tokenizer), tokenizer=tokenizer, contract=contract)
    weights = {name: tensor.to("meta") for name, tensor in new_model(tokenizer).state_dict().items()}
    with pytest.raises(ModelError, match="the tokens of a text change when it is saved and loaded"):
        check_export(tmp_path, weights, model, "# card\n")
