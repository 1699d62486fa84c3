"""Cause every fault in the table of docs/faults.md and compare exit code and message with its row."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed
import zstd
from composer import Trainer
from composer.core import Callback
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from streaming.base.hashing import get_hash
from support import child_process, exporting, guarded_updates, missing_calls, resumable_runs
from support import streaming_loader as streaming_tests
from support.killing import Run, kill
from support.list_shards import build_from_file, damage, write_shards
from support.s3_server import s3_server
from support.small_disk import fill, make_read_only, small_disk
from support.small_run import RECIPE, mark_trained, small_run
from support.synthetic_records import conversation, write_jsonl
from support.templates import TEMPLATES
from support.tiny_training import new_hf_model, new_tokenizer, new_trainer
from transformers import Qwen2MoeConfig, T5Config, T5ForConditionalGeneration

from rankllm_composer.checkpoints.folder import complete_checkpoints, remove
from rankllm_composer.data.dataset import ListDataset, ListEncoding, build_train_data_spec
from rankllm_composer.data.shared_memory import clear_dead_claims
from rankllm_composer.data.streams import Stream, check_stream
from rankllm_composer.model.loading import load_causal_lm, load_tokenizer
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.reranker import ListwiseReranker
from rankllm_composer.model.self_check import check_model
from rankllm_composer.options import ModelOptions
from rankllm_composer.prompts.chat import template_notes
from rankllm_composer.prompts.encoding import encode_record
from rankllm_composer.prompts.identifier_tokens import check_tokenizer
from rankllm_composer.prompts.lists import check_lists
from rankllm_composer.prompts.prompt_template import read_prompt_template
from rankllm_composer.prompts.record import Record
from rankllm_composer.prompts.template import fix_date
from rankllm_composer.prompts.user_turn import render_user_turn
from rankllm_composer.ranking.reranker import Reranker
from rankllm_composer.recipe.load import load_recipe, recipe_to_yaml
from rankllm_composer.storage.private_folder import private_folder
from rankllm_composer.training.checkpoint_callback import CheckpointFolder
from rankllm_composer.training.dry_run import DryRun
from rankllm_composer.training.failures import explained_failures
from rankllm_composer.training.guards import EpochGuard, LossGuard
from rankllm_composer.training.progress import MetricsFile
from rankllm_composer.training.rendezvous import VARIABLES, meet
from rankllm_composer.training.run import claim_run_folder, prepare_shards
from rankllm_composer.training.run_files import read_metrics

TABLE = Path(__file__).parents[2] / "docs" / "faults.md"
ROW = re.compile(
    r"^\| (?P<key>[a-z-]+) \| [^|]+ \| (?P<code>[012]) \| (`(?P<message>[^`]+)`)? ?\| [^|]+ \|$", re.MULTILINE
)
ROWS = {row["key"]: row for row in ROW.finditer(TABLE.read_text())}
ALL_LISTS = sorted(streaming_tests.ids(*range(10)))


class Ended(NamedTuple):
    """Exit code of a run and its output."""

    code: int
    output: str


CONTINUED = Ended(0, "")
DRIVERS: dict[str, Callable[..., Ended]] = {}
SIGNALS = {
    "rank-stalls": signal.SIGSTOP,
    "rank-dies": signal.SIGKILL,
    "launcher-dies": signal.SIGKILL,
    "launcher-asked-to-stop": signal.SIGTERM,
    "interrupted": signal.SIGINT,
    "asked-to-stop": signal.SIGTERM,
}


SLOW = {
    *SIGNALS,
    "disk-full-sharded-checkpoint",
    "asked-to-stop-early",
    "terminal-closed",
    "loader-worker-dies",
    "run-restarted-at-once",
}


def causes(*keys: str) -> Callable[[Callable[..., Ended]], Callable[..., Ended]]:
    """Register a function that causes the faults of these keys."""

    def register(driver: Callable[..., Ended]) -> Callable[..., Ended]:
        DRIVERS.update(dict.fromkeys(keys, driver))
        return driver

    return register


class Tools:
    """Shared tools of the drivers.

    Attributes:
        folder: a folder for this fault only.
        patch: pytest's monkeypatch.
        request: pytest's request, for fixtures that few drivers need.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
        self.folder, self.patch, self.request = folder, patch, request

    def shards(self, num_lists: int = 10, name: str = "set") -> Path:
        return write_shards(self.folder / name, range(num_lists))

    def cached(self) -> Stream:
        """Return a stream of 10 lists in 3 shards, with an empty cache."""
        return Stream(local=str(self.folder / "cache"), remote=str(self.shards()))

    def fixture(self, name: str):
        return self.request.getfixturevalue(name)


def read(stream: Stream, **options) -> list[str]:
    """Return the ids of one epoch, as training reads it."""
    return sorted(
        filter(None, streaming_tests.flat(streaming_tests.read(streaming_tests.new_loader(stream, **options))[0]))
    )


@pytest.fixture(scope="module")
def overlay(tmp_path_factory, mistral_v3_folder) -> list[str]:
    """Overrides for a run that takes seconds."""
    return small_run(tmp_path_factory.mktemp("small"), mistral_v3_folder)


