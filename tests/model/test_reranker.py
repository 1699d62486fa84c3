"""The packed model against a plain Hugging Face forward of each list alone: losses, gradients, model families."""

from __future__ import annotations

import functools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.packed_models import FAMILIES, SIZES, gradients, new_model, packed_losses, plain_losses, random_sequences
from support.tiny_training import new_tokenizer
from transformers import AutoModelForCausalLM, CTRLConfig, GPTNeoXJapaneseConfig, MistralConfig

from rankllm_composer.data.packing import TokenizedList, split_batch
from rankllm_composer.errors import ModelError
from rankllm_composer.model.loading import load_causal_lm, load_tokenizer
from rankllm_composer.model.losses import LOSSES
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.reranker import ListwiseReranker, checkpoint_activations, decoder_layers
from rankllm_composer.options import OBJECTIVES, ModelOptions
from rankllm_composer.prompts.encoding import EncodedRecord, encode_record
from rankllm_composer.prompts.relevance import Relevance

GOLDEN = Path(__file__).parents[1] / "golden"


def assert_same_step(model, reference, parts, expected) -> None:
    assert parts.keys() == expected.keys()
    for name in parts:
        torch.testing.assert_close(parts[name], expected[name].detach(), rtol=2e-6, atol=1e-6)
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_step_equals_each_list_alone(family, name):
    objective = Objective(name, language_modelling_weight=0.5, ranking_weight=3.0)
    sequences = random_sequences(name)
    reference = new_model(family)
    expected = plain_losses(reference, sequences, objective)
    expected["total"].backward()
    model = new_model(family)
    parts = packed_losses(model, sequences, objective, activation_checkpointing=0.5)
    assert_same_step(model, reference, parts, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_ranking_loss_trains(loss):
    objective = Objective("combined", ranking_loss=loss)
    sequences = random_sequences("combined")
    reference = new_model("mistral")
    expected = plain_losses(reference, sequences, objective)
    expected["total"].backward()
    model = new_model("mistral")
    assert_same_step(model, reference, packed_losses(model, sequences, objective), expected)


def test_token_weights_by_rank():
    (batch,) = split_batch({"sequences": [answered("BCA", 3), answered("AB", 2)]}, max_lists=2)
    logits = torch.randn(len(batch["target_ids"]), 96)
    objective = Objective("generation", token_weights="by_rank")
    weight = {place: 1 + 1 / math.log2(place + 1) for place in (1, 2, 3)}
    # Targets: bracket, identifier, separator, identifier, …, end.
    weights = [1, weight[1], 1, weight[2], 1, weight[3], 1, 1, weight[1], 1, weight[2], 1]
    nats = F.cross_entropy(logits, batch["target_ids"], reduction="none") * torch.tensor(weights)
    assert float(objective(logits, batch)["total"]) == pytest.approx(float(nats.mean()), rel=1e-6)
    sequences = random_sequences("combined", num=7)
    unsplit, split = new_model("mistral"), new_model("mistral")
    parts = packed_losses(split, sequences, objective, limit={"max_lists": 2})
    assert_same_step(split, unsplit, parts, packed_losses(unsplit, sequences, objective))


@pytest.mark.parametrize("token_weights", ["equal", "by_rank"])
def test_an_answer_may_name_tied_candidates_in_any_order(token_weights):
    values = {"CABD": [1, 0, 2, 0], "BA": [0, 1], "BCA": [1, 1, 1], "ACB": None}  # C: A and B or D is as right, …
    sequences = [graded(answered(order, len(order)), grades) for order, grades in values.items()]
    by_scores = replace(sequences[2].relevance, grades=np.full(3, np.nan, np.float32))  # tied by the teacher's scores
    sequences[2] = replace(sequences[2], relevance=by_scores)
    (batch,) = split_batch({"sequences": sequences}, max_lists=4)
    logits = torch.randn(len(batch["target_ids"]), 96)
    nats, row = [], 0
    for order, grades in values.items():
        named = ""
        for token in [91, *(token for name in order for token in (ord(name), 62))]:
            right, weight = [token], 1.0
            if chr(token) in order:
                if grades is not None:
                    equals = [name for name in order if grades[ord(name) - 65] == grades[token - 65]]
                    right = [ord(name) for name in equals if name not in named]
                named += chr(token)
                weight += 1 / math.log2(len(named) + 1) if token_weights == "by_rank" else 0
            nats.append(-weight * float(logits[row].double().softmax(0)[right].sum().log()))
            row += 1
    objective = Objective("generation", token_weights=token_weights)
    assert float(objective(logits, batch)["total"]) == pytest.approx(sum(nats) / len(nats), rel=1e-6)


def test_an_order_of_equals_has_no_gradient():
    sequences = [graded(answered(order, 3), [0, 1, 0]) for order in ("BAC", "BCA")]
    gradients = []
    for sequence in sequences:
        (batch,) = split_batch({"sequences": [sequence]}, max_lists=1)
        logits = torch.zeros(len(batch["target_ids"]), 96, requires_grad=True)
        Objective("generation")(logits, batch)["total"].backward()
        gradients.append(logits.grad)
    at_second = [gradient[3] for gradient in gradients]  # of the identifiers
    torch.testing.assert_close(*at_second)
    assert float(at_second[0][65]) == pytest.approx(float(at_second[0][67])) and at_second[0][65] < 0


def graded(sequence: TokenizedList, grades: list[int] | None) -> TokenizedList:
    """The list with grades that order it, or with its answer's strict order."""
    unknown, ranks = np.full(len(sequence.encoded.ranks), np.nan, np.float32), sequence.encoded.ranks
    if grades is None:
        return replace(sequence, relevance=Relevance(ranks, unknown, unknown))
    tied_ranks = np.array([sum(other > grade for other in grades) for grade in grades])
    return replace(sequence, relevance=Relevance(tied_ranks, np.array(grades, np.float32), unknown))


def answered(order: str, num_candidates: int) -> TokenizedList:
    """A list with the answer `[X>X>X` and an end; identifiers are the tokens 65 and on."""
    answer = [91, *(token for name in order for token in (ord(name), 62))]
    encoded = EncodedRecord(
        input_ids=np.array([1, 2, 3, *answer], np.int32),
        response_start=3,
        score_position=3,
        identifier_token_ids=np.arange(65, 65 + num_candidates, dtype=np.int32),
        ranks=np.array([order.index(chr(65 + i)) for i in range(num_candidates)]),
    )
    return TokenizedList(encoded, order, 0)


OWN_LOSS = """
def first(scores, ranks, *, mask, reduction, teacher_scores, scale):
    assert reduction == "none" and mask.shape == scores.shape and not teacher_scores[mask].isnan().any()
    return scale * (scores * (ranks == 0) * mask).sum(dim=1)

def wrong(scores, ranks, *, mask, reduction):
    return scores.sum()
"""


def test_a_loss_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "own_losses_of_a_test.py").write_text(OWN_LOSS)
    (tmp_path / "broken_loss_of_a_test.py").write_text("def loss(:")
    monkeypatch.syspath_prepend(tmp_path)
    sequences = random_sequences("combined")
    own = Objective("ranking", ranking_loss="own_losses_of_a_test:first", ranking_loss_options={"scale": 2.0})
    model = new_model("mistral")
    expected = plain_losses(model, sequences, Objective("combined"), list_loss=lambda s, r: 2 * s[0, r[0] == 0].sum())
    assert float(packed_losses(model, sequences, own)["ranking"]) == pytest.approx(float(expected["ranking"]), rel=1e-5)
    with pytest.raises(
        ModelError, match=r"own_losses_of_a_test:wrong, which returned shape \(\) with reduction='none'"
    ):
        packed_losses(model, sequences, Objective("ranking", ranking_loss="own_losses_of_a_test:wrong"))
    for name, message in {
        "own_losses_of_a_test:none": "cannot be imported: module 'own_losses_of_a_test' has no attribute 'none'",
        "no_such_package.losses:loss": "cannot be imported: No module named 'no_such_package'. Install its package",
        "first": "expected one of .*, or package.module:function",
        "own_losses_of_a_test:__name__": r"expected a function\. Name one of own_losses_of_a_test\.",
        "own_losses_of_a_test:first": r"called with \(scores, ranks, mask=, reduction=\): missing .*'scale'\.",
        "broken_loss_of_a_test:loss": r"cannot be imported: invalid syntax .*\. Correct broken_loss_of_a_test\.",
    }.items():
        with pytest.raises(ModelError, match=message):
            Objective("ranking", ranking_loss=name)
    with pytest.raises(ModelError, match=r"got an unexpected keyword argument 'scales'\. Correct the function, or obj"):
        Objective("ranking", ranking_loss="own_losses_of_a_test:wrong", ranking_loss_options={"scales": 2.0})
    del sys.modules["own_losses_of_a_test"]


