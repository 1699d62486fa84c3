"""Data and checkpoints in an object store over HTTP: a run that loses its machine resumes exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.killing import Run, checkpoint_content, comparable_metrics, differences, kill
from support.s3_server import s3_server
from support.small_run import RECIPE, small_run

from rankllm_composer.checkpoints.folder import MANIFEST, complete_checkpoints
from rankllm_composer.options import BuildOptions, SourceOptions
from rankllm_composer.shards.build import build_shards

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "kept/Secret+Key00000000000000000000000001",
    "AWS_SESSION_TOKEN": "kept-session-token-0000000000000000000002",
    "HF_TOKEN": "hf_keptKeptKeptKeptKept0000000003",
    "WANDB_API_KEY": "0000000004keptkeptkeptkeptkeptkeptkept04",
}
NUM_BATCHES = 12
EXPORT = "checkpoint.export.interval=2ep"


@pytest.fixture(scope="module")
def server():
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, secret in SECRETS.items():
            patch.setenv(name, secret)
        for bucket in ("lists", "runs"):
            server.client().create_bucket(Bucket=bucket)
        yield server
        for bucket in ("lists", "runs"):  # servers in one process share their content
            for key in server.keys(bucket):
                server.client().delete_object(Bucket=bucket, Key=key)
            server.client().delete_bucket(Bucket=bucket)


@pytest.fixture(scope="module")
def overlay(tmp_path_factory, mistral_v3_folder, server) -> list[str]:
    """The small run with its 24 lists in two sets of several shards, uploaded as they are built."""
    folder = tmp_path_factory.mktemp("cloud")
    overlay = small_run(folder, mistral_v3_folder)
    records = json.loads((folder / "records.json").read_text())
    for name, part in (("first", records[:16]), ("second", records[16:])):
        (folder / f"{name}.json").write_text(json.dumps(part))
        source = SourceOptions(input=folder / f"{name}.json")
        build_shards(f"s3://lists/{name}", source, BuildOptions(shard_bytes=10_000), report=str)
    assert sum(key.endswith(".mds.zstd") for key in server.keys("lists")) > 6
    streams = ", ".join(f"{{remote: 's3://lists/{name}', local: cache/{name}}}" for name in ("first", "second"))
    local = [f"data.train.streams=[{streams}]", "data.train.local=null", "data.train.cache_limit=200kb"]
    return [override for override in overlay if "train.local" not in override] + local


def start(folder: Path, overlay: list[str], *more: str) -> Run:
    return Run(RECIPE, [*overlay, f"checkpoint.folder=s3://runs/{folder.name}", "checkpoint.keep=2", *more], folder)


def stored_checkpoints(server, run: str) -> list[str]:
    """Names of the complete checkpoints of a run in the store, oldest first."""
    names = [key.split("/")[1] for key in server.keys("runs") if key.startswith(f"{run}/") and key.endswith(MANIFEST)]
    return sorted(names, key=lambda name: int(name.partition("-ba")[2]))


def assert_no_secret(folder: Path) -> None:
    """Check that no secret is in any file or output of a run."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert {"output-0.txt", "recipe.yaml", "metrics.jsonl"} <= {path.name for path in paths}
    for path in paths:
        content = path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, overlay) -> Path:
    run = start(tmp_path_factory.mktemp("cloud") / "uninterrupted", overlay, EXPORT)
    assert run.finish() == 0, run.output()
    return run.folder


@pytest.mark.slow
def test_an_epoch_from_the_store_trains_every_list_once(uninterrupted, server):
    lines = comparable_metrics(uninterrupted)
    assert [line["batch"] for line in lines] == list(range(1, NUM_BATCHES + 1))
    assert [lines[last]["data/lists_trained"] for last in (5, 11)] == [24, 24]  # of each epoch
    assert stored_checkpoints(server, "uninterrupted") == ["ep1-ba10", "ep2-ba12"]
    assert (uninterrupted / "run" / "hf").is_dir()
    assert_no_secret(uninterrupted)


@pytest.mark.slow
def test_a_run_that_loses_its_machine_resumes_from_the_store(tmp_path, overlay, uninterrupted, server):
    refusals = iter([500, 503, 503])

    def refuse(key: str) -> int | None:
        return next(refusals, None) if key.startswith("broken/") else None

    server.on_put = refuse
    run = start(tmp_path / "broken", overlay, EXPORT)
    run.wait_until(lambda: run.batches() >= 7 and len(stored_checkpoints(server, "broken")) >= 1)
    kill(run.ranks())
    assert run.finish() != 0
    assert next(refusals, "used") == "used"
    assert_no_secret(run.folder)
    shutil.rmtree(run.folder)  # checkpoints, cache and all
    # What an interrupted upload leaves: files without a manifest, newer than any complete checkpoint.
    server.client().put_object(Bucket="runs", Key="broken/ep1-ba11/.metadata", Body=b"half")
    resumed_at = int(stored_checkpoints(server, "broken")[-1].partition("-ba")[2])

    run = start(tmp_path / "broken", overlay, EXPORT)
    assert run.finish() == 0, run.output()
    assert comparable_metrics(run.folder) == comparable_metrics(uninterrupted)[resumed_at:]
    ours, theirs = (
        complete_checkpoints(folder / "run" / "checkpoints")[-1][0] for folder in (run.folder, uninterrupted)
    )
    assert ours.name == theirs.name == "ep2-ba12"
    assert differences(checkpoint_content(ours), checkpoint_content(theirs)) == []
    assert stored_checkpoints(server, "broken") == ["ep1-ba10", "ep2-ba12"]


@pytest.mark.slow
def test_a_store_that_refuses_uploads_stops_the_run_but_keeps_local_checkpoints(tmp_path, overlay, server):
    server.on_put = lambda key: 503 if key.startswith("full/ep") else None
    run = start(tmp_path / "full", overlay, "checkpoint.store_patience_seconds=10")
    code = run.finish()
    server.on_put = lambda key: None
    assert code == 2 or "exited with code 2" in run.output(), run.output()
    assert "checkpoint.folder: s3://runs/full: " in run.output()
    assert "cannot be uploaded" in run.output() and "rerun the same command" in run.output()
    assert complete_checkpoints(run.folder / "run" / "checkpoints")  # those on the local disk are intact
    assert_no_secret(run.folder)

    run = start(tmp_path / "full", overlay, "checkpoint.store_patience_seconds=10")
    assert run.finish() == 0, run.output()
    assert stored_checkpoints(server, "full") == ["ep1-ba10", "ep2-ba12"]
