"""Tests of the design: imports between folders, cost of an import, length of a module, tools and templates."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tomllib
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import rankllm_composer

REPOSITORY = Path(__file__).parent.parent
PACKAGE = Path(rankllm_composer.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
COMMON = {"errors", "options", "escaping", "screen", "environment"}
ALLOWED = {
    "redaction": "",
    "distributed": "",
    "processes": "",
    "storage": "",
    "prompts": "",
    "model": "prompts storage",
    "recipe": "model prompts redaction",
    "sources": "prompts storage",
    "checkpoints": "storage",
    "shards": "sources prompts storage processes",
    "ranking": "sources model prompts storage distributed",
    "export": "checkpoints model prompts storage redaction",
    "data": "shards prompts storage distributed",
    "training": "data shards ranking export checkpoints model recipe prompts storage distributed processes redaction",
    "preflight": "training data shards export model recipe prompts",
    "report": "training ranking export recipe storage redaction",
    "launch": "processes storage",
    "train": "training recipe storage processes",
    "demo": "train ranking export model recipe prompts",
    "cli_options": "recipe",
    "cli_shards": "cli_options shards sources recipe",
    "cli_ranking": "cli_options shards ranking export sources recipe",
    "cli": "launch cli_shards cli_ranking demo report preflight training ranking export recipe redaction",
    "__main__": "cli",
}
"""Folder or file → what it may import besides COMMON: only rows above it, so there is no cycle."""
COMPOSER = {"training", "model", "data", "distributed", "launch", "preflight/memory", "demo"}
STREAMING = {"shards", "data", "storage"}


def row_of(path: Path) -> str:
    """Row of the table that a module belongs to: its folder, or its name if it is at the top level."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def modules_imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, at the top level or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [alias.name for alias in node.names if alias.name != "__version__"]
            found |= {f"{node.module}.{name}" for name in names}
    return found


def imported_rows() -> dict[str, set[str]]:
    """Row of the table → other rows that it imports."""
    found: dict[str, set[str]] = {}
    for path in MODULES:
        names = [name.split(".") for name in modules_imported(path)]
        ours = {parts[1] for parts in names if parts[0] == "rankllm_composer" and len(parts) > 1}
        found.setdefault(row_of(path), set()).update(ours - {row_of(path), *COMMON})
    return found


def test_folders_import_only_what_the_table_allows():
    found = imported_rows()
    assert set(found) - {"__init__", *COMMON} == set(ALLOWED)
    for row, allowed in ALLOWED.items():
        assert found[row] <= set(allowed.split()), row


def test_the_import_table_has_no_cycle():
    above: set[str] = set()
    for row, allowed in ALLOWED.items():
        assert set(allowed.split()) <= above, row
        above.add(row)


@pytest.mark.parametrize(("library", "allowed"), [("composer", COMPOSER), ("streaming", STREAMING)])
def test_composer_and_streaming_are_imported_only_where_allowed(library, allowed):
    importers = {path for path in MODULES if library in {name.split(".")[0] for name in modules_imported(path)}}
    names = {str(path.relative_to(PACKAGE).with_suffix("")) for path in importers}
    assert {name for name in names if not {name, name.split("/")[0]} & allowed} == set()
    assert importers


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE).with_suffix("")))
def test_modules_are_short_and_have_a_docstring(path):
    assert len(path.read_text().splitlines()) <= 400
    assert ast.get_docstring(ast.parse(path.read_text()))