@pytest.mark.parametrize("limit", [{"max_lists": 1}, {"max_lists": 2}, {"max_tokens": 60}])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_does_not_depend_on_microbatches(name, limit):
    objective = Objective(name, ranking_weight=10.0)
    sequences = random_sequences(name, num=7)
    unsplit, split = new_model("mistral"), new_model("mistral")
    parts = packed_losses(split, sequences, objective, limit=limit)
    assert_same_step(split, unsplit, parts, packed_losses(unsplit, sequences, objective))


@pytest.mark.parametrize("fraction, expected", [(0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)])
def test_activation_checkpointing_by_fraction(fraction, expected):
    model = new_model("mistral")
    checkpoint_activations(model, fraction)
    assert sum(layer.gradient_checkpointing for layer in decoder_layers(model)) == expected
    with pytest.raises(ValueError, match="fraction from 0 to 1"):
        checkpoint_activations(model, 1.5)


def test_layers_that_cannot_be_recomputed():
    model = AutoModelForCausalLM.from_config(CTRLConfig(n_embd=32, n_head=2, n_layer=1, dff=16, vocab_size=96))
    checkpoint_activations(model, 0.0)
    with pytest.raises(ModelError, match=r"CTRLLMHeadModel cannot recompute its layers; .*activation_checkpointing=0"):
        checkpoint_activations(model, 1.0)
    japanese = GPTNeoXJapaneseConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=96)
    layers = decoder_layers(AutoModelForCausalLM.from_config(japanese))
    assert [type(layer).__name__ for layer in layers] == ["GPTNeoXJapaneseLayer"] * 2


