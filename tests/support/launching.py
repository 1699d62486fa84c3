"""Run the real command line in separate processes."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from support.warm_python import WarmProcess

REPOSITORY = Path(__file__).parents[2]
TRAIN = REPOSITORY / "rankllm_composer" / "train.py"
ON_CPU = ["parallelism.device=cpu", "parallelism.precision=fp32", "data.num_workers=1"]


def train(
    recipe: Path | str, *overrides: str, folder: Path, ranks: int = 2, timeout: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `composer -n RANKS rankllm_composer/train.py RECIPE key=value …` in a folder."""
    return launch(TRAIN, recipe, *overrides, folder=folder, ranks=ranks, timeout=timeout, **environment)


def launch(
    script: Path, *arguments: str | Path, folder: Path, ranks: int = 2, timeout: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `composer -n RANKS SCRIPT ARGUMENTS …` in a folder."""
    command = ["-m", "composer.cli.launcher", "-n", str(ranks), script, *arguments]
    return run_python(command, folder=folder, timeout=timeout, environment={**os.environ, **environment})


def run_python(
    command: Sequence[str | Path], *, folder: Path, environment: Mapping[str, str] = os.environ, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in a process that has imported the libraries; its output is all in `stdout`."""
    with tempfile.TemporaryFile() as output:
        process = WarmProcess(command, output.fileno(), folder=folder, environment=environment)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        output.seek(0)
        return subprocess.CompletedProcess(list(command), code, output.read().decode(errors="replace"), "")


def succeeded(run: subprocess.CompletedProcess[str]) -> str:
    """Return the output of a run; fail the test with it if the run failed."""
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def metrics(path: Path) -> list[dict]:
    """Read the lines of a metrics.jsonl, one per batch."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["event"] == "batch"]
