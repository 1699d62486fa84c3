"""The design, held true: which room may import which, what importing costs, and how long a room may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import rankllm_composer

ROOMS = sorted(Path(rankllm_composer.__file__).parent.glob("*.py"))
ALLOWED = {
    "__init__": "",
    "assembly": (
        "contract data epochs export loss_guard model model_card objectives permutations preemption "
        "progress prompts published recipe recipe_merge resumption storage streams validation"
    ),
    "attention": "",
    "augmentation": "permutations prompts",
    "chat": "permutations user_turn",
    "checkpoint_store": "checkpoints storage",
    "checkpoints": "",
    "claims": "",
    "clean_stop": "redaction",
    "cli": (
        "comparison demo inspection model_card permutations plan recipe_advice recipe_commands recipe_merge "
        "recipe_schema redaction report rerank run_record serving_check shards"
    ),
    "collection": "permutations prompts",
    "comparison": "metrics",
    "contract": "",
    "data": "augmentation exact_streaming packing permutations prompts shard_index streams",
    "decoding": "inference permutations prompts windows",
    "demo": "collection comparison contract export model permutations prompts recipe recipe_merge rerank train",
    "epochs": "",
    "evaluation": "augmentation contract decoding metrics permutations prompts windows",
    "exact_streaming": "claims epochs shard_index streams",
    "export": "contract model_card rank_zero redaction staging weights",
    "flops": "",
    "gguf_model": "staging",
    "inference": "attention",
    "inspection": "assembly augmentation model objectives packing prompts record_lookup serving_check",
    "json_array": "",
    "known_item": "trec_files",
    "launch": "",
    "ledger": "",
    "loss_guard": "",
    "losses": "",
    "memory": "ledger model objectives packing prompts",
    "metrics": "",
    "model": "attention flops objectives",
    "model_card": "contract published redaction",
    "neftune": "",
    "objectives": "losses",
    "packing": "prompts",
    "permutations": "",
    "pictures": "evaluation progress run_record",
    "plan": "assembly flops memory model objectives prompts recipe recipe_check record_lookup remedies schedule",
    "preemption": "clean_stop",
    "progress": "",
    "prompts": "chat permutations user_turn",
    "published": "",
    "rank_zero": "",
    "recipe": "permutations recipe_schema",
    "recipe_advice": "recipe",
    "recipe_build": "recipe_schema",
    "recipe_check": "permutations recipe recipe_build recipe_schema recipe_secrets",
    "recipe_commands": "recipe recipe_check recipe_merge recipe_schema recipe_secrets redaction",
    "recipe_merge": "recipe recipe_advice recipe_build recipe_check recipe_schema",
    "recipe_schema": "",
    "recipe_secrets": "recipe_schema redaction",
    "record_lookup": "prompts records shard_index storage trec",
    "records": "json_array permutations prompts",
    "redaction": "",
    "remedies": "memory recipe",
    "report": "evaluation model_card pictures progress published run_record",
    "rerank": "comparison contract evaluation retrieval sliding",
    "resumption": "checkpoint_store checkpoints rank_zero run_folder safe_loading",
    "retrieval": "prompts trec_files",
    "run_folder": "",
    "run_record": "comparison progress published redaction run_folder validation",
    "safe_loading": "",
    "schedule": "",
    "serving_check": "contract model permutations prompts windows",
    "shard_blocks": "permutations prompts records shard_index shard_manifest",
    "shard_check": "records shard_index shard_manifest storage",
    "shard_index": "prompts",
    "shard_manifest": "shard_index",
    "shard_merge": "shard_blocks shard_index shard_manifest storage",
    "shard_publish": "shard_index shard_manifest storage",
    "sharding": "",
    "shards": (
        "permutations records shard_blocks shard_check shard_index shard_manifest shard_merge "
        "shard_publish storage trec"
    ),
    "sliding": "contract decoding evaluation windows",
    "staging": "",
    "storage": "",
    "streams": "claims shard_index storage",
    "train": (
        "assembly clean_stop contract data export model_card neftune preemption rank_zero recipe recipe_check "
        "recipe_merge recipe_schema run_folder schedule sharding shards whereabouts"
    ),
    "trec": "permutations prompts records trec_files",
    "trec_files": "records",
    "user_turn": "permutations",
    "validation": "contract evaluation prompts weights",
    "weights": "safe_loading",
    "whereabouts": "",
    "windows": "permutations prompts",
}
KNOW_THE_RECIPE = {"train", "assembly", "plan", "memory", "cli", "demo", "inspection", "record_lookup", "remedies"}
"""Rooms that take a whole recipe; every other takes plain arguments."""


def rooms_imported(path: Path) -> set[str]:
    """Our rooms that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rankllm_composer":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names} - {"__version__"}
    return found


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_a_room_imports_what_the_table_allows(path):
    assert rooms_imported(path) == set(ALLOWED[path.stem].split())


def test_rooms_form_no_cycle():
    seen, order = set(), []

    def visit(room, above):
        assert room not in above, f"cycle: {' → '.join((*above, room))}"
        if room not in seen:
            seen.add(room)
            for other in ALLOWED[room].split():
                visit(other, (*above, room))
            order.append(room)

    for room in ALLOWED:
        visit(room, ())


def test_only_the_outer_rooms_know_the_recipe():
    for room, imported in ALLOWED.items():
        if {"recipe", "recipe_merge"} & set(imported.split()):
            assert room in KNOW_THE_RECIPE or room.startswith("recipe")


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_a_room_holds_one_concept(path):
    assert len(path.read_text().splitlines()) <= 480
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, rankllm_composer; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_make_check_finds_nothing():
    """Lint, format and types, by the very commands of `make check`."""
    root = Path(__file__).parent.parent
    said = subprocess.run(["make", "-n", "check"], cwd=root, capture_output=True, text=True, check=True).stdout
    commands = [line.split() for line in said.splitlines() if line.startswith((".venv/bin/ruff", ".venv/bin/mypy"))]
    assert [command[0].rpartition("/")[2] for command in commands] == ["ruff", "ruff", "mypy"]
    for program, *arguments in commands:
        here = Path(sys.executable).with_name(Path(program).name)
        done = subprocess.run([here, *arguments], cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_rooms_that_are_typed_strictly_are_there():
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    strict = set(re.findall(r'^ {4}"rankllm_composer\.(\w+)",$', project, re.MULTILINE))
    assert strict <= set(ALLOWED) and {"losses", "permutations", "prompts", "packing", "recipe"} <= strict


def test_the_constraints_are_what_is_installed():
    """Exact versions of all that `.[dev]` brings, and no address of where it came from."""
    root = Path(__file__).parent.parent
    pinned = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+-]+", line) for line in pinned)
    versions = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower(): line.partition("==")[2] for line in pinned}
    assert len(versions) == len(pinned)
    wanted, seen = [("rankllm-composer", "dev")], set()
    while wanted:
        package, extra = wanted.pop()
        for need in map(Requirement, metadata.requires(package) or ()):
            name = re.sub(r"[-_.]+", "-", need.name).lower()
            if name in ("pip", "setuptools") or not (need.marker is None or need.marker.evaluate({"extra": extra})):
                continue
            assert versions.get(name) == metadata.version(name), name
            further = {(name, inner) for inner in (*need.extras, "")} - seen
            seen |= further
            wanted += further
    assert len({name for name, _ in seen}) > 100