def test_rows_and_faults_correspond_one_to_one():
    num_rows = sum(line.startswith("| ") for line in TABLE.read_text().splitlines()) - 1
    assert set(ROWS) == set(DRIVERS) and len(ROWS) == num_rows > 25


@pytest.mark.parametrize("key", [pytest.param(key, marks=pytest.mark.slow if key in SLOW else ()) for key in ROWS])
def test_a_fault_has_the_exit_code_and_message_of_its_row(key, tmp_path, monkeypatch, request):
    try:
        ended = DRIVERS[key](key, Tools(tmp_path, monkeypatch, request))
    except ValueError as error:  # train.py reports it in one line, with exit code 2
        ended = Ended(2, str(error))
    assert ended.code == int(ROWS[key]["code"]), ended.output
    message = ROWS[key]["message"] or ""
    pattern = ".*".join(re.escape(part) for part in message.split("…"))
    assert re.search(pattern, ended.output, re.DOTALL), f"expected\n  {message}\nfound\n  {ended.output}"


# --- the object store -------------------------------------------------------------------------------------------------


@causes(
    "store-fails-a-while",
    "store-slow-a-while",
    "store-fails-for-good",
    "store-times-out",
    "wrong-credentials",
    "shard-arrives-damaged",
    "index-arrives-damaged",
)
def object_store(key: str, tools: Tools) -> Ended:
    if key == "index-arrives-damaged":
        folder = tools.folder / "built"
        records = write_jsonl(tools.folder / "records.jsonl", map(conversation, range(10)))
        build_from_file(folder, records, shard_bytes=5000)
    else:
        folder = tools.shards()
    with s3_server() as server:
        client = server.client()
        client.create_bucket(Bucket="lists")
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".zstd")):
            client.upload_file(str(path), "lists", path.relative_to(folder).as_posix())
        stream = Stream(local=str(tools.folder / "cache"), remote="s3://lists")
        refusals = iter([500, 503, 503, 500] * 4)  # more than three tries of every layer
        answers = {
            "store-fails-a-while": lambda: next(refusals, None),
            "store-fails-for-good": lambda: 503,
            "store-times-out": lambda: time.sleep(4),
        }
        try:
            if key == "wrong-credentials":
                server.on_get = lambda name: 403
                check_stream(stream, store_patience_seconds=0)
            if key == "store-slow-a-while":
                naps = iter([4, 4])
                loader = streaming_tests.new_loader(stream, store_patience_seconds=60, download_timeout_seconds=1)
                server.on_get = lambda name: time.sleep(next(naps, 0)) if name.startswith("02/") else None
                assert sorted(streaming_tests.flat(streaming_tests.read(loader)[0])) == ALL_LISTS
                assert next(naps, None) is None
                return CONTINUED
            if key.endswith("arrives-damaged"):
                name = "index.json" if key == "index-arrives-damaged" else "02/shard.00000.mds.zstd"
                for number, make in enumerate((flipped, flipped, shortened)):  # each once: the file is fetched again
                    server.sends_checksums, pending = number == 0, [make]

                    def once(at: str, data: bytes, pending: list = pending) -> bytes:
                        return pending.pop()(data) if at == name and pending else data

                    server.on_body = once
                    assert read(replace(stream, local=f"{stream.local}-{number}")) == ALL_LISTS and not pending
                return CONTINUED
            if key == "store-fails-a-while":  # also when the set is checked
                server.on_get = lambda name: answers[key]() if name.startswith("02/") else None
                assert read(stream, store_patience_seconds=60) == ALL_LISTS and next(refusals, None) is None
                return CONTINUED
            loader = streaming_tests.new_loader(stream, download_timeout_seconds=1)
            server.on_get = lambda name: answers[key]() if name.startswith("02/") else None
            streaming_tests.read(loader)
            return CONTINUED
        finally:
            server.on_get, server.on_body = lambda name: None, lambda name, data: data
            clear_store(client, "lists")


def shortened(data: bytes) -> bytes:
    return data[:-3]


