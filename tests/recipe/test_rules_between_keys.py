"""Rules between keys: contradictions, options without effect, the number of ranks, and missing files."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
from support.recipes import problems

from rankllm_composer.errors import RecipeError
from rankllm_composer.recipe.checks import check_world, missing_files
from rankllm_composer.recipe.load import RecipeWarning, load_recipe

TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz0123"
TREC = "data.train.source={run: r.trec, queries: q.jsonl, docs: d.jsonl, judgments: q.qrels"
CPU = "parallelism.device=cpu"


@pytest.mark.parametrize(
    "overrides, key, part",
    [
        (["batch.microbatch_lists=null"], "batch.microbatch_lists", "null, as is batch.microbatch_tokens"),
        (["batch.microbatch_tokens=4096"], "batch.microbatch_lists", "set, and so is batch.microbatch_tokens"),
        (["batch.microbatch_lists=null", "batch.microbatch_tokens=4095"], "batch.microbatch_tokens", "4095"),
        (["batch.microbatch_lists=3"], "batch.microbatch_lists", "3"),
        (["batch.microbatch_lists=16"], "batch.microbatch_lists", "16"),
        (["objective.ranking_weight=0"], "objective.ranking_weight", "0 with objective.name: combined"),
        (["objective.name=ranking", "objective.ranking_weight=0"], "objective.ranking_weight", "0 with"),
        (["objective.language_modelling_weight=0"], "objective.language_modelling_weight", "0 with"),
        (
            ["objective.ranking_loss_options.wieghted=true"],
            "objective.ranking_loss_options.wieghted",
            "not an option of ranknet",
        ),
        (
            ["objective.ranking_loss_options.target=ranks"],
            "objective.ranking_loss_options.target",
            "not an option of ranknet",
        ),
        (["objective.ranking_loss_options.weighted=3"], "objective.ranking_loss_options.weighted", "3"),
        (
            ["objective.ranking_loss=listnet", "objective.ranking_loss_options.target=self"],
            "objective.ranking_loss_options.target",
            "'self'",
        ),
        (
            ["objective.ranking_loss=listmle", "objective.ranking_loss_options.x=1"],
            "objective.ranking_loss_options.x",
            "not an option of listmle",
        ),
        (
            ["objective.ranking_loss=listnet", "objective.ranking_loss_options.detach_target=true"],
            "objective.ranking_loss_options.detach_target",
            "without target: self_sorted",
        ),
        (["schedule.warmup=1000tok"], "schedule.warmup", "'1000tok'"),
        (["run.max_duration=1000tok"], "run.max_duration", "'1000tok'"),
        (["run.max_duration=50ba"], "schedule.warmup", "'50ba'"),
        (["schedule.warmup=1dur"], "schedule.warmup", "'1dur'"),
        ([CPU, "model.attention=flash_attention_2"], "model.attention", "with parallelism.device: cpu"),
        ([CPU, "optimizer.name=adamw_8bit"], "optimizer.name", "adamw_8bit with parallelism.device: cpu"),
        (["model.keep_attention=true", "model.compile=true"], "model.keep_attention", "true with model.compile: true"),
        (["optimizer.name=adamw_8bit"], "optimizer.name", "adamw_8bit with parallelism.fsdp: true"),
        (["model.attention=flash_attention_2", "parallelism.precision=fp32"], "model.attention", "precision: fp32"),
        ([CPU, "model.attention=packed_varlen"], "model.attention", "with parallelism.device: cpu"),
        (["model.attention=packed_varlen", "parallelism.precision=fp32"], "model.attention", "precision: fp32"),
        (["data.train.local=null"], "data.train.local", "null, and data.train.streams is empty"),
        (["data.train.streams=[{local: x}]"], "data.train.local", "set, and so is data.train.streams"),
        (
            ["data.train={streams: [{local: x}], remote: 's3://x'}"],
            "data.train.remote",
            "set, and so is data.train.streams",
        ),
        (
            ["data.train={streams: [{local: x}], source: {input: a.json}}"],
            "data.train.source",
            "set, and so is data.train.streams",
        ),
        (["data.train={streams: [{local: x, proportion: 0.5}, {local: y}]}"], "data.train.streams", "[0.5, null]"),
        (
            ["data.train={streams: [{local: x, proportion: 0.5}, {local: y, proportion: 0.4}]}"],
            "data.train.streams",
            "[0.5, 0.4]",
        ),
        (["data.train.cache_limit=1gb"], "data.train.cache_limit", "without a remote"),
        (["data.train.source={}"], "data.train.source.input", "null, as is run"),
        (["data.train.source={input: a.json, run: b}"], "data.train.source.input", "set, and so is run"),
        (["data.train.source={input: a.json, docs: d}"], "data.train.source.docs", "set"),
        (["data.train.source={run: b, docs: q, queries: j}"], "data.train.source.judgments", "null, as is teacher_run"),
        ([TREC + ", window: 27}"], "data.train.source.window", "27 with identifiers: letters"),
        ([TREC + ", window: 100, identifiers: numbers}"], "data.train.source.window", "100 with identifiers: numbers"),
        (
            ["data.train.source={run: r, docs: d, queries: q, teacher_run: t, require_relevant: true}"],
            "data.train.source.require_relevant",
            "true without",
        ),
        ([TREC + ", window: 10, stride: 11}"], "data.train.source.stride", "11"),
        (["evaluation={}"], "evaluation", "data.eval is null"),
        (["evaluation={decodings: []}", "data.eval={local: x}"], "evaluation.decodings", "[]"),
        (
            ["data.train.remote=s3://x", "data.eval={local: ./shards, remote: 's3://y'}", "evaluation={}"],
            "data.eval",
            "'shards'",
        ),
        (["checkpoint.keep=0"], "checkpoint.keep", "0"),
        (["model.lora.target_modules=[]"], "model.lora.target_modules", "[]"),
        (["model.lora.frozen_precision=bf16"], "model.lora.frozen_precision", "bf16 with parallelism.fsdp: true"),
        (
            ["model.lora.frozen_precision=bf16", "parallelism={fsdp: false, precision: fp32}"],
            "model.lora.frozen_precision",
            "bf16 with parallelism.precision: fp32",
        ),
        (["data.train.remote='s3://key:word@host/set'"], "data.train.remote", "a URL with credentials"),
        (["checkpoint.folder='https://host/set?sig=abc'"], "checkpoint.folder", "a URL with credentials"),
        (
            ["data.train={streams: [{local: x, remote: 'sftp://me:word@host/a'}]}"],
            "data.train.streams.0.remote",
            "a URL with credentials",
        ),
        (["logging.loggers={wandb: {api_key: word}}"], "logging.loggers.wandb.api_key", "looks like a secret"),
        (["logging.loggers={mlflow: {x: {Token: word}}}"], "logging.loggers.mlflow.x.Token", "looks like a secret"),
        ([f"logging.loggers={{wandb: {{notes: {TOKEN}}}}}"], "logging.loggers.wandb.notes", "looks like a secret"),
        ([f"checkpoint.folder=https://{TOKEN}@host/a"], "checkpoint.folder", "looks like a secret"),
    ],
)
def test_contradictions_are_reported_once(minimal_recipe: Path, overrides: list[str], key: str, part: str) -> None:
    found = problems(minimal_recipe, *overrides)
    assert key in found, list(found)
    assert part in found[key].found
    assert re.fullmatch(r"\S+ is .+; expected .+\. [A-Z].+[.?]", str(found[key]))
    assert len([problem for problem in found if problem.startswith(key)]) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        [CPU, "parallelism.precision=fp32"],
        ["run.max_duration=100ba", "schedule.warmup=99ba"],
        ["run.max_duration=1000sp", "schedule.warmup=5ba"],
        ["run.max_duration=3ep", "schedule.warmup=1ep"],
        ["schedule.warmup=0ba"],
        [TREC + ", window: 99, identifiers: numbers}"],
        [TREC + ", window: 26, stride: 26, lists_per_query: 0}"],
        ["data.train.remote=s3://x", "data.train.cache_limit=100GB"],
        [
            "objective.ranking_loss=lambdarank",
            "objective.ranking_loss_options={target: self_sorted, detach_target: true}",
        ],
        ["batch.microbatch_lists=null", "batch.microbatch_tokens=4096"],
        ["checkpoint.keep=-1"],
        ["data.train.remote='sftp://me@host/a'", "model.config_overrides={pad_token_id: 3, token: null}"],
    ],
)
def test_valid_combinations(minimal_recipe: Path, overrides: list[str]) -> None:
    assert problems(minimal_recipe, *overrides) == {}


def test_a_wrong_value_is_reported_once(minimal_recipe: Path) -> None:
    assert list(problems(minimal_recipe, "batch.microbatch_lists=many")) == ["batch.microbatch_lists"]
    assert list(problems(minimal_recipe, "data=3")) == ["data"]


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["objective.name=generation", "objective.ranking_weight=10"], "objective.ranking_weight = 10.0 has no effect"),
        (
            ["objective.name=generation", "objective.ranking_loss=listnet"],
            "objective.ranking_loss = listnet has no effect",
        ),
        (
            ["objective.name=generation", "objective.ranking_loss_options.weighted=true"],
            "objective.ranking_loss_options has no effect",
        ),
        (
            ["objective.name=ranking", "objective.language_modelling_weight=2"],
            "objective.language_modelling_weight = 2.0 has no effect",
        ),
        (
            ["schedule.name=constant", "schedule.final_lr_fraction=0.1"],
            "schedule.final_lr_fraction = 0.1 has no effect",
        ),
        (
            ["parallelism.fsdp=false", "parallelism.mixed_precision=PURE"],
            "parallelism.mixed_precision = PURE has no effect",
        ),
        (["data.eval={local: x}"], "data.eval has no effect: evaluation is null"),
        (["data.train.source={input: a.json, depth: 10}"], "data.train.source.depth = 10 has no effect"),
        (
            ["run.name=my_gpt_killer"],
            "checkpoint.export.folder: runs/my_gpt_killer/hf contains 'gpt', so rank_llm takes",
        ),
        (["checkpoint.export.folder=out/monot5"], "out/monot5 contains 'monot5'"),
        (
            ["data.train.identifiers=numbers", "data.client_version=0.25.7"],
            "numbers can be served by generation alone, or by data.client_version=0.26.0",
        ),
        (
            ["objective.name=ranking", "data.client_version=0.25.7"],
            "never learns to write the '[' that rank_llm 0.25.7",
        ),
        (["run.name=rank_zephyr", "checkpoint.export.folder=rank_zephyr"], "rank_zephyr is a name of rank_llm's own"),
        (
            [
                "objective.name=generation",
                "data.eval={local: held, source: {run: a, queries: b, docs: c, judgments: d, identifiers: numbers}}",
                "evaluation={interval: 1ep}",
            ],
            "windows of 20 candidates named by numbers are ranked by first_token only if the tokenizer has one token",
        ),
    ],
)
def test_values_without_effect_or_hard_to_serve_warn(minimal_recipe: Path, overrides: list[str], sentence: str) -> None:
    with pytest.warns(RecipeWarning) as caught:
        load_recipe(minimal_recipe, overrides)
    (warning,) = caught
    assert sentence in str(warning.message)
    assert warning.filename == __file__


def test_defaults_cause_no_warning(minimal_recipe: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_recipe(minimal_recipe, ["objective.name=generation", "data.eval=null", "data.train.identifiers=numbers"])
        load_recipe(minimal_recipe, ["data.train.identifiers=numbers"])
        load_recipe(minimal_recipe, ["objective.name=ranking"])


@pytest.mark.parametrize(
    "lists, microbatch, ranks, sizes",
    [
        (128, None, 8, None),
        (128, None, 6, "126 or 132"),
        (128, 16, 8, None),
        (128, 32, 8, "256"),
        (256, 32, 3, "192 or 288"),
        (4, None, 8, "8"),
    ],
)
def test_batch_sizes_that_do_not_divide_suggest_others(
    minimal_recipe: Path, lists: int, microbatch: int | None, ranks: int, sizes: str | None
) -> None:
    overrides = [f"batch.global_lists={lists}", f"batch.microbatch_lists={microbatch or 'null'}"]
    recipe = load_recipe(minimal_recipe, overrides + ([] if microbatch else ["batch.microbatch_tokens=4096"]))
    if sizes is None:
        check_world(recipe, ranks)
    else:
        with pytest.raises(RecipeError, match=f"Set batch.global_lists={sizes}, or change the number of ranks"):
            check_world(recipe, ranks)


def test_missing_files_are_found(minimal_recipe: Path, tmp_path: Path) -> None:
    def missing(*overrides: str) -> list[str]:
        return [problem.key for problem in missing_files(load_recipe(minimal_recipe, overrides))]

    shards = tmp_path / "shards"
    assert missing(f"data.train.local={shards}") == ["data.train.local"]
    shards.mkdir()
    (shards / "index.json").write_text("{}")
    assert missing(f"data.train.local={shards}") == []
    assert missing("data.train.remote=s3://bucket/shards") == []
    assert missing("data.train.source.input=owner/name") == []
    assert missing("data.train.source.input=absent.jsonl") == ["data.train.source.input"]
    assert missing(TREC + "}") == [f"data.train.source.{name}" for name in ("run", "judgments", "queries", "docs")]
    assert missing(f"data.train.local={shards}", "model.name_or_path=./absent") == ["model.name_or_path"]
    assert missing(f"data.train={{streams: [{{local: {shards}}}, {{local: {tmp_path}}}]}}") == ["data.train.local"]
