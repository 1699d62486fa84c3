"""Tests of a built wheel, installed in an environment with the dependencies and without the source tree."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from support.launching import REPOSITORY
from support.small_run import small_run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this source tree, built from a copy to leave the tree unchanged."""
    source = tmp_path_factory.mktemp("source")
    for name in ("rankllm_composer", "yamls"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    built = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = built.glob("*.whl")
    return path


def test_the_wheel_contains_every_module_and_recipe(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = REPOSITORY / "rankllm_composer"
    modules = {f"rankllm_composer/{path.relative_to(package)}" for path in package.rglob("*.py")}
    recipes = {f"rankllm_composer/yamls/{path.name}" for path in (REPOSITORY / "yamls").iterdir()}
    assert modules | recipes | {"rankllm_composer/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of an environment with the wheel installed and the dependencies of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python3.*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], capture_output=True, check=True)
    # A .pth file adds the packages of a folder, but does not process that folder's .pth files, such as the one that
    # an editable install of this source tree leaves.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return folder / "bin"


@pytest.mark.slow
def test_an_installed_wheel_trains_and_exports(installed, mistral_v3_folder, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*arguments: str | Path) -> str:
        command = [installed / "python", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    train = Path(run("-c", "import rankllm_composer.train as module; print(module.__file__)").strip())
    assert installed.parent in train.parents
    listed = run("-m", "rankllm_composer", "recipes", "list")
    assert all(path.stem in listed for path in (REPOSITORY / "yamls").glob("*.yaml"))
    assert (train.parent / "yamls" / "first_mistral.yaml").exists()
    overrides = [*small_run(tmp_path, mistral_v3_folder), "run.max_duration=1ep", "checkpoint.export={interval: 1ep}"]
    run(installed / "rankllm-composer", "train", "first_mistral", "-n", "1", *overrides)
    (contract,) = tmp_path.glob("runs/*/hf/epoch_0/reranker.json")
    assert json.loads(contract.read_text())["objective"] == "combined"
    assert (contract.parent / "model.safetensors").exists()


@pytest.mark.slow
def test_an_installed_wheel_runs_the_demo_and_reports_it(installed, tmp_path):
    """The commands of README, by the name that pip installs, in an empty folder."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        command = [installed / "rankllm-composer", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Warning" not in done.stderr and "deprecated" not in done.stderr
        return done.stdout

    shown = run("demo", "--train-queries", "64", "run.max_duration=1ba", "schedule.warmup=0ba")
    assert "nDCG@10 on 200 held-out queries" in shown
    run("recipes", "copy", "demo", "mine.yaml")
    assert "mine.yaml" in run("recipes", "check", "mine.yaml", "-n", "1")
    run("report", "runs/demo", "--output", "report.html")
    assert (tmp_path / "report.html").read_text().rstrip().endswith("</html>")