def num_parameters(function: ast.FunctionDef) -> int:
    """Parameters that a caller passes: without `self` and `cls`."""
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE).with_suffix("")))
def test_public_functions_have_at_most_8_parameters(path):
    """Pass an options object instead. Commands are exempt: their parameters are command-line options."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    public = [node for node in functions if not node.name.startswith("_") or node.name == "__init__"]
    long = {node.name for node in public if num_parameters(node) > 8}
    assert long == ({"rerank"} if path.name == "cli_ranking.py" else set())


def test_only_one_module_prints_warns_and_makes_loggers():
    """`screen` escapes and redacts what it prints; whatever prints elsewhere would show text from outside raw."""
    raw = {"print", "typer.echo", "click.echo", "warnings.warn", "logging.getLogger"}
    raw |= {f"sys.{stream}.write" for stream in ("stdout", "stderr")}
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in raw:
                found.add((str(path.relative_to(PACKAGE)), ast.unparse(node)))
    allowed = {("screen.py", name) for name in ("print", "warnings.warn", "logging.getLogger")}
    assert found == allowed | {("preflight/memory.py", "logging.getLogger")}  # the level of another library's logger


def test_no_test_module_imports_another():
    tests = Path(__file__).parent
    for path in tests.rglob("*.py"):
        imported = {name for name in modules_imported(path) if re.search(r"(^|\.)test_", name)}
        assert imported == set(), path


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, rankllm_composer; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def check_commands() -> list[list[str]]:
    """The commands of `make check`, as words."""
    printed = subprocess.run(["make", "-n", "check"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    commands = [line.split() for line in printed.splitlines() if line.startswith((".venv/bin/ruff", ".venv/bin/mypy"))]
    assert [command[0].rpartition("/")[2] for command in commands] == ["ruff", "ruff", "mypy"]
    return commands


@pytest.mark.slow
def test_make_check_reports_nothing():
    for program, *arguments in check_commands():
        installed = Path(sys.executable).with_name(Path(program).name)
        done = subprocess.run([installed, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_pre_commit_runs_the_commands_of_make_check():
    file = REPOSITORY / ".pre-commit-config.yaml"
    command = [sys.executable, "-m", "pre_commit", "validate-config", file]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    (repo,) = yaml.safe_load(file.read_text())["repos"]
    assert repo["repo"] == "local"
    assert [hook["entry"].split() for hook in repo["hooks"]] == check_commands()
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in repo["hooks"])


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_an_issue_form_is_valid(name):
    """What GitHub requires of a form: https://docs.github.com/communities (syntax for issue forms)."""
    form = yaml.safe_load((REPOSITORY / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert set(form) <= {"name", "description", "body", "labels", "title", "assignees"}
    assert form["name"] and form["description"]
    fields = [item for item in form["body"] if item["type"] != "markdown"]
    assert fields and len({item["id"] for item in fields}) == len(fields)
    assert all(item["type"] in ("textarea", "input", "dropdown", "checkboxes") for item in fields)
    assert all(item["attributes"]["label"] for item in fields)
    assert any(item.get("validations", {}).get("required") for item in fields)


def test_the_other_templates_are_there():
    config = yaml.safe_load((REPOSITORY / ".github" / "ISSUE_TEMPLATE" / "config.yml").read_text())
    assert config == {"blank_issues_enabled": False}
    assert "make check" in (REPOSITORY / ".github" / "PULL_REQUEST_TEMPLATE.md").read_text()


def test_types_are_checked_strictly_but_where_composer_has_none():
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["mypy"]
    relaxed = {name.split(".")[1] for name in settings["overrides"][0]["module"]}
    assert settings["strict"] is True and relaxed <= COMPOSER


def exact_versions(name: str) -> dict[str, str]:
    """Versions of a constraints file, by normalized name. Every line pins one package, without a URL."""
    lines = [line for line in (REPOSITORY / name).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+-]+", line) for line in lines)
    pairs = [line.split("==") for line in lines]
    versions = {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in pairs}
    assert len(versions) == len(lines)
    return versions


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-current.txt"])
def test_both_stacks_are_within_the_ranges_of_the_package(name):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needs = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["dev"]]
    if name == "constraints-current.txt":
        lines = (REPOSITORY / "overrides-current.txt").read_text().splitlines()
        needs += [Requirement(line) for line in lines if not line.startswith("#")]
    versions = exact_versions(name)
    for need in needs:
        found = versions.get(re.sub(r"[-_.]+", "-", need.name).lower())
        assert found is not None and need.specifier.contains(found), need


def test_every_package_that_is_imported_is_named_in_the_package():
    """pydantic pins pydantic-core, and both are of its own interface."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = [need for name, needs in project["optional-dependencies"].items() if name != "dev" for need in needs]
    named = {Requirement(text).name.lower() for text in project["dependencies"] + extras}
    owners = metadata.packages_distributions() | {"bitsandbytes": ["bitsandbytes"]}
    imported = {name.partition(".")[0] for path in MODULES for name in modules_imported(path)}
    imported -= {*sys.stdlib_module_names, "rankllm_composer", "pydantic_core", "annotated_types"}
    assert "huggingface_hub" in imported
    for name in imported:
        assert {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners[name]} & named, name


def test_the_exact_versions_run_on_the_first_release_of_the_python_that_the_readme_asks_for():
    """Distributions keep an early patch release of Python for years: Debian 12 has 3.11.2."""
    assert "CPython 3.11," in (REPOSITORY / "README.md").read_text()
    named = exact_versions("constraints.txt") | exact_versions("constraints-current.txt")
    needs = {
        found.name: need
        for found in metadata.distributions()
        if re.sub(r"[-_.]+", "-", found.name).lower() in named and (need := found.metadata.get("Requires-Python"))
    }
    assert len(needs) > 100
    assert {name: need for name, need in needs.items() if "3.11.0" not in SpecifierSet(need)} == {}


def test_the_constraints_match_the_installed_versions():
    """Exact versions of everything that `.[dev]` installs, without URLs."""
    pinned = metadata.version("torch").partition("+")[0] == "2.7.0"
    versions = exact_versions("constraints.txt" if pinned else "constraints-current.txt")
    wanted, seen = [("rankllm-composer", "dev")], set()
    while wanted:
        package, extra = wanted.pop()
        for need in map(Requirement, metadata.requires(package) or ()):
            name = re.sub(r"[-_.]+", "-", need.name).lower()
            if name in ("pip", "setuptools") or not (need.marker is None or need.marker.evaluate({"extra": extra})):
                continue
            assert versions.get(name) == metadata.version(name).removesuffix("+cpu"), name
            further = {(name, inner) for inner in (*need.extras, "")} - seen
            seen |= further
            wanted += further
    assert len({name for name, _ in seen}) > 100
