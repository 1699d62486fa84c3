"""How long does a plan of each shipped recipe take?

    python benchmarks/plan_seconds.py [RECIPE ...]

Runs `rankllm-composer plan RECIPE` on one thread and without a network, and prints its CPU time, most of which loads
libraries, and its elapsed time. Exits with code 1 if a plan fails or takes more than 30 seconds of CPU time.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 30
RECIPES = Path(__file__).parent.parent / "yamls"
NO_ERROR = (0, 3)  # 3: the run does not fit the GPU


def plan(recipe: str) -> tuple[float, float, int]:
    """Return CPU seconds, elapsed seconds and the exit code of a plan."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "rankllm_composer", "plan", recipe]
    code = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.monotonic() - started, code


def main() -> int:
    recipes = sys.argv[1:]
    is_good = True
    print(f"{'recipe':<24} {'CPU s':>6} {'elapsed s':>9}")
    for recipe in recipes or sorted(path.stem for path in RECIPES.glob("*.yaml")):
        cpu, elapsed, code = plan(recipe)
        is_good = is_good and code in NO_ERROR and cpu <= LIMIT
        print(
            f"{recipe:<24} {cpu:>6.1f} {elapsed:>9.1f}{'' if code in NO_ERROR else f'  exit code {code}'}", flush=True
        )
    return int(not is_good)


if __name__ == "__main__":
    sys.exit(main())