def flipped(data: bytes) -> bytes:
    """Content with one bit flipped in the middle."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def clear_store(client, bucket: str) -> None:
    """Empty a bucket; servers in one process share their content."""
    for entry in client.list_objects_v2(Bucket=bucket).get("Contents", ()):
        client.delete_object(Bucket=bucket, Key=entry["Key"])
    client.delete_bucket(Bucket=bucket)


@causes(
    "checkpoint-store-refuses",
    "checkpoint-store-fails-a-while",
    "checkpoint-store-missing",
    "checkpoint-store-empty",
    "checkpoint-copy-short",
    "checkpoint-copy-damaged",
    "checkpoint-copy-missing",
    "store-of-another-recipe",
)
def checkpoint_store(key: str, tools: Tools) -> Ended:
    here, there = tools.folder / "run", tools.folder / "another machine"
    url = f"s3://faults/{key}"
    with s3_server() as server:
        if key != "checkpoint-store-missing":
            server.client().create_bucket(Bucket="faults")
        try:
            if key == "checkpoint-store-fails-a-while":
                refusals = iter([503] * 7)  # the client itself tries five times
                server.on_put = lambda name: next(refusals, None)
                resumable_runs.train(here, "1ba", url=url)
                assert next(refusals, None) is None and (there.parent / "run").exists()
                assert any(name.endswith("ep0-ba1/checkpoint.json") for name in server.keys("faults"))
                return CONTINUED
            if key == "checkpoint-store-refuses":
                server.on_put = lambda name: 403 if "/ep0" in name else None
            elif key == "checkpoint-copy-short":
                resumable_runs.train(here, "2ba", url=url)
                server.client().delete_object(Bucket="faults", Key=f"{key}/ep0-ba2/rank0.pt")
            elif key == "checkpoint-copy-damaged":
                resumable_runs.train(here, "2ba", url=url)
                flip_a_bit(here / "ep0-ba2" / "rank0.pt")
                server.client().upload_file(str(here / "ep0-ba2" / "rank0.pt"), "faults", f"{key}/ep0-ba2/rank0.pt")
            elif key == "checkpoint-copy-missing":  # the upload of the last checkpoint was refused
                server.on_put = lambda name: 403 if "/ep1-ba4" in name else None
                with pytest.raises(ValueError, match=r"ep1-ba4/rank0\.pt cannot be uploaded"):
                    resumable_runs.train(here, "1ep", url=url)
                server.on_put = lambda name: None
                _, _, finished = resumable_runs.train(here, "1ep", url=url)
                assert finished.summary() == f"checkpoint ep1-ba4 in {here}, copied to {url}"
            elif key == "store-of-another-recipe":
                resumable_runs.train(here, "2ba", url=url, recipe_yaml=recipe_to_yaml(load_recipe(RECIPE)))
            other = recipe_to_yaml(load_recipe(RECIPE, ["optimizer.lr=1e-4"]))
            _, _, checkpoints = resumable_runs.train(there, "1ep", url=url, recipe_yaml=other)
        finally:
            if key != "checkpoint-store-missing":
                clear_store(server.client(), "faults")
    before = {
        "checkpoint-copy-short": there / "ep0-ba1",
        "checkpoint-copy-missing": there / "ep1-ba4",
        "checkpoint-store-empty": None,
    }
    assert checkpoints.resumed_from == before[key]
    return CONTINUED


# --- shards -----------------------------------------------------------------------------------------------------------


@causes("counts-differ", "path-through-a-link", "shard-unpacks-to-more")
def untrue_index(key: str, tools: Tools) -> Ended:
    folder = tools.shards()
    index, shard = folder / "index.json", folder / "02" / "shard.00000.mds.zstd"
    content = json.loads(index.read_text())
    if key == "counts-differ":
        content["shards"][1]["samples"] = 3
    elif key == "path-through-a-link":
        outside = tools.folder / "outside"
        shutil.move(folder / "02", outside)
        (folder / "02").symlink_to(outside)
    else:
        shard.write_bytes(zstd.compress(bytes(1 << 24)))
        file = content["shards"][2]["zip_data"]
        file["bytes"], file["hashes"] = shard.stat().st_size, {"xxh64": get_hash("xxh64", shard.read_bytes())}
    index.write_text(json.dumps(content))
    read(Stream(local=str(tools.folder / "cache"), remote=str(folder)))
    return CONTINUED


@causes("shard-missing", "shard-truncated", "index-damaged", "path-outside")
def damaged_set(key: str, tools: Tools) -> Ended:
    folder = tools.shards()
    index = folder / "index.json"
    if key == "shard-missing":
        (folder / "01" / "shard.00000.mds.zstd").unlink()
    elif key == "shard-truncated":
        (folder / "02" / "shard.00000.mds.zstd").write_bytes(b"abc")
    elif key == "index-damaged":
        index.write_text(index.read_text()[:40])
    else:
        index.write_text(index.read_text().replace("02/shard", "../shard"))
    check_stream(Stream(local=str(tools.folder / "cache"), remote=str(folder)), store_patience_seconds=0)
    return CONTINUED


@causes("shard-corrupted")
def corrupted_shard(key: str, tools: Tools) -> Ended:
    stream = tools.cached()
    damage(Path(str(stream.remote)) / "01" / "shard.00000.mds.zstd")
    try:
        read(stream)
    finally:
        assert not list(Path(str(stream.local), "01").glob("shard*"))
    return CONTINUED


@causes("shard-vanishes")
def vanishing_shard(key: str, tools: Tools) -> Ended:
    stream = tools.cached()
    loader = streaming_tests.new_loader(stream)  # the shard still exists
    Path(str(stream.remote), "02", "shard.00000.mds.zstd").unlink()
    streaming_tests.read(loader)
    return CONTINUED


@causes("cached-shard-corrupted", "cached-index-damaged")
def corrupted_cache(key: str, tools: Tools) -> Ended:
    stream = tools.cached()
    read(stream)
    damaged = "index.json" if key == "cached-index-damaged" else "01/shard.00000.mds"
    damage(Path(str(stream.local), damaged))
    assert read(stream) == ALL_LISTS
    return CONTINUED


@causes("two-runs-one-cache")
def shared_cache(key: str, tools: Tools) -> Ended:
    stream = tools.cached()
    read(stream)
    before = {path: path.read_bytes() for path in Path(str(stream.local)).rglob("*") if path.is_file()}
    try:
        check_stream(Stream(local=stream.local, remote=str(tools.shards(5, "other"))))
    finally:
        assert {path: path.read_bytes() for path in before} == before
    return CONTINUED


@causes("fewer-lists-than-a-batch")
def small_set(key: str, tools: Tools) -> Ended:
    from rankllm_composer.data.dataset import ListDataset, ListEncoding, build_train_data_spec

    tokenizer = tools.fixture("mistral_v3_tokenizer")
    encoding = ListEncoding(tokenizer=tokenizer, objective="combined", max_length_tokens=4096)
    dataset = ListDataset([Stream(local=str(tools.shards(3)))], encoding, batch_size=4)
    build_train_data_spec(dataset, microbatch_tokens=4096, num_workers=0)
    return CONTINUED


# --- disks ------------------------------------------------------------------------------------------------------------


@causes("disk-full-cache")
def full_cache_disk(key: str, tools: Tools) -> Ended:
    with small_disk(tools.folder / "disk", 1 << 20) as disk:
        stream = Stream(local=str(disk / "cache"), remote=str(tools.shards()))
        loader = streaming_tests.new_loader(stream)  # the index is cached
        filler = fill(disk)
        with pytest.raises(ValueError, match="No space") as raised:
            streaming_tests.read(loader)
        filler.unlink()
        assert read(stream) == ALL_LISTS  # the same command works once there is space
    return Ended(2, str(raised.value))


@causes("disk-full-checkpoint", "checkpoint-folder-read-only")
def checkpoint_disk(key: str, tools: Tools) -> Ended:
    with small_disk(tools.folder / "disk", 4 << 20) as disk:
        resumable_runs.train(disk, "2ba", keep=1)
        if key == "disk-full-checkpoint":
            filler = fill(disk, free=100_000)
        else:
            make_read_only(disk)
        try:
            resumable_runs.train(disk, "1ep", keep=1)
        finally:
            assert resumable_runs.names(disk) == ["ep0-ba2"]
            if key == "disk-full-checkpoint":  # the part of the checkpoint no longer takes space
                assert not list((disk / ".partial").glob("*"))
                filler.unlink()
                resumable_runs.train(disk, "1ep", keep=1)
                assert resumable_runs.names(disk) == ["ep1-ba4"]
    return CONTINUED


@causes("disk-full-sharded-checkpoint")
def full_disk_of_ranks(key: str, tools: Tools) -> Ended:
    """The disk has space for two checkpoints of 1,067,168 numbers in 12 bytes each, until something else fills it."""
    with small_disk(tools.folder / "disk", 40 << 20) as disk:
        overlay = [*tools.fixture("overlay"), f"checkpoint.folder={disk}", "checkpoint.keep=1", "run.max_duration=1ep"]
        run = Run(RECIPE, overlay, tools.folder)
        run.wait_until(lambda: complete_checkpoints(disk))
        kill(run.ranks(), signal.SIGSTOP)
        fill(disk, free=1 << 20)
        kill(run.ranks(), signal.SIGCONT)
        code = run.finish()
        assert [path.name for path, _ in complete_checkpoints(disk)] == ["ep0-ba2"]
        assert "CheckpointException" not in run.output()
    return Ended(2 if "exited with code 2" in run.output() else code, run.output())


@causes("checkpoint-of-another-model", "checkpoint-damaged")
def checkpoint(key: str, tools: Tools) -> Ended:
    resumable_runs.train(tools.folder, "2ba", keep=2)
    path = tools.folder / "ep0-ba2"
    if key == "checkpoint-damaged":
        flip_a_bit(path / "rank0.pt")
    family = "qwen2" if key == "checkpoint-of-another-model" else "mistral"
    try:
        resumable_runs.train(tools.folder, "1ep", family=family)
    finally:
        assert resumable_runs.names(tools.folder) == ["ep0-ba1", "ep0-ba2"]
        if key == "checkpoint-damaged":  # what the message says
            shutil.rmtree(path)
            _, _, resumed = resumable_runs.train(tools.folder, "1ep")
            assert resumed.resumed_from == tools.folder / "ep0-ba1"
    return CONTINUED


def flip_a_bit(path: Path) -> None:
    """Flip one bit in the middle of a file, where the weights are."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@causes("export-damaged")
