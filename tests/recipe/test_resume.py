"""Which changes of a recipe a run accepts when it resumes, and the record of those that were accepted."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.recipes import problems

from rankllm_composer.errors import RunError
from rankllm_composer.recipe.keys import describe_keys
from rankllm_composer.recipe.load import load_recipe, merge_recipe, recipe_to_yaml
from rankllm_composer.recipe.resume import FIXED, FREE, check_same_recipe, recorded_changes

SPLIT = ["batch.microbatch_lists=null", "batch.microbatch_tokens=8192"]
FREE_CHANGES = [
    SPLIT,
    ["batch.microbatch_lists=1"],
    ["model.activation_checkpointing=1.0", "model.keep_attention=true"],
    ["model.attention=packed_sdpa"],
    ["model.compile=true"],
    ["parallelism.device=cpu"],
    ["parallelism.reshard_after_forward=false"],
    ["data.train.remote=s3://bucket/shards", "data.train.cache_limit=100gb"],
    ["data.train.local=elsewhere"],
    ["data.train.source.input=moved.jsonl"],
    ["data.train.store_patience_seconds=9", "data.train.download_timeout_seconds=900"],
    ["data.loader_timeout_seconds=3600", "data.num_workers=0"],
    ["optimizer.max_skipped_updates=3"],
    ["run.max_duration=9ep", "run.autoresume=false", "run.folder=moved"],
    ["data.eval={local: held_out}", "evaluation={best_by: first_token/ndcg@10}"],
    ["checkpoint.export=null", "checkpoint.interval=10ba", "checkpoint.keep=-1"],
    ["logging.loggers={tensorboard: {}}"],
]
ACCEPTABLE = {
    "optimizer.lr": ["optimizer.lr=1e-5"],
    "optimizer": ["optimizer.lr=1e-5", "optimizer.weight_decay=0.1"],
    "neftune": ["neftune={}"],
    "neftune.alpha": ["neftune.alpha=3"],
    "parallelism.precision": ["parallelism.precision=fp32"],
    "schedule": ["schedule.warmup=5ba", "schedule.name=linear"],
    "objective.ranking_weight": ["objective.ranking_weight=1"],
    "model.name_or_path": ["model.name_or_path=moved/base"],
    "checkpoint.folder": ["checkpoint.folder=s3://bucket/run"],
}


def written(path: Path, *overrides: str) -> str:
    return recipe_to_yaml(load_recipe(path, overrides))


@pytest.mark.parametrize("changes", FREE_CHANGES, ids=lambda changes: changes[-1].partition("=")[0])
def test_what_changes_no_weight_may_change(minimal_recipe: Path, changes: list[str]) -> None:
    before, after = written(minimal_recipe), written(minimal_recipe, *changes)
    assert before != after
    assert check_same_recipe(before, after, "here") == after
    assert check_same_recipe(after, before, "here") == before


def test_moved_streams_may_change_but_not_their_proportions(minimal_recipe: Path) -> None:
    def streams(one: str, two: str, share: float) -> str:
        shards = f"[{{local: {one}, proportion: {share}}}, {{local: {two}, proportion: {1 - share}}}]"
        return written(minimal_recipe, f"data.train={{streams: {shards}}}")

    moved = streams("new/a", "new/b", 0.25)
    assert check_same_recipe(streams("a", "b", 0.25), moved, "here") == moved
    with pytest.raises(RunError, match=r"\(data\.train\.streams cannot change within a run\)"):
        check_same_recipe(streams("a", "b", 0.25), streams("a", "b", 0.5), "here")


@pytest.mark.parametrize("accepted, changes", ACCEPTABLE.items(), ids=ACCEPTABLE)
def test_the_remedy_of_a_refused_change_is_accepted(minimal_recipe: Path, accepted: str, changes: list[str]) -> None:
    """The message is followed as it stands; and a section, or a key in it, can be named instead."""
    before = written(minimal_recipe)
    with pytest.raises(RunError, match="here holds a run of another recipe") as refused:
        check_same_recipe(before, written(minimal_recipe, *changes), "here")
    advice = str(refused.value).split("'")[-2]
    assert advice.startswith("run.accept_changes=[")
    for acceptance in (advice, f"run.accept_changes=[{accepted}]"):
        after = check_same_recipe(before, written(minimal_recipe, *changes, acceptance), "here", lambda _: 200)
        record = recorded_changes(after)
        assert record and all(line.startswith("after batch 200: ") for line in record)
        path = minimal_recipe.with_name("resumed.yaml")
        path.write_text(after)
        assert load_recipe(path) == load_recipe(minimal_recipe, [*changes, acceptance])
        # The same command again, and without the acceptance, which the record survives.
        for again in ([*changes, acceptance], changes):
            assert recorded_changes(check_same_recipe(after, written(minimal_recipe, *again), "here")) == record


def test_a_second_change_is_added_to_the_record(minimal_recipe: Path) -> None:
    text, accept = written(minimal_recipe), "run.accept_changes=[optimizer.lr]"
    for batch, rate in ((10, "1e-4"), (20, "1e-5")):
        given = written(minimal_recipe, f"optimizer.lr={rate}", accept)
        text = check_same_recipe(text, given, "here", lambda _, batch=batch: batch)
    assert recorded_changes(text) == (
        "after batch 10: optimizer.lr was 0.001, is now 0.0001",
        "after batch 20: optimizer.lr was 0.0001, is now 1e-05",
    )


@pytest.mark.parametrize(
    "change",
    [
        "run.seed=7",
        "batch.global_lists=16",
        "optimizer.name=adamw_8bit",
        "parallelism.fsdp=false",
        "data.train.shuffle=false",
        "data.train.num_canonical_nodes=2",
    ],
)
def test_what_the_order_of_lists_or_a_checkpoint_rests_on_is_never_accepted(minimal_recipe: Path, change: str) -> None:
    key = change.partition("=")[0]
    common = ["parallelism.fsdp=false"] if "8bit" in change else []
    before = written(minimal_recipe, *common)
    with pytest.raises(RunError, match=rf"\({key} cannot change within a run\), or start a new run with another run"):
        check_same_recipe(before, written(minimal_recipe, *common, change), "here")
    section = key.rpartition(".")[0]
    with pytest.raises(RunError, match="cannot change within a run"):
        after = written(minimal_recipe, *common, change, f"run.accept_changes=[{section}]")
        check_same_recipe(before, after, "here")
    found = problems(minimal_recipe, f"run.accept_changes=[{key}]")["run.accept_changes"]
    assert str(found).startswith(f"run.accept_changes is [{key}]; expected keys that can change within a run.")


def test_a_run_without_checkpoint_or_export_starts_anew_with_any_recipe(minimal_recipe: Path) -> None:
    after = written(minimal_recipe, "run.seed=7", "optimizer.lr=1e-5")
    assert check_same_recipe(written(minimal_recipe), after, "here", lambda _: None) == after


@pytest.mark.parametrize(
    "folders, expected",
    [
        ([], "another run.name."),
        (["run.folder=x"], "another run.folder."),
        (["checkpoint.folder=x"], "another run.name and checkpoint.folder."),
        (
            ["run.folder=x", "checkpoint.folder=y", "checkpoint.export.folder=z"],
            "another run.folder and checkpoint.folder and checkpoint.export.folder.",
        ),
    ],
)
def test_the_folders_to_change_for_a_new_run_are_those_in_use(
    minimal_recipe: Path, folders: list[str], expected: str
) -> None:
    with pytest.raises(RunError) as refused:
        check_same_recipe(written(minimal_recipe, *folders), written(minimal_recipe, *folders, "run.seed=7"), "here")
    assert str(refused.value).endswith(f"start a new run with {expected}")


def test_accepted_keys_have_to_exist(minimal_recipe: Path) -> None:
    found = problems(minimal_recipe, "run.accept_changes=[optimizer.learning_rate]")["run.accept_changes"]
    assert found.found == "[optimizer.learning_rate]"
    assert merge_recipe(minimal_recipe, ["run.accept_changes=[optimizer.lr,neftune]"]).problems == []


def test_free_and_fixed_keys_exist() -> None:
    names = {row.name for row in describe_keys()}
    names |= {name.rpartition(".")[0] for name in names}
    assert set(FREE) | set(FIXED) <= names and not set(FREE) & set(FIXED)
