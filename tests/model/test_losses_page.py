"""docs/losses.md, followed step by step in a copy of the package."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support.launching import REPOSITORY, metrics, succeeded
from support.small_run import RECIPE, small_run

PAGE = (REPOSITORY / "docs" / "losses.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", PAGE, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


@pytest.fixture()
def copy(tmp_path: Path) -> Path:
    """A folder with a copy of the package and its tests after steps 1, 2 and 4 of the page."""
    shutil.copytree(REPOSITORY / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    shutil.copytree(REPOSITORY / "rankllm_composer", tmp_path / "rankllm_composer")
    (tmp_path / "yamls").symlink_to(REPOSITORY / "yamls")
    function, line, slow = blocks("python")
    losses = tmp_path / "rankllm_composer" / "model" / "losses.py"
    above, table, below = losses.read_text().partition("\nLOSSES: ")
    assert table
    losses.write_text(f"{above}\n{function}\n{table}{below}")
    names = tmp_path / "rankllm_composer" / "model" / "loss_table.py"
    above, table, below = names.read_text().partition('    "ranknet": ')
    assert table
    names.write_text(f"{above}    {line}{table}{below}")
    tests = tmp_path / "tests" / "model" / "test_losses.py"
    tests.write_text(f"{tests.read_text()}\n\n{slow}")
    return tmp_path


def run_in(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND` with the copied package instead of the repository's."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_every_step_works(copy, tmp_path, mistral_v3_folder):
    check, test = (shlex.split(block.replace("\\\n", " ")) for block in blocks("console"))
    assert check[:3] == ["rankllm-composer", "recipes", "check"] and test[:3] == ["python", "-m", "pytest"]
    succeeded(run_in(copy, "-m", "rankllm_composer", *check[1:]))
    tested = succeeded(run_in(copy, *test[1:], "-v", "-p", "no:cacheprovider"))
    assert "test_slow_loops_agree[first_place] PASSED" in tested

    folder = tmp_path / "run"
    folder.mkdir()
    overrides = [*small_run(folder, mistral_v3_folder), "run.max_duration=1ba", "schedule.warmup=0ba"]
    overrides.append(f"run.folder={folder}")
    command = ["-m", "rankllm_composer", "train", str(RECIPE), "-n", "1", *overrides, *check[4:]]
    succeeded(run_in(copy, *command))
    (update,) = metrics(folder / "metrics.jsonl")
    assert any("ranking" in name for name in update)


@pytest.mark.slow
def test_a_loss_missing_from_the_table_is_an_error(copy):
    names = copy / "rankllm_composer" / "model" / "loss_table.py"
    names.write_text(names.read_text().replace('    "first_place": {},\n', ""))
    run = run_in(copy, "-c", "import rankllm_composer.model.losses")
    assert run.returncode and "ImportError: model/losses.py defines" in run.stderr and "first_place" in run.stderr