def damaged_export(key: str, tools: Tools) -> Ended:
    folder = exporting.write(tools.folder / "model")
    flip_a_bit(folder / "model.safetensors")
    Reranker.from_pretrained(folder)
    return CONTINUED


@causes("exports-of-another-run")
def foreign_exports(key: str, tools: Tools) -> Ended:
    for name in ("one", "two"):
        checkpoints = CheckpointFolder(tools.folder / name, interval="1ep")
        exporter = exporting.new_exporter(tools.folder / "hf", save=checkpoints.save)
        new_trainer(new_hf_model(), "1ep", callbacks=[exporter, checkpoints]).fit()
    return CONTINUED


@causes("exports-gone")
def lost_exports(key: str, tools: Tools) -> Ended:
    for times in (1, 2):
        checkpoints = CheckpointFolder(tools.folder / "checkpoints", interval="1ep")
        exporter = exporting.new_exporter(tools.folder / "hf", save=checkpoints.save)
        trainer = new_trainer(new_hf_model(), "1ep", callbacks=[exporter, checkpoints])
        if times == 1:
            trainer.fit()
        assert (tools.folder / "hf" / "epoch_0" / "model.safetensors").exists()
        shutil.rmtree(tools.folder / "hf")
    return CONTINUED


@causes("disk-too-small")
def small_disks(key: str, tools: Tools) -> Ended:
    """The space is enough for two exports at once: a dry run refuses five before the first batch, and passes one."""
    with small_disk(tools.folder / "disk", 4 << 20) as disk:
        fill(disk, free=300_000)

        def train(keep: int) -> None:
            checkpoints = CheckpointFolder(tools.folder / "checkpoints", interval="1ep")
            exporter = exporting.new_exporter(disk / "hf", save=checkpoints.save, keep=keep)
            dry_run = DryRun(checkpoints, exporter)
            new_trainer(new_hf_model(), "5ep", callbacks=[exporter, checkpoints, dry_run]).fit()

        try:
            train(keep=-1)
        finally:
            assert not resumable_runs.names(tools.folder / "checkpoints")
            train(keep=1)
            assert [path.name for path in (disk / "hf").iterdir()] == ["epoch_4"]
    return CONTINUED


