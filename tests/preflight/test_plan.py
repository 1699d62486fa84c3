"""`plan`: bytes against arithmetic, autograd and the allocator; updates, hours and suggestions against arithmetic."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig
from support.launching import REPOSITORY
from support.list_shards import build_from_file
from support.synthetic_records import conversation, write_jsonl
from support.toy_recipe import MISTRAL_7B, TOY
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MistralConfig

from rankllm_composer.cli import main
from rankllm_composer.data import packing
from rankllm_composer.errors import RunError
from rankllm_composer.model.flops import training_flops
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.reranker import ListwiseReranker, checkpoint_activations
from rankllm_composer.options import ModelOptions
from rankllm_composer.preflight.hub import SHAPES, published_shape
from rankllm_composer.preflight.memory import Memory, Workload, placeholder_lists, plan_memory
from rankllm_composer.preflight.plan import GPUS, Gpu, plan_recipe
from rankllm_composer.preflight.suggestions import suggest
from rankllm_composer.preflight.tracking import ReplicaTracker
from rankllm_composer.recipe.advice import data_advice
from rankllm_composer.recipe.load import load_recipe
from rankllm_composer.shards.verify import shards_info

FIRST_MISTRAL = REPOSITORY / "yamls" / "first_mistral.yaml"
pytestmark = [
    pytest.mark.filterwarnings("ignore:FSDP2 Config/APIs are experimental"),
    pytest.mark.filterwarnings("ignore:.*has no effect. parallelism.fsdp is false"),
]


def shapes(keys):
    """Weights of a Mistral: name → shape, spelled out."""
    hidden, inner = keys["hidden_size"], keys["intermediate_size"]
    narrow = hidden // keys["num_attention_heads"] * keys["num_key_value_heads"]
    layer = (
        [(hidden, hidden)] * 2 + [(narrow, hidden)] * 2 + [(inner, hidden)] * 2 + [(hidden, inner)] + [(hidden,)] * 2
    )
    return layer * keys["num_hidden_layers"] + [(keys["vocab_size"], hidden)] * 2 + [(hidden,)]


def shard_bytes(keys, num_ranks):
    """Rank 0's shard of each weight: the first of `num_ranks` slices of its rows, float32."""
    return [4 * math.ceil(shape[0] / num_ranks) * math.prod(shape[1:]) for shape in shapes(keys)]


def toy_work(**changes):
    options = {"precision": "fp32", "attention": "packed_sdpa", "num_targets": 12, "num_candidates": 4}
    config = MistralConfig(**TOY)
    return Workload(config, Objective("combined"), (40, 30), **(options | changes))


@pytest.mark.parametrize("keys, num_ranks", [(TOY, 8), (MISTRAL_7B | {"num_hidden_layers": 2}, 64), (TOY, 512)])
def test_shards_are_exact_for_any_number_of_ranks(keys, num_ranks):
    memory = plan_memory(Workload(MistralConfig(**keys), Objective("combined"), (64, 64), num_ranks=num_ranks))
    shards = shard_bytes(keys, num_ranks)
    rotary = 4 * keys["hidden_size"] // keys["num_attention_heads"] // 2  # inverse frequencies, a buffer
    assert memory.held["weights"] - sum(shards) in (rotary, 2 * rotary)  # transformers may keep the original beside it
    assert memory.held["gradients"] == sum(shards)
    assert memory.held["optimizer"] == 2 * sum(shards) + 4 * len(shards)
    assert memory.num_parameters == memory.num_trained == sum(map(math.prod, shapes(keys)))
    assert memory.peak >= sum(memory.held.values())


