"""Shared memory and cache folders are released when their process is dead, and kept while it is alive."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest
from support.child_process import exists, in_a_child, names_of_a_dataset
from support.missing_calls import no_locks

from rankllm_composer.data.shared_memory import claim_cache, clear_dead_claims
from rankllm_composer.storage.private_folder import private_folder


@pytest.fixture(autouse=True)
def claims_folder(tmp_path, monkeypatch):
    """Keep claims in a folder of this test instead of the machine's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_shared_memory_of_a_dead_process_is_removed(tmp_path):
    number = int(in_a_child(names_of_a_dataset, then_die=True))
    assert exists(f"{number:06}_locals")
    assert len(list(tmp_path.rglob("names-*"))) == 1
    assert clear_dead_claims() == 1
    assert not exists(f"{number:06}_locals")
    assert not list(tmp_path.rglob("names-*"))


def test_shared_memory_of_a_living_process_is_kept(tmp_path):
    number = names_of_a_dataset()
    other = names_of_a_dataset()
    assert number != other and min(number, other) >= 10**6  # streaming's own numbers start at 0
    assert clear_dead_claims() == 0
    assert in_a_child(clear_dead_claims) == "0"
    assert exists(f"{number:06}_locals") and exists(f"{other:06}_locals")


def test_a_cache_folder_belongs_to_one_run(tmp_path):
    folder = tmp_path / "cache"
    claim = claim_cache(folder)
    assert claim_cache(f"{folder}/.") is claim  # the same run may open it twice
    assert in_a_child(lambda: claim_cache(folder, wait_seconds=0)) == "None"
    claim.remove()
    assert in_a_child(lambda: claim_cache(folder, wait_seconds=0), then_die=True) != "None"
    assert claim_cache(folder, wait_seconds=5) is not None  # its holder is dead


def test_a_temporary_directory_without_locks_is_named(tmp_path):
    code = "from rankllm_composer.data.shared_memory import claim_cache; claim_cache('cache')"
    environment = {**os.environ, **no_locks(tmp_path, tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].endswith(
        f"StoreError: {private_folder()}: this file system has no locks. Set TMPDIR to a folder on a local disk."
    )