def test_compiled_layers_compute_the_same(monkeypatch):
    """Check what torch.compile traces for changing lengths, without the C++ compilation, which takes a minute."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    objective = Objective("combined", ranking_weight=3.0)
    for num in (2, 5):
        sequences = random_sequences("combined", num=num, seed=num)
        reference, model = new_model("mistral"), new_model("mistral")
        expected = packed_losses(reference, sequences, objective)
        parts = packed_losses(model, sequences, objective, compile_layers=True, activation_checkpointing=1.0)
        assert all(layer._compiled_call_impl is not None for layer in decoder_layers(model))
        assert_same_step(model, reference, parts, expected)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_bfloat16_products_on_cpu(name):
    """Products are in bfloat16, and close to float32's; weights, gradients and losses stay float32."""
    objective = Objective(name, ranking_weight=3.0)
    sequences = random_sequences(name)
    reference, model = new_model("mistral"), new_model("mistral")
    expected = packed_losses(reference, sequences, objective)
    computed = []
    for layer in decoder_layers(model):
        layer.self_attn.q_proj.register_forward_hook(lambda _module, _inputs, output: computed.append(output.dtype))
    parts = packed_losses(model, sequences, objective, bf16_on_cpu=True, activation_checkpointing=1.0)
    assert set(computed) == {torch.bfloat16} and len(computed) == 8  # forward pass and recomputation
    for part, value in parts.items():
        assert value.dtype == torch.float32 and value != expected[part]
        torch.testing.assert_close(value, expected[part], rtol=2e-2, atol=0)
    found, against = gradients(model), gradients(reference)
    for parameter, gradient in found.items():  # at least 0.9796, in torch 2.11
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(gradient.flatten(), against[parameter].flatten(), dim=0) > 0.97, parameter
    whole = [torch.cat([part[name].flatten() for name in found]) for part in (found, against)]
    assert F.cosine_similarity(*whole, dim=0) > 0.99