def test_optimizer_state_of_adamw_and_adamw_8bit():
    memory = plan_memory(toy_work(fsdp=False))
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes(TOY)]
    optimizer = torch.optim.AdamW(weights, fused=True)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    state = [tensor for entry in optimizer.state.values() for tensor in entry.values()]
    assert memory.held["optimizer"] == sum(tensor.nbytes for tensor in state)
    eight_bit = plan_memory(toy_work(fsdp=False, optimizer="adamw_8bit")).held["optimizer"]
    expected = 0
    for count in map(math.prod, shapes(TOY)):
        small = 2 * 4 * count + 4  # two float32 averages and the step
        expected += small if count < 4096 else 2 * (count + 4 * math.ceil(count / 256) + 4 * 256)
    assert eight_bit == expected


@pytest.mark.parametrize("checkpointing", [0.0, 1.0])
def test_counted_activations_are_what_autograd_saves(checkpointing):
    """After a real forward pass: the storages that saved-tensor hooks see, and the outputs."""
    work = toy_work()
    base = AutoModelForCausalLM.from_config(work.config).train()
    checkpoint_activations(base, checkpointing)
    model = ListwiseReranker(base, None, work.objective)
    (batch,) = packing.split_batch({"sequences": placeholder_lists(work)}, max_lists=2)
    inputs = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    existing = [*model.parameters(), *model.buffers(), *inputs]
    known = {tensor.untyped_storage().data_ptr() for tensor in existing}
    saved: dict[int, int] = {}
    tracker = ReplicaTracker(model)
    tracker.track_external(*inputs)
    before = tracker.bytes_by_part("current")["activations"]

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with tracker, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(batch)
    for tensor in outputs.values():
        pack(tensor)
    if checkpointing:  # a checkpoint keeps its layer's arguments: cosines and sines (T, 16), positions (T,)
        saved[0] = 2 * 70 * 16 * 4 + 70 * 8
    counted = tracker.bytes_by_part("current")["activations"] - before
    assert counted == pytest.approx(sum(saved.values()), rel=0.001)


RECOMPUTED = {"activation_checkpointing": 1.0}


@pytest.mark.parametrize(
    "changes", [{}, RECOMPUTED, RECOMPUTED | {"keeps_attention": True}, {"accumulates": False}], ids=str
)
def test_peak_is_within_a_tenth_of_the_allocators(changes):
    """Against two real updates in this process, by the allocator's events."""
    work = toy_work(fsdp=False, **changes)
    planned = plan_memory(work)
    batches = [
        packing.split_batch({"sequences": placeholder_lists(work)}, max_lists=2)[0]
        for _ in range(2 if work.accumulates else 1)
    ]
    base = AutoModelForCausalLM.from_config(work.config).train()
    checkpoint_activations(base, work.activation_checkpointing, work.keeps_attention)
    model = ListwiseReranker(base, None, work.objective)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    in_use = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for _ in range(2):
            for batch in batches:
                outputs = model(batch)
                model.loss(outputs, batch)["total"].backward()
            optimizer.step()
            optimizer.zero_grad()
    highest = in_use
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        highest = max(highest, in_use)
    assert planned.peak == pytest.approx(highest, rel=0.1)


def test_settings_change_the_parts_they_concern():
    """Recomputation reduces activations; a ranking loss needs few logits."""
    plain = plan_memory(toy_work(num_ranks=4))
    recomputed = plan_memory(toy_work(num_ranks=4, activation_checkpointing=1.0))
    ranking = plan_memory(dataclasses.replace(toy_work(num_ranks=4), objective=Objective("ranking")))
    halves = plan_memory(toy_work(num_ranks=4, precision="amp_bf16"))

    # Kept attention: (T, H, d) in bfloat16 and one number for each token and head. A layer may have its own.
    lists = {"precision": "amp_bf16", "activation_checkpointing": 1.0}
    for attention in ("packed_sdpa", "flash_attention_2"):
        least, kept = (
            plan_memory(dataclasses.replace(toy_work(attention=attention, **lists, **keep), lengths=(400, 300)))
            for keep in ({}, {"keeps_attention": True})
        )
        of_one_layer = 700 * (2 * TOY["hidden_size"] + 4 * TOY["num_attention_heads"])
        added = (kept.at_peak["activations"] - least.at_peak["activations"]) / of_one_layer
        assert 1 <= added <= TOY["num_hidden_layers"], attention
    assert recomputed.at_peak["activations"] < plain.at_peak["activations"]
    assert halves.at_peak["activations"] < plain.at_peak["activations"]
    assert recomputed.held == plain.held == halves.held
    assert ranking.at_peak["logits"] < plain.at_peak["logits"]
    assert plain.at_peak["buffers"] > 0 == plan_memory(toy_work(fsdp=False)).at_peak["buffers"]
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    MistralConfig(**TOY).save_pretrained(folder)
    return folder


