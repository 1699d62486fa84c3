"""Cases of `gpu.py` that train recipes from shards to exports: the demo with a stop, and lists of real lengths."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_cases import Case, Setting, free_memory
from gpu_speed import GIB, peak_flops
from gpu_steps import counted_waits
from safetensors.torch import load_file
from workload import MAX_PASSAGE_WORDS, NUM_PASSAGES, model_config

from rankllm_composer.demo import Collection, CollectionOptions, build_collection, build_model_folder, invent_words
from rankllm_composer.options import RerankOptions
from rankllm_composer.preflight.plan import plan_recipe
from rankllm_composer.ranking.rerank import RerankFiles, rerank_files
from rankllm_composer.recipe.load import load_recipe
from rankllm_composer.training.run import TrainedRun, train
from rankllm_composer.training.stopping import Preempted

MEASURE = "nDCG@10"


def device_overrides(setting: Setting) -> list[str]:
    """Return overrides that train on the device in bfloat16."""
    device = "gpu" if setting.device == "cuda" else "cpu"
    return [f"parallelism.device={device}", "parallelism.precision=amp_bf16", "logging.progress=false"]


def batches(run: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics.jsonl, one per batch."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["event"] == "batch"]


# --- the demo ---


def demo_cases(setting: Setting) -> Iterator[Case]:
    """The demo, once in one go and once stopped by a signal and resumed: the same weights, and what they rank."""
    yield Case("in one go, and stopped and resumed", functools.partial(demo, setting), 90)
    yield Case("host waits per update", functools.partial(waits_of_run, setting), 45)


def demo_files(setting: Setting) -> Collection:
    """Write the demo's collection and model folder, and remove what runs left."""
    folder = setting.folder / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    sizes = CollectionOptions(num_train_queries=128, num_test_queries=8) if setting.reduced else CollectionOptions()
    files = build_collection(folder / "collection", sizes)
    build_model_folder(folder / "model", files.words)
    return files


def demo_overrides(setting: Setting, files: Collection, name: str) -> list[str]:
    """Return overrides of `yamls/demo.yaml` for a run of a name."""
    folder = setting.folder / "demo"
    source = {"run": files.train_run, "judgments": files.judgments, "queries": files.train_queries, "docs": files.docs}
    return [
        *device_overrides(setting),
        f"run.folder={folder / name}",
        f"model.name_or_path={folder / 'model'}",
        f"data.train.local={folder / 'shards'}",
        *(f"data.train.source.{key}={path}" for key, path in source.items()),
        *(["batch.global_lists=16", "schedule.warmup=2ba", "run.max_duration=1ep"] if setting.reduced else []),
        "checkpoint.export.interval=1ep",
        "data.num_workers=1",
    ]