def test_logits_only_where_they_count():
    sequences = random_sequences("combined")
    (batch,) = split_batch({"sequences": sequences}, max_lists=10)
    model = ListwiseReranker(new_model("mistral"), None, Objective("combined"))
    assert model(batch)["logits"].shape == (sum(4 * len(s.encoded.ranks) for s in sequences), 96)

    (batch,) = split_batch({"sequences": random_sequences("ranking")}, max_lists=10)
    model = ListwiseReranker(new_model("mistral"), None, Objective("ranking"))
    different = len(np.unique(batch["identifier_token_ids"]))
    assert model(batch)["logits"].shape == (5, different)
    assert "forward" not in vars(model.output_head)  # the LM head is restored


def new_list(prompt: int, objective: str) -> TokenizedList:
    """Create a list of `prompt` prompt tokens, 4 candidates and a response of 16 tokens."""
    encoded = EncodedRecord(
        input_ids=np.arange(prompt + (0 if objective == "ranking" else 16), dtype=np.int32) % 96,
        response_start=prompt,
        score_position=prompt - 1 if objective == "ranking" else prompt,
        identifier_token_ids=np.arange(10, 14, dtype=np.int32),
        ranks=np.array([2, 0, 3, 1]),
    )
    return TokenizedList(encoded, "r", 0)


def peak_of_a_step(vocabulary: int, prompt: int, objective: str) -> int:
    """Return the peak bytes in use during one forward and backward pass, from the events of torch's allocator."""
    torch.manual_seed(0)
    config = MistralConfig(**{**SIZES, "vocab_size": vocabulary}, sliding_window=None)
    model = ListwiseReranker(AutoModelForCausalLM.from_config(config), None, Objective(objective))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        (batch,) = split_batch({"sequences": [new_list(prompt, objective)]}, max_lists=1)
        model.loss(model(batch), batch)["total"].backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(in_use.max())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_peak_memory_does_not_grow_with_vocabulary_times_prompt(name):
    """A longer prompt costs the same at any vocabulary: logits are not computed at its positions."""
    small, large, short, long = 4_000, 40_000, 200, 1_000
    growth = {size: peak_of_a_step(size, long, name) - peak_of_a_step(size, short, name) for size in (small, large)}
    every_place = 4 * (large - small) * (long - short)
    assert abs(growth[large] - growth[small]) < 0.05 * every_place
    assert peak_of_a_step(large, long, name) < 0.5 * every_place


def test_a_microbatch_with_nothing_to_train_has_zero_gradient():
    for name in OBJECTIVES:
        model = new_model("mistral")
        parts = packed_losses(model, [TokenizedList(None, "too long", 0)], Objective(name))
        assert parts["total"] == 0.0
        assert all(gradient.abs().max() == 0.0 for gradient in gradients(model).values())