def toy_recipe(folder, *more):
    return load_recipe(
        FIRST_MISTRAL,
        [
            f"model.name_or_path={folder}",
            "data.max_length_tokens=128",
            "batch.microbatch_tokens=512",
            "data.train.local=absent",
            *more,
        ],
    )


def quiet(line):
    pass


def test_updates_learning_rate_and_hours(toy_folder):
    found = plan_recipe(toy_recipe(toy_folder), 8, gpu="a100-80gb", mfu=0.25, num_lists=40_000, report=quiet)
    assert (found.steps_per_epoch, found.num_steps, found.num_warmup) == (313, 939, 50)  # 40,000 / 128 = 312.5
    assert found.flops_per_list == training_flops(MistralConfig(**TOY), [128], 64)
    assert found.num_hours == pytest.approx(939 * 128 * found.flops_per_list / (8 * 312e12 * 0.25 * 3600))
    text = "\n".join(found.lines())
    assert "update 1: 0, update 51: 5e-06" in text and "▁▅███" in text
    assert "16 per rank, in microbatches of at most 512 tokens" in text
    assert "25% (given)" in text
    assert "each is assumed to have 128 tokens, the limit" in text and found.fits
    short = plan_recipe(toy_recipe(toy_folder), 8, num_lists=300, report=quiet)  # 3 updates in 3 epochs
    assert "warning: schedule.warmup is 50ba, 50 updates, but the run has 9 " in "\n".join(short.lines())
    unknown = plan_recipe(toy_recipe(toy_folder, "data.expected_lists=null"), 8, report=quiet)
    assert unknown.num_steps is unknown.num_hours is None
    assert "time          less than a minute for each 10,000 lists: pass --lists" in "\n".join(unknown.lines())


def test_local_lists_are_counted_and_measured(toy_folder, tmp_path, mistral_v3_folder):
    source = write_jsonl(tmp_path / "records.jsonl", (conversation(index) for index in range(300)))
    recipe = toy_recipe(
        toy_folder,
        "data.max_length_tokens=512",
        f"data.train.source.input={source}",
        f"model.tokenizer={mistral_v3_folder}",
    )
    found = plan_recipe(recipe, 2, report=quiet)
    assert found.steps_per_epoch == 3 and found.lengths.num_lists == len(found.lengths.tokens) == 300
    mean = round(np.mean(found.lengths.tokens))
    assert sum(found.work.lengths) == 512 and found.work.lengths[0] == mean
    text = "\n".join(found.lines())
    assert f"longest {max(found.lengths.tokens)}; 0 above the limit of 512" in text and "#####" in text
    assert "40% (the default, not measured)" in text and "advice: " not in text