@causes("checkpoint-half-written")
def half_checkpoint(key: str, tools: Tools) -> Ended:
    resumable_runs.train(tools.folder, "2ba")
    torn = tools.folder / "ep0-ba2" / "rank0.pt"
    torn.write_bytes(torn.read_bytes()[:1000])
    _, _, checkpoints = resumable_runs.train(tools.folder, "1ep")
    assert checkpoints.resumed_from == tools.folder / "ep0-ba1"
    return CONTINUED


@causes("checkpoint-no-data")
def pickle_in_a_checkpoint(key: str, tools: Tools) -> Ended:
    trap = tools.folder / "was run"
    resumable_runs.train(tools.folder, "2ba", keep=1)
    payload = {"x": resumable_runs.Payload(trap)}
    resumable_runs.poison(tools.folder / "ep0-ba2", lambda state: state.update(callbacks=payload))
    try:
        resumable_runs.train(tools.folder, "1ep")
    finally:
        assert not trap.exists()
    return CONTINUED


def train_with_metrics(path: Path, checkpoints: Path, duration: str, *callbacks: Callback) -> None:
    ours = [*callbacks, CheckpointFolder(checkpoints, interval="1ba")]
    trainer = new_trainer(new_hf_model(), duration, callbacks=ours, loggers=[MetricsFile(path)])
    trainer.fit()
    trainer.close()


@causes("disk-full-metrics")
def full_metrics_disk(key: str, tools: Tools) -> Ended:
    checkpoints = tools.folder / "checkpoints"
    with small_disk(tools.folder / "disk", 1 << 20) as disk:
        path = disk / "metrics.jsonl"
        try:
            train_with_metrics(path, checkpoints, "1ep", FullDisk(disk))
        finally:
            (disk / "filler").unlink()
            assert resumable_runs.names(checkpoints) == ["ep0-ba1"]
            train_with_metrics(path, checkpoints, "1ep")
            assert [line["batch"] for line in read_metrics(path)] == [1, 2, 3, 4]
    return CONTINUED


class FullDisk(Callback):
    """Fill the disk from the second batch on; log so much that a line does not fit into space that is left."""

    def __init__(self, disk: Path) -> None:
        self.disk = disk

    def batch_start(self, state, logger):
        if state.timestamp.batch.value == 1:
            fill(self.disk)
        logger.log_metrics({f"padding/{number}": 1.0 for number in range(500)})


@causes("metrics-torn", "metrics-damaged")
def broken_metrics(key: str, tools: Tools) -> Ended:
    path, checkpoints = tools.folder / "metrics.jsonl", tools.folder / "checkpoints"
    train_with_metrics(path, checkpoints, "3ba")
    first, *rest = path.read_bytes().splitlines(keepends=True)
    if key == "metrics-torn":
        path.write_bytes(b"".join([first, *rest])[:-20])
        remove(checkpoints / "ep0-ba3")  # the line of a batch is written before its checkpoint
    else:
        path.write_bytes(first.replace(b'"batch"', b'"batch\xff', 1) + b"".join(rest))
    train_with_metrics(path, checkpoints, "1ep")
    kept = [2, 3, 4] if key == "metrics-damaged" else [1, 2, 3, 4]
    assert [line["batch"] for line in read_metrics(path)] == kept
    assert path.read_bytes().count(b"\n") == 4
    return CONTINUED


