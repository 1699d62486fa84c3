"""Composer's loggers and callbacks by name: each records the same metrics as metrics.jsonl for a tiny run."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
from support.launching import metrics, succeeded, train
from support.small_run import RECIPE, small_run

from rankllm_composer.errors import RunError
from rankllm_composer.recipe.load import load_recipe
from rankllm_composer.training.loggers import build_loggers

LOSSES = ("loss/train/total", "loss/train/language_modelling", "loss/train/ranking")
NUM_BATCHES = 6
LOGGERS = (
    "logging.loggers={tensorboard: {log_dir: tb},"
    " wandb: {project: rerankers, init_kwargs: {mode: offline, dir: wb}},"
    " mlflow: {tracking_uri: ml, experiment_name: rerankers, log_system_metrics: false}}"
)
CALLBACKS = (
    "logging.callbacks={speed_monitor: {window_size: 2, gpu_flops_available: 1.0e+12}, lr_monitor: {},"
    " optimizer_monitor: {batch_log_interval: 1}, nan_monitor: {}, memory_monitor: {}}"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, mistral_v3_folder) -> Path:
    """Return the folder of a run on two ranks with all loggers."""
    folder = tmp_path_factory.mktemp("loggers")
    (folder / "wb").mkdir()
    overlay = [*small_run(folder, mistral_v3_folder), "run.folder=run", "run.max_duration=1ep", LOGGERS, CALLBACKS]
    succeeded(train(RECIPE, *overlay, folder=folder, WANDB_SILENT="true"))
    return folder


def lines(folder: Path) -> list[dict]:
    return metrics(folder / "run" / "metrics.jsonl")


def of_metrics_file(folder: Path) -> dict[str, list[float]]:
    return {name: [line[name] for line in lines(folder)] for name in LOSSES}


def test_tensorboard_records_the_losses(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {file.parent for file in (run / "tb").rglob("events.out.tfevents.*")}
    accumulator = EventAccumulator(
        str(folder)
    ).Reload()  # reads the files of all ranks: a value that rank 1 also wrote would appear twice
    kept = {name: [event.value for event in accumulator.Scalars(name)] for name in LOSSES}
    assert kept == {name: pytest.approx(values) for name, values in of_metrics_file(run).items()}


def test_wandb_records_the_losses_offline(run):
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    (file,) = (run / "wb").rglob("*.wandb")
    store = DataStore()
    store.open_for_scan(str(file))
    kept: dict[str, list[float]] = {name: [] for name in LOSSES}
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            if name in kept:
                kept[name].append(float(item.value_json))
    assert kept == {name: pytest.approx(values) for name, values in of_metrics_file(run).items()}


def test_mlflow_records_the_losses_in_a_folder(run):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=str(run / "ml"))
    experiment = client.get_experiment_by_name("rerankers")
    (kept_run,) = client.search_runs([experiment.experiment_id])
    assert kept_run.info.status == "FINISHED"
    for name, values in of_metrics_file(run).items():
        history = sorted(client.get_metric_history(kept_run.info.run_id, name), key=lambda metric: metric.step)
        assert [metric.value for metric in history] == pytest.approx(values)


def test_speed_is_measured_over_a_window(run):
    speeds = lines(run)
    assert ["throughput/tokens_per_sec" in line for line in speeds] == [False, False, True, True, True, True]
    for line in speeds[2:]:
        assert line["throughput/tokens_per_sec"] == pytest.approx(2 * line["throughput/device/tokens_per_sec"])
        mfu = line["throughput/device/flops_per_sec"] / 1e12
        assert line["throughput/device/mfu"] == pytest.approx(mfu) and mfu > 0


def test_the_lr_monitor_logs_the_rate_of_the_next_step(run):
    """Composer logs it after the schedule has advanced; metrics.jsonl has the rate that was used."""
    used = [line["lr"] for line in lines(run)]
    noted = [line["lr-AdamW/group0"] for line in lines(run)]
    assert noted[:-1] == pytest.approx(used[1:]) and noted[-1] == pytest.approx(0, abs=1e-9)


def test_the_optimizer_monitor_logs_gradient_norms(run):
    """Norms are at most 1 after clipping; under sharding, the norm of a weight covers rank 0's shard only."""
    for line in lines(run):
        shares = [value for name, value in line.items() if re.fullmatch(r"l2_norm/grad/(?!global).*", name)]
        assert len(shares) > 10
        assert 0 < math.sqrt(sum(share**2 for share in shares)) < line["l2_norm/grad/global"] + 1e-6
        assert line["l2_norm/grad/global"] == pytest.approx(1, abs=1e-4)


def test_memory_and_nan_monitors_log_nothing_on_a_cpu(run):
    """Memory is measured on CUDA only, and LossGuard stops on NaN first (tests/training/test_guards.py)."""
    assert len(lines(run)) == NUM_BATCHES
    assert not any(name.startswith("memory/") for line in lines(run) for name in line)


def logging_of(section: str, value: dict):
    recipe = load_recipe(RECIPE)
    return dataclasses.replace(recipe, logging=dataclasses.replace(recipe.logging, **{section: value}))


def test_a_misused_logger_is_an_error(tmp_path):
    with pytest.raises(
        RunError, match=r"unknown options \(projet\); expected arguments of Composer's WandBLogger: project, group"
    ):
        build_loggers(logging_of("loggers", {"wandb": {"projet": "x"}}), tmp_path)


def test_loggers_write_into_the_folder_of_the_run(tmp_path, monkeypatch):
    set_by_mlflow = ("ASYNC_LOGGING_BUFFERING_SECONDS", "SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING")
    set_by_mlflow += ("SYSTEM_METRICS_SAMPLING_INTERVAL", "TRACKING_URI")
    for name in ("WANDB_DIR", *(f"MLFLOW_{name}" for name in set_by_mlflow)):
        monkeypatch.setenv(name, "")  # so that it is removed at the end, if a library sets it
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    kinds = {"tensorboard": {}, "wandb": {"project": "p"}, "mlflow": {}}
    *_, tensorboard, wandb, mlflow = build_loggers(logging_of("loggers", kinds), tmp_path)
    assert Path(tensorboard.log_dir) == tmp_path / "tensorboard"
    assert Path(wandb._init_kwargs["dir"]) == tmp_path and wandb._init_kwargs["project"] == "p"
    assert Path(mlflow.tracking_uri) == tmp_path / "mlruns"
    (*_, given) = build_loggers(logging_of("loggers", {"tensorboard": {"log_dir": "~/tb"}}), tmp_path)
    assert Path(given.log_dir) == tmp_path / "home" / "tb"
    (*_, given) = build_loggers(logging_of("loggers", {"wandb": {"init_kwargs": {"dir": "wb"}}}), tmp_path)
    assert Path(given._init_kwargs["dir"]) == Path.cwd() / "wb"  # of this process, whoever writes