def test_advice_follows_the_ties_and_the_order_of_the_lists(toy_folder, tmp_path):
    layouts = [conversation(index, num_candidates=6, gpt="[B] > [A] > [C] > [D] > [E] > [F]") for index in range(80)]
    graded = {"grades": [1, 2, 0, 0, 0, 0], "ordered_by": "grades"}  # 6 of 15 pairs are tied, 8 of 9 in a good order
    source = write_jsonl(tmp_path / "records.jsonl", (layout | graded for layout in layouts))
    build_from_file(tmp_path / "shards", source)
    assert "pairs         40% tied, 53% presented with the better candidate first, 7% last" in "\n".join(
        shards_info(tmp_path / "shards").lines()
    )
    recipe = ["data.train.source=null", f"data.train.local={tmp_path / 'shards'}"]

    def advice(*overrides):
        found = plan_recipe(toy_recipe(toy_folder, *recipe, *overrides), 1, report=quiet)
        return [line.removeprefix("  advice: ") for line in found.lines() if line.startswith("  advice: ")]

    (shuffle,) = advice()
    assert "presents 89% of the pairs that are not tied" in shuffle and "data.train.shuffle_passages=true." in shuffle
    assert advice("data.train.shuffle_passages=true") == []
    (ordered,) = advice("data.train.shuffle_passages=true", "objective.ties=ordered")
    assert ordered.startswith("40% of the pairs") and ordered.endswith("Set objective.ties=tied.")
    strict = toy_recipe(toy_folder, "objective.ties=ordered")
    assert list(data_advice(strict, {"tied": 300, "as_presented": 100, "reversed": 100})) == []  # too few


def test_suggestions_make_a_run_fit(toy_folder, monkeypatch):
    settings = ["parallelism.fsdp=false", "optimizer.name=adamw_8bit", "batch.microbatch_tokens=128"]
    recomputed, plain = (
        plan_recipe(toy_recipe(toy_folder, *settings, f"model.activation_checkpointing={share}"), 2, report=quiet)
        for share in (1.0, 0.0)
    )
    monkeypatch.setitem(GPUS, "toy", Gpu(int((recomputed.memory.peak + plain.memory.peak) / 2 / 0.9), 1e12))
    found = plan_recipe(plain.recipe, 2, gpu="toy", report=quiet)
    assert not found.fits
    (suggestion, memory), *others = found.suggestions
    assert suggestion == "model.activation_checkpointing=1.0"
    assert {change for change, _ in others} <= {"model.lora.frozen_precision=bf16"}
    assert memory.peak == recomputed.memory.peak <= found.gpu.usable_bytes
    assert "fits with model.activation_checkpointing=1.0" in "\n".join(found.lines())
    monkeypatch.setitem(GPUS, "toy", Gpu(1000, 1e12))
    hopeless = plan_recipe(recomputed.recipe, 2, gpu="toy", report=quiet)
    assert hopeless.suggestions == () and "no suggestion makes it fit" in "\n".join(hopeless.lines())


@pytest.mark.parametrize(("fsdp", "num_ranks"), [(True, 2), (True, 1), (False, 2)])
def test_what_is_suggested_is_a_recipe_that_can_be_trained(toy_folder, fsdp, num_ranks):
    """bitsandbytes cannot update the weights that FSDP2 shards, and FSDP2 cannot shard frozen weights in bfloat16."""
    recipe = toy_recipe(toy_folder, f"parallelism.fsdp={fsdp}", "model.activation_checkpointing=0")
    tried: list[str] = []
    nothing_fits = Memory({}, {"weights": 10}, 1, 1)
    assert not list(suggest(recipe, num_ranks, 1, lambda changed, ranks: nothing_fits, tried.append))
    alone = [line.removeprefix("tries ") for line in tried if " and " not in line]
    assert ("optimizer.name=adamw_8bit" in alone) is not fsdp
    assert any(change.startswith("model.lora.") for change in alone)
    for change in alone:
        if "GPUs" not in change:
            assert toy_recipe(toy_folder, f"parallelism.fsdp={fsdp}", *change.split()) != recipe