@causes("disk-full-export")
def full_export_disk(key: str, tools: Tools) -> Ended:
    folder, report = tools.folder / "runs" / "model", tools.folder / "report"
    assert exporting.run_in_a_child(exporting.write_on_a_full_disk, folder, report) == 0
    assert not list(folder.parent.iterdir())
    return Ended(2, report.read_text())


# --- other runs -------------------------------------------------------------------------------------------------------


@causes("stale-shared-memory")
def stale_shared_memory(key: str, tools: Tools) -> Ended:
    tools.patch.setattr(tempfile, "tempdir", str(tools.folder))
    number = int(child_process.in_a_child(child_process.names_of_a_dataset, then_die=True))
    assert child_process.exists(f"{number:06}_locals")
    assert read(tools.cached()) == ALL_LISTS
    clear_dead_claims()
    assert not child_process.exists(f"{number:06}_locals")
    return CONTINUED


@causes("shared-memory-full", "shared-memory-fills-up")
def full_shared_memory(key: str, tools: Tools) -> Ended:
    if os.geteuid() != 0:
        pytest.skip("a file system in place of /dev/shm needs root")
    stream, size = tools.cached(), 2**20 + 2**16

    def read_there() -> list[str]:
        loader = streaming_tests.new_loader(stream, workers=1)
        if key == "shared-memory-fills-up":
            with contextlib.suppress(OSError), Path("/dev/shm/file").open("wb", buffering=0) as file:
                while file.write(b"x" * 4096):
                    pass
        return streaming_tests.read(loader)

    message = child_process.with_small_shared_memory(2**16 if key == "shared-memory-full" else size, read_there)
    return Ended(2, message)


@causes("temporary-folder-taken")
def taken_folder(key: str, tools: Tools) -> Ended:
    tools.patch.setattr(tempfile, "tempdir", str(tools.folder))
    private_folder().chmod(0o777)
    assert read(tools.cached()) == ALL_LISTS
    assert private_folder().name.endswith("-1") and private_folder().stat().st_mode & 0o777 == 0o700
    return Ended(0, tools.fixture("caplog").text)


@causes("no-locks")
def file_system_without_locks(key: str, tools: Tools) -> Ended:
    """Two runs in one folder: the second is refused by the lock that stands in for the missing one."""
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from rankllm_composer.training.run import claim_run_folder as claim\n"
        "text = 'run: {seed: 1}'\n"
        "with claim(Path('run'), text):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        claim(Path('run'), text).__enter__()\n"
        "    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 1)\n"
    )
    run = tools.folder / "run"
    environment = {**os.environ, **missing_calls.no_locks(tools.folder, run)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tools.folder, env=environment, capture_output=True, text=True, check=False
    )
    assert "RunError: run.folder: another process is training in run. Wait for it" in done.stderr
    return Ended(done.returncode, done.stderr)


@causes("two-runs-one-folder", "folder-of-another-recipe", "run-folder-read-only")
def run_folder(key: str, tools: Tools) -> Ended:
    first = recipe_to_yaml(load_recipe(RECIPE))
    second = recipe_to_yaml(load_recipe(RECIPE, ["optimizer.lr=1e-4"]))
    folder = tools.folder / "run"
    if key == "run-folder-read-only":
        folder.parent.joinpath("file").touch()
        with claim_run_folder(folder.parent / "file" / "run", first):
            return CONTINUED
    if key == "two-runs-one-folder":
        with claim_run_folder(folder, first), claim_run_folder(folder, first):
            return CONTINUED
    with claim_run_folder(folder, first):
        mark_trained(folder)
    try:
        with claim_run_folder(folder, second):
            return CONTINUED
    finally:
        assert (folder / "recipe.yaml").read_text() == first


# --- numbers and ranks ------------------------------------------------------------------------------------------------


@causes("loss-not-finite", "loss-not-finite-skipped")
def bad_loss(key: str, tools: Tools) -> Ended:
    guard = LossGuard(max_skipped_updates=int(key.endswith("skipped")))
    weights = guarded_updates.run([0.5, 0.5, 0.25, guarded_updates.NAN, 0.25, 0.25], guard)
    assert weights == [0.5, 0.5, 0.25] and guard.num_skipped == 1
    return CONTINUED


@causes("update-without-a-list")
def only_long_lists(key: str, tools: Tools) -> Ended:
    tokenizer = tools.fixture("mistral_v3_tokenizer")
    encoding = ListEncoding(tokenizer=tokenizer, objective="combined", max_length_tokens=30)
    dataset = ListDataset([Stream(str(tools.shards()))], encoding, batch_size=4)
    model = guarded_updates.Tiny()
    trainer = Trainer(
        model=model,
        optimizers=torch.optim.AdamW(model.parameters(), weight_decay=0.1),
        train_dataloader=build_train_data_spec(dataset, microbatch_lists=4, num_workers=0),
        max_duration="1ep",
        device="cpu",
        callbacks=[EpochGuard()],
        progress_bar=False,
    )
    try:
        trainer.fit()
    finally:
        assert model.weight.item() == 1
        trainer.close()
    return CONTINUED