def demo(setting: Setting) -> dict[str, Any]:
    """Train the demo twice; raises ValueError if a batch is missing, or the runs rank differently."""
    files = demo_files(setting)
    overrides = functools.partial(demo_overrides, setting, files)
    started = time.monotonic()
    whole = train(load_recipe("demo", overrides("whole")))
    seconds = time.monotonic() - started
    recipe = load_recipe("demo", overrides("stopped"))
    num_updates = len(batches(whole.folder))
    stopped_at = stop_after(num_updates // 2, recipe)
    resumed = train(recipe)
    lines, expected = batches(resumed.folder), batches(whole.folder)
    if [line["batch"] for line in lines] != list(range(1, num_updates + 1)):
        raise ValueError(f"metrics.jsonl has {len(lines)} batches; expected each of 1 to {num_updates} once")
    losses = [[line["loss/train/total"] for line in run] for run in (expected, lines)]
    before, after = (load_file(exported(run) / "model.safetensors") for run in (whole, resumed))
    change = max(float((after[name].double() - before[name].double()).abs().max()) for name in before)
    ranked = [rerank(files, exported(run), run.folder / "reranked.trec") for run in (whole, resumed)]
    if abs(ranked[0][1] - ranked[1][1]) > 0.05:
        raise ValueError(f"{MEASURE} is {ranked[0][1]:.3f} in one go and {ranked[1][1]:.3f} with a stop")
    return {
        "updates": num_updates,
        "stopped after": stopped_at,
        "largest difference of a loss": max(abs(a - b) for a, b in zip(*losses)),
        "largest difference of a weight": change,
        "bit for bit": "yes" if change == 0.0 else "no",
        "loss, first and last": f"{losses[0][0]:.3f}, {losses[0][-1]:.3f}",
        f"{MEASURE} of the first stage": ranked[0][0],
        "in one go": ranked[0][1],
        "with a stop": ranked[1][1],
        "seconds in one go": seconds,
        "tokens/s": statistics.median(line["tokens_per_second"] for line in expected),
    }


def exported(run: TrainedRun) -> Path:
    """Return the newest export of a run, or raise ValueError."""
    if not run.exports:
        raise ValueError(f"{run.folder} has no export")
    return run.exports[-1]


def stop_after(num_updates: int, recipe: Any) -> int:
    """Train, send SIGTERM to this process after some updates, and return the updates until the run stopped."""
    folder, ended = Path(recipe.run_folder), threading.Event()

    def send() -> None:
        while not ended.wait(0.02):
            if len(batches(folder)) >= num_updates:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watcher = threading.Thread(target=send, daemon=True)
    watcher.start()
    try:
        train(recipe)
    except Preempted:
        return len(batches(folder))
    finally:
        ended.set()
        watcher.join()
    raise ValueError(f"the run was not stopped by SIGTERM after {num_updates} updates")


def rerank(files: Collection, model: Path, output: Path) -> tuple[float, float]:
    """Return the measure of the first stage, and of its candidates ranked by a model."""
    job = RerankFiles(
        queries=files.test_queries,
        documents=files.docs,
        first_stage=files.test_run,
        judgments=files.judgments,
        output=output,
    )
    options = RerankOptions(decoding="first_token")
    report = rerank_files(model, job, options, measures=[MEASURE], progress_bar=False).comparisons[0].comparison
    return report.first_mean, report.second_mean


def waits_of_run(setting: Setting) -> dict[str, Any]:
    """Count the host waits of whole runs of two lengths; their difference is what the further updates wait."""
    files = demo_files(setting)
    durations = (2, 4) if setting.reduced else (8, 24)
    counts = []
    for num_updates in durations:
        overrides = demo_overrides(setting, files, f"{num_updates}_updates")
        overrides += [f"run.max_duration={num_updates}ba", "schedule.warmup=1ba", "checkpoint.export=null"]
        with counted_waits(setting.device) as waits:
            train(load_recipe("demo", [*overrides, "checkpoint.interval=100ep"]))
        counts.append(waits)
    further = durations[1] - durations[0]
    added = {place: (count - counts[0][place]) / further for place, count in counts[1].items()}
    return {"waits per update": sum(added.values()), "where": {place: value for place, value in added.items() if value}}


# --- lists of real lengths ---


def real_cases(setting: Setting) -> Iterator[Case]:
    """`train` on lists of 20 passages of real lengths, from shards and workers through Composer, under FSDP2.

    Each run ends with a checkpoint, 15 GB for the second shape; a larger one would take too long here.
    """
    if setting.reduced:
        rows = [("toy", 4, 0.0)]
    else:
        rows = [("smollm2-135m", 32, 0.0), ("llama-1b", 16, 1.0)]
    for shape, num_lists, checkpointing in rows:
        run = functools.partial(train_on_real_lists, setting, shape, num_lists, checkpointing)
        yield Case(f"{shape}, {num_lists} lists per update", run, 60)


def write_lists(setting: Setting, folder: Path, words: Sequence[str]) -> list[str]:
    """Write queries, passages of lognormal lengths, a first stage and a teacher; return overrides that train on it."""
    num_queries, median = (24, 6) if setting.reduced else (400, 70)
    random = np.random.default_rng(0)
    docs, queries, run, teacher = [], [], [], []
    for query in range(num_queries):
        factor = random.lognormal(0, 0.35)
        queries.append({"qid": f"q{query}", "text": " ".join(random.choice(words, 6))})
        for place in range(NUM_PASSAGES):
            count = int(min(MAX_PASSAGE_WORDS, 1 + random.lognormal(np.log(median), 0.6) * factor))
            docs.append({"docid": f"d{query}-{place}", "title": "", "text": " ".join(random.choice(words, count))})
            run.append(f"q{query} Q0 d{query}-{place} {place + 1} {NUM_PASSAGES - place} words")
        for place, docid in enumerate(random.permutation(NUM_PASSAGES)):
            teacher.append(f"q{query} Q0 d{query}-{docid} {place + 1} {NUM_PASSAGES - place} teacher")
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("docs", docs), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, lines in (("run", run), ("teacher", teacher)):
        (folder / f"{name}.trec").write_text("\n".join(lines) + "\n")
    paths = {"run": "run.trec", "teacher_run": "teacher.trec", "queries": "queries.jsonl", "docs": "docs.jsonl"}
    source = ", ".join(f"{key}: {folder / name}" for key, name in paths.items())
    return [
        f"data.train.local={folder / 'shards'}",
        f"data.train.source={{{source}, window: {NUM_PASSAGES}, stride: {NUM_PASSAGES}, depth: {NUM_PASSAGES}}}",
    ]


def train_on_real_lists(setting: Setting, shape: str, num_lists: int, checkpointing: float) -> dict[str, Any]:
    """Train FirstMistral's recipe on a shape; return its speed and peak memory, beside the plan."""
    folder = setting.folder / "real"
    words = invent_words(400, 1)
    overrides = write_lists(setting, folder, words)
    base, run = folder / shape, folder / f"run-{shape}"
    shutil.rmtree(run, ignore_errors=True)
    build_model_folder(base, tuple(words))
    config = model_config(shape)
    vocabulary = json.loads((base / "config.json").read_text())
    config.update({name: vocabulary[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")})
    if setting.reduced:
        config.vocab_size = vocabulary["vocab_size"]
    config.save_pretrained(base)
    updates = 3 if setting.reduced else 12
    recipe = load_recipe(
        "first_mistral",
        [
            *device_overrides(setting),
            *overrides,
            f"run.folder={run}",
            f"run.max_duration={updates}ba",
            f"model.name_or_path={base}",
            "model.random_weights=true",
            f"model.activation_checkpointing={checkpointing}",
            f"batch.global_lists={num_lists}",
            f"batch.microbatch_tokens={2048 if setting.reduced else 16384}",
            f"data.max_length_tokens={2048 if setting.reduced else 4096}",
            f"data.num_workers={1 if setting.reduced else 4}",
            "schedule.warmup=2ba",
            "checkpoint.interval=100ep",
            "checkpoint.export=null",
        ],
    )
    free_memory(setting.device)
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        train(recipe)
        peak = torch.cuda.max_memory_allocated() if setting.device == "cuda" else None
        late = batches(run)[updates // 3 :]
    finally:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    seconds = statistics.median(line["batch_seconds"] for line in late)
    planned = plan_recipe(recipe, 1, report=lambda line: None)
    found: dict[str, Any] = {
        "recomputed": f"{checkpointing:.0%}",
        "tokens/s": statistics.median(line["tokens_per_second"] for line in late),
        "seconds per update": seconds,
        "loss, first and last": ", ".join(f"{batches(run)[n]['loss/train/total']:.3f}" for n in (0, -1)),
    }
    if (limit := peak_flops(setting.device)) is not None:
        found["MFU"] = planned.flops_per_list * num_lists / seconds / limit
    found["planned GiB"] = planned.memory.peak / GIB
    if peak is not None:
        found |= {"peak GiB": peak / GIB, "plan / measured": planned.memory.peak / peak}
    return found