def test_no_key_is_suggested_twice(toy_folder):
    """Of each key the mildest change that suffices; if none does, the strongest of each together."""
    recipe = toy_recipe(toy_folder, "batch.microbatch_tokens=4096")
    needed = {4096: 100, 2048: 60, 1024: 40, 128: 20}

    def memory(changed, ranks):
        lora = 0 if changed.model.lora is None else 15
        bytes_needed = needed[changed.batch.microbatch_tokens] * 8 // ranks - lora
        return Memory({}, {"weights": bytes_needed}, 1, 1)

    def suggested(usable):
        return [text for text, _ in suggest(recipe, 8, usable, memory, quiet)]

    assert suggested(60) == ["batch.microbatch_tokens=2048", "16 GPUs"]
    assert suggested(90) == ["batch.microbatch_tokens=2048", "model.lora.rank=16", "16 GPUs"]
    assert suggested(5) == ["batch.microbatch_tokens=128 and model.lora.rank=16"]
    assert suggested(4) == ["batch.microbatch_tokens=128 and model.lora.rank=16 and 64 GPUs"]


ADAPTERS = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
IN_HALVES = {"precision": "amp_bf16", "attention": "packed_varlen"}  # autocast keeps what it converts until the loss
GEMMA = Gemma3TextConfig(
    **TOY | {"num_hidden_layers": 9, "head_dim": 16, "sliding_window": 16}, layer_types=None, sliding_window_pattern=3
)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_ranks": 4, "activation_checkpointing": 0.5},
        IN_HALVES | {"fsdp": False, "activation_checkpointing": 1.0},
        IN_HALVES | {"fsdp": False, "num_ranks": 2, "accumulates": False},
        IN_HALVES | {"fsdp": False, "peft_config": ADAPTERS, "frozen_precision": "bf16"},
        {"config": GEMMA, "num_ranks": 2},
    ],
    ids=["half recomputed", "all recomputed", "copies", "LoRA", "layers that alternate"],
)
def test_few_layers_tell_the_memory_of_all(changes):
    work = dataclasses.replace(toy_work(), config=MistralConfig(**TOY | {"num_hidden_layers": 10}))
    work = dataclasses.replace(work, **changes)
    few, whole = plan_memory(work), plan_memory(work, few_layers=False)
    if work.config is GEMMA:  # what is freed at a change of kind differs a little with the kinds beside it
        assert few.at_peak.pop("activations") == pytest.approx(whole.at_peak.pop("activations"), rel=0.003)
    assert few == whole


def test_a_plan_does_not_take_longer_for_more_layers():
    """Modules that run, by torch's hook for all; and the bytes of layers that did not run, by arithmetic."""
    ran: list[str] = []
    runs, memories = [], []
    handle = register_module_forward_pre_hook(lambda module, _: ran.append(type(module).__name__))
    try:
        for num_layers in (12, 60):
            config = MistralConfig(**TOY | {"num_hidden_layers": num_layers})
            memories.append(plan_memory(dataclasses.replace(toy_work(fsdp=False), config=config)))
            runs.append(list(ran))
            ran.clear()
    finally:
        handle.remove()
    assert runs[0] == runs[1] and 0 < runs[0].count("MistralDecoderLayer") <= 2 * 5
    one_layer = sum(map(math.prod, shapes(TOY | {"num_hidden_layers": 1}))) - sum(
        map(math.prod, shapes(TOY | {"num_hidden_layers": 0}))
    )
    assert memories[1].num_parameters - memories[0].num_parameters == 48 * one_layer
    for part in ("weights", "gradients"):
        assert memories[1].held[part] - memories[0].held[part] == 48 * one_layer * 4
    assert config.num_hidden_layers == 60


def test_small_and_large_figures_are_readable(toy_folder):
    found = plan_recipe(toy_recipe(toy_folder), 8, num_lists=300, report=quiet)
    text = "\n".join(found.lines())
    assert "less than a minute, less than 0.1 GPU hours, at an MFU" in text and "e+" not in text
    assert f"FLOPs         {found.flops_per_list / 1e6:,.1f} MFLOP per list" in text
    many = "\n".join(dataclasses.replace(found, num_steps=10**6, flops_per_list=185 * 10**12).lines())
    assert "185.0 TFLOP per list" in many and "23,680.0 EFLOP in total" in many


