"""Run the real command line in separate processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TRAIN = REPOSITORY / "rankllm_composer" / "train.py"
ON_CPU = ["parallelism.device=cpu", "parallelism.precision=fp32", "data.num_workers=1"]


def train(
    recipe: Path | str, *overrides: str, folder: Path, ranks: int = 2, timeout: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `composer -n RANKS rankllm_composer/train.py RECIPE key=value …` in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "composer.cli.launcher", "-n", str(ranks), TRAIN, recipe, *overrides],
        cwd=folder,
        timeout=timeout,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def succeeded(run: subprocess.CompletedProcess[str]) -> str:
    """Return the output of a run; fail the test with it if the run failed."""
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def metrics(path: Path) -> list[dict]:
    """Read the lines of a metrics.jsonl, one per batch."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["event"] == "batch"]