@causes("prepared-from-another-source")
def another_source(key: str, tools: Tools) -> Ended:
    old, new = (write_jsonl(tools.folder / f"{name}.jsonl", [conversation(int(name))]) for name in "12")
    build_from_file(tools.folder / "set", old)
    keys = [f"data.train.local={tools.folder / 'set'}", f"data.train.source.input={new}"]
    prepare_shards(load_recipe(RECIPE, keys).data.train, "data.train")
    return CONTINUED


@causes("rank-never-starts")
def leftover_variables(key: str, tools: Tools) -> Ended:
    for name, value in zip(VARIABLES, ("1", "2", "1", "2", "127.0.0.1", "1")):
        tools.patch.setenv(name, value)
    meet(0.1)
    return CONTINUED


@causes("asked-to-stop-early")
def stopped_at_the_start(key: str, tools: Tools) -> Ended:
    run = Run(RECIPE, tools.fixture("overlay"), tools.folder)
    run.wait_until(lambda: (tools.folder / "run" / "recipe.yaml").exists())  # seconds before the first batch
    kill(run.ranks(), signal.SIGTERM)
    code = run.finish()
    assert "Traceback" not in run.output() and not run.locks()
    return Ended(code, run.output())


@causes("terminal-closed")
def closed_terminal(key: str, tools: Tools) -> Ended:
    run = Run(RECIPE, tools.fixture("overlay"), tools.folder, ranks=1, is_patient=True, on_terminal=True)
    run.wait_until(lambda: run.batches() >= 3)
    segments = run.shared_memory()
    run.close_terminal()
    code = run.finish()
    newest, _ = complete_checkpoints(tools.folder / "run" / "checkpoints")[-1]
    assert 3 <= run.batches() < 12 and newest.name.endswith(f"-ba{run.batches()}")
    assert segments and not [path for path in segments if path.exists()] and not run.locks()
    return Ended(code, run.output())


@causes("loader-worker-dies")
def lost_worker(key: str, tools: Tools) -> Ended:
    run = Run(RECIPE, tools.fixture("overlay"), tools.folder, ranks=1)
    run.wait_until(lambda: run.batches() >= 3)
    kill(run.workers())
    code = run.finish()
    assert run.output().count("error: ") == 1 and complete_checkpoints(tools.folder / "run" / "checkpoints")
    return Ended(code, run.output())


@causes("run-restarted-at-once")
def restarted_at_once(key: str, tools: Tools) -> Ended:
    """Ranks, then the launcher, are killed; the second time the ranks still write a checkpoint, and are waited for."""
    first = Run(RECIPE, tools.fixture("overlay"), tools.folder)
    first.wait_until(lambda: first.batches() >= 3)
    workers = first.workers()
    kill(first.ranks())
    second = Run(RECIPE, tools.fixture("overlay"), tools.folder, is_patient=True)
    second.wait_until(lambda: second.batches() >= 7)
    second.process.kill()
    third = Run(RECIPE, tools.fixture("overlay"), tools.folder, is_patient=True)
    code = third.finish()
    first.finish(), second.finish()
    assert len(workers) == 2 and third.batches() == 12
    assert "another process is training" not in second.output() + third.output()
    assert not third.leftovers()
    return Ended(code, third.output())


@causes(*SIGNALS)
def signalled(key: str, tools: Tools) -> Ended:
    patience = ["parallelism.dist_timeout_seconds=30"] if key == "rank-stalls" else []
    ours = key in ("interrupted", "launcher-asked-to-stop")
    run = Run(RECIPE, [*tools.fixture("overlay"), *patience], tools.folder, is_patient=ours)
    run.wait_until(lambda: run.batches() >= 3)
    segments = run.shared_memory()
    assert segments and run.locks()
    if key == "interrupted":  # a terminal sends it to every process
        os.killpg(run.process.pid, SIGNALS[key])
    elif key.startswith("launcher"):
        run.process.send_signal(SIGNALS[key])
    else:
        kill(run.ranks() if key == "asked-to-stop" else run.ranks()[1:], SIGNALS[key])
    code = run.finish()
    folder = tools.folder / "run"
    assert complete_checkpoints(folder / "checkpoints")
    with claim_run_folder(folder, (folder / "recipe.yaml").read_text()):  # its lock is free
        pass
    if key in ("rank-stalls", "rank-dies"):  # the next run cleans up after the killed one
        tools.patch.setattr(tempfile, "tempdir", str(run.temporary))
        clear_dead_claims()
    assert not [path for path in segments if path.exists()] and not run.locks()
    if key == "interrupted":
        assert "error: " not in run.output()
        assert run.output().count("interrupted: stopping after this batch, with a checkpoint. Press Ctrl-C again") == 1
    if key == "rank-stalls":  # torch would end a run on GPUs at its timeout, without a word of ours
        assert run.output().index("rank 0: no progress for") < run.output().index("imed out")
    if ours:
        assert "Traceback" not in run.output()
    return Ended(int(code != 0), run.output())