def test_a_plan_needs_no_run_that_lists_would_be_made_from(toy_folder, tmp_path):
    recipe = toy_recipe(
        toy_folder, f"data.train.source={{run: {tmp_path / 'absent.trec'}, judgments: {tmp_path / 'absent.qrels'}}}"
    )
    assert plan_recipe(recipe, 8, report=quiet).lengths.num_lists == 40_000


def test_shapes_are_those_of_the_published_models():
    """Parameters as the model pages state them."""
    counts = {"mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552, "HuggingFaceH4/zephyr-7b-beta": 7_241_732_096}
    counts |= {"Qwen/Qwen3-0.6B": 596_049_920, "Qwen/Qwen3-8B": 8_190_735_360}
    counts |= {"meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400}
    for name, count in counts.items():
        config = published_shape(ModelOptions(name_or_path=name))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert model.num_parameters() == count, name
    assert {load_recipe(path).model.name_or_path for path in FIRST_MISTRAL.parent.glob("*.yaml")} <= SHAPES.keys()
    assert published_shape(ModelOptions(name_or_path="owner/name")) is None


def test_errors_explain_what_a_plan_needs(toy_folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    elsewhere = load_recipe(FIRST_MISTRAL, ["model.name_or_path=owner/name"])
    with pytest.raises(RunError, match=r"owner/name, which is not on this machine, and there is no network"):
        plan_recipe(elsewhere, 8, report=quiet)
    with pytest.raises(RunError, match="gpu is abacus; expected one of h100-80gb"):
        plan_recipe(toy_recipe(toy_folder), 8, gpu="abacus", report=quiet)
    with pytest.raises(RunError, match=r"Did you mean a100-80gb\?"):
        plan_recipe(toy_recipe(toy_folder), 8, gpu="A100", report=quiet)
    with pytest.raises(RunError, match="mfu is 40; expected a share"):
        plan_recipe(toy_recipe(toy_folder), 8, mfu=40, report=quiet)
    with pytest.raises(ValueError, match=r"a multiple of 7 \(7 ranks\)"):
        plan_recipe(toy_recipe(toy_folder), 7, report=quiet)


@pytest.mark.slow
def test_first_mistral_on_eight_cards(capsys):
    """The complete 7B model, 32 layers, on the command line, without its config.json, its data and a network."""
    with pytest.raises(SystemExit) as stop:
        main(["plan", str(FIRST_MISTRAL), "-n", "8"])
    out = capsys.readouterr().out
    assert not stop.value.code
    assert "7,248,023,552 parameters" in out and "updates       939, 313 per epoch" in out
    assert f"gradients {sum(shard_bytes(MISTRAL_7B, 8)) / 2**30:.2f} GiB" in out and "fits in 71.19 GiB" in out
    assert "1.95 hours, 15.6 GPU hours" in out


def test_json_and_exit_code_of_a_plan(toy_folder, monkeypatch, capsys):
    overrides = [f"model.name_or_path={toy_folder}", "data.max_length_tokens=128", "batch.microbatch_tokens=128"]

    def plan(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["plan", str(FIRST_MISTRAL), *overrides, "--json", *arguments])
        return stop.value.code or 0, json.loads(capsys.readouterr().out)

    code, found = plan("--gpus", "8", "--mfu", "0.5")
    assert (code, found["fits"], found["num_ranks"], found["updates"]) == (0, True, 8, 939)
    assert found["num_lists"] == 40_000 and found["peak_bytes"] >= sum(found["at_update_bytes"].values())
    hours = 939 * 128 * found["flops_per_list"] / (8 * 989.4e12 * 0.5 * 3600)
    assert found["hours"] == pytest.approx(hours) and found["gpu_hours"] == pytest.approx(8 * hours)
    monkeypatch.setitem(GPUS, "toy", Gpu(1000, 1e12))
    code, found = plan("--gpu", "toy")
    assert (code, found["fits"], found["suggestions"]) == (3, False, [])
    code, found = plan("--gpu", "abacus")
    assert code == 2 and found["error"].startswith("gpu is abacus; expected one of")