TRAJECTORIES = json.loads((GOLDEN / "training_steps.json").read_text())["trajectories"]
LOSS_OF = {
    "ranknet": ("ranknet", {"weighted": False}, 1.0),
    "ranknet_weighted": ("ranknet", {"weighted": True}, 10.0),
    "listnet": ("listnet", {"target": "self_sorted"}, 0.1),
    "lambda": ("lambdarank", {"target": "self_sorted"}, 1.0),
}


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
@pytest.mark.parametrize("max_lists", [6, 2])
def test_published_training_steps(trajectory, max_lists, mistral_v3_tokenizer):
    """Loss parts and gradient norm of five AdamW steps, measured with the published code (tests/golden)."""
    name, loss_name = trajectory.split("/")
    loss, options, weight = LOSS_OF[loss_name]
    objective = Objective(
        name, ranking_loss=loss, ranking_loss_options=options, ranking_weight=1.0 if name == "ranking" else weight
    )
    records = json.loads((GOLDEN / "records.json").read_text())
    sequences = [
        TokenizedList(encode_record(record, mistral_v3_tokenizer, name), record["id"], index)
        for index, record in enumerate(records)
    ]
    model = load_causal_lm(ModelOptions(name_or_path=GOLDEN / "tiny_mistral"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for expected in TRAJECTORIES[trajectory]:
        parts = packed_losses(model, sequences, objective, limit={"max_lists": max_lists})
        for part in ("total", "language_modelling", "ranking"):
            if expected[part] is None:
                assert part not in parts
            else:
                assert float(parts[part]) == pytest.approx(expected[part], rel=1e-4)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        assert float(norm) == pytest.approx(expected["grad_norm"], rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()


def test_load_errors_name_the_recipe_key(tmp_path):
    with pytest.raises(ModelError, match=r"model\.name_or_path: cannot load .*set a local folder"):
        load_causal_lm(ModelOptions(name_or_path=tmp_path / "absent"))
    with pytest.raises(ModelError, match=r"config_overrides contains hidden_sise; expected keys of MistralConfig"):
        load_causal_lm(ModelOptions(name_or_path=GOLDEN / "tiny_mistral", config_overrides={"hidden_sise": 3}))
    tied = load_causal_lm(
        ModelOptions(name_or_path=GOLDEN / "tiny_mistral", random_weights=True, config_overrides={"hidden_size": 64})
    )
    assert tied.config.hidden_size == 64 and tied.dtype == torch.float32
    meta = load_causal_lm(ModelOptions(name_or_path=GOLDEN / "tiny_mistral"), on_meta=True)
    assert all(parameter.is_meta for parameter in meta.parameters())


FOREIGN_CODE = """
from pathlib import Path
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

Path({trap!r}).touch()

class ForeignConfig(MistralConfig):
    model_type = "foreign"

class ForeignLM(MistralForCausalLM):
    config_class = ForeignConfig

class ForeignTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer], ids=["model", "tokenizer"])
def test_code_shipped_with_a_model_runs_only_on_request_and_with_a_warning(tmp_path, monkeypatch, load):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, trap = tmp_path / "foreign_model", tmp_path / "was run"
    new_tokenizer().save_pretrained(folder)
    (folder / "foreign.py").write_text(FOREIGN_CODE.format(trap=str(trap)))
    config = json.loads((GOLDEN / "tiny_mistral" / "config.json").read_text())
    names = {"AutoConfig": "foreign.ForeignConfig", "AutoModelForCausalLM": "foreign.ForeignLM"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "foreign", "auto_map": names}))
    keys = json.loads((folder / "tokenizer_config.json").read_text())
    keys |= {"auto_map": {"AutoTokenizer": [None, "foreign.ForeignTokenizer"]}, "tokenizer_class": "ForeignTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(keys))
    options = {"name_or_path": folder, "random_weights": True}
    with pytest.raises(ModelError, match="foreign_model"):
        load(ModelOptions(**options))
    assert not trap.exists()
    with pytest.warns(UserWarning, match="model.trust_remote_code: Python code shipped with '.*foreign_model' will be"):
        assert type(load(ModelOptions(**options, trust_remote_code=True))).__name__.startswith("Foreign")
    assert trap.exists()