# --- models -----------------------------------------------------------------------------------------------------------


@causes(
    "weights-missing",
    "weights-truncated",
    "weights-pointer",
    "weights-of-other-sizes",
    "weights-quantized",
    "model-of-another-kind",
    "kernel-of-a-repository",
)
def damaged_model(key: str, tools: Tools) -> Ended:
    folder = tools.folder / "model"
    if key == "model-of-another-kind":
        T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(
            folder
        )
    else:
        new_hf_model().save_pretrained(folder)
    path, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    if key == "weights-missing":
        weights = load_file(path)
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, path, metadata={"format": "pt"})
    elif key == "weights-truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif key == "weights-pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 14483464192\n")
    config |= {
        "weights-of-other-sizes": {"intermediate_size": 64},
        "weights-quantized": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "kernel-of-a-repository": {"attn_implementation": "someone/kernel:attention"},
    }.get(key, {})
    (folder / "config.json").write_text(json.dumps(config))
    load_causal_lm(ModelOptions(name_or_path=str(folder)))
    return CONTINUED


@causes("model-mixes-lists", "adapter-matches-nothing")
def unfit_model(key: str, tools: Tools) -> Ended:
    if key == "model-mixes-lists":
        check_model(Qwen2MoeConfig(), max_length_tokens=4096)
    adapter = LoraConfig(target_modules=["q_proj", "qkv"])
    ListwiseReranker(new_hf_model(), new_tokenizer(), Objective("generation"), peft_config=adapter)
    return CONTINUED


@causes("logger-without-key", "port-taken")
def failing_library(key: str, tools: Tools) -> Ended:
    with explained_failures():
        if key == "port-taken":
            with socket.socket() as other:
                other.bind(("127.0.0.1", 0))
                other.listen()
                torch.distributed.TCPStore("127.0.0.1", other.getsockname()[1], 1, is_master=True)
        import wandb

        tools.patch.setenv("HOME", str(tools.folder))
        tools.patch.setenv("NETRC", str(tools.folder / "netrc"))
        tools.patch.delenv("WANDB_API_KEY", raising=False)
        tools.patch.setenv("WANDB_SERVICE", "")  # the address of the service that login starts; not for later tests
        try:
            wandb.login()
        finally:
            wandb.teardown()  # the service
    return CONTINUED


# --- tokenizers -------------------------------------------------------------------------------------------------------


@causes("no-pad-token", "no-chat-template", "endless-chat-template", "template-prints-the-date")
def tokenizer(key: str, tools: Tools) -> Ended:
    found = new_tokenizer()
    assert found.pad_token is None
    if key == "no-chat-template":
        found.chat_template = None
    if key == "endless-chat-template":
        found.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
    if key == "template-prints-the-date":
        found.chat_template = "{{ strftime_now('%d %b %Y') }}" + str(found.chat_template)
        assert ["prints the date" in note for note in template_notes(found)] == [True]
        fix_date(found, "2024-07-26")
        assert list(template_notes(found)) == []
    check_tokenizer(found, "generation")
    return CONTINUED


@causes("several-chat-templates", "no-default-chat-template")
def chat_templates(key: str, tools: Tools) -> Ended:
    """Training writes a checkpoint and an export, as with one template."""
    found = new_tokenizer()
    found.chat_template = {"default": found.chat_template, "tool_use": "{{ tools }}"}
    if key.startswith("no"):
        del found.chat_template["default"]
    found.save_pretrained(tools.folder / "base")
    loaded = load_tokenizer(ModelOptions(name_or_path=str(tools.folder / "base")))
    model = ListwiseReranker(new_hf_model(), loaded, Objective("generation"))
    assert model.get_metadata() == {}  # where Composer fails on several templates
    exported = exporting.write(tools.folder / "hf", tokenizer=loaded)
    assert load_tokenizer(ModelOptions(name_or_path=str(exported))).chat_template == new_tokenizer().chat_template
    return CONTINUED


@causes("prompt-template-that-is-not-read", "passages-that-cannot-be-told-apart")
def prompt_template(key: str, tools: Tools) -> Ended:
    style, text = TEMPLATES["own_words" if key.startswith("passages") else "no_system_message"]
    (tools.folder / "prompt.yaml").write_text(text)
    template = read_prompt_template(tools.folder / "prompt.yaml")
    if key.startswith("prompt"):
        check_lists(new_tokenizer(), "generation", {("letters", 3): 1}, template)
    assert style == "letters"
    user = render_user_turn("q", ["one\n[B] more", "two"], style)
    encode_record(Record("r", "", user, "[B] > [A]", template=template), new_tokenizer(), "generation")
    return CONTINUED


@causes("tokens-unknown-to-the-model")
def extra_tokens(key: str, tools: Tools) -> Ended:
    found = new_tokenizer()
    found.add_tokens([f"new{index}" for index in range(40)])
    ListwiseReranker(new_hf_model(), found, Objective("combined"))
    return CONTINUED
