"""Files of this user in the temporary directory are out of reach of other users."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from support.child_process import in_a_child

from rankllm_composer.errors import StoreError
from rankllm_composer.storage.locks import try_lock
from rankllm_composer.storage.private_folder import SCRATCH_PREFIX, private_folder
from rankllm_composer.storage.scratch import scratch_folder, temporary_files_in_scratch

VICTIM, OTHER = 12001, 12002


@pytest.fixture
def temporary(monkeypatch):
    """A temporary directory as /tmp: everybody may write, and nobody may rename what others wrote."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder)


def as_user(user: int, action) -> str:
    """Return `str(action())` of a process of another user."""

    def act():
        os.setgid(user)
        os.setuid(user)
        try:
            return action()
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    return in_a_child(act)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_every_process_of_a_user_gets_the_same_private_folder(temporary):
    folder = private_folder()
    assert folder.parent == temporary and mode_of(folder) == 0o700
    assert in_a_child(private_folder) == str(private_folder()) == str(folder)


def test_a_folder_that_lets_others_in_or_is_a_link_is_not_used(temporary):
    folder = private_folder()
    folder.chmod(0o770)
    second = private_folder()
    assert second.name == f"{folder.name}-1" and mode_of(second) == 0o700
    second.rmdir()
    second.symlink_to(temporary, target_is_directory=True)
    assert private_folder().name == f"{folder.name}-2"
    assert not list(folder.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="acting as other users needs root")
def test_a_folder_of_another_user_is_not_used(temporary):
    name = f"rankllm_composer-{VICTIM}"

    def squat():
        (temporary / name).mkdir(mode=0o777)
        (temporary / name).chmod(0o777)
        (temporary / f"{name}-1").symlink_to(temporary / name)

    def lock_something():
        from rankllm_composer.data.shared_memory import claim_cache, clear_dead_claims

        claim = claim_cache("/data/cache")
        return claim is not None and claim.is_held, claim.path.parent.name, clear_dead_claims()

    as_user(OTHER, squat)
    assert as_user(VICTIM, lock_something) == f"(True, '{name}-2', 0)"
    assert not list((temporary / name).iterdir())  # nothing was written for the other user
    taken = temporary / f"{name}-2"
    assert taken.stat().st_uid == VICTIM and mode_of(taken) == 0o700
    assert as_user(OTHER, lambda: list(taken.iterdir())).startswith("PermissionError")


@pytest.mark.skipif(os.geteuid() != 0, reason="acting as other users needs root")
def test_a_temporary_directory_without_a_free_name_is_named(temporary):
    def squat():
        for number in range(100):
            (temporary / f"rankllm_composer-{VICTIM}{f'-{number}' if number else ''}").mkdir()

    as_user(OTHER, squat)
    message = as_user(VICTIM, private_folder)
    assert message.startswith(f"StoreError: {temporary}/rankllm_composer-{VICTIM} and 99 more")
    assert message.endswith("Set TMPDIR to another folder.")


def test_a_missing_temporary_directory_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(StoreError, match=r"absent/rankllm_composer-\d+: a folder for locks .*Set TMPDIR|set TMPDIR"):
        private_folder()


def test_a_scratch_folder_is_made_although_another_process_looks_whether_its_maker_lives(temporary, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda num_bytes: "0" * 2 * num_bytes)
    lock = try_lock(private_folder() / f"{SCRATCH_PREFIX}{'0' * 12}.lock")
    assert lock is not None
    threading.Timer(0.3, lock.remove).start()
    with scratch_folder() as folder:
        assert folder.is_dir() and folder.with_name(f"{folder.name}.lock").exists()


def test_scratch_folders_of_killed_processes_are_removed_by_the_next(temporary):
    def fill_and_stay_open():
        context = scratch_folder()
        folder = context.__enter__()
        (folder / "file").write_text("left")
        scopes.append(context)
        return folder

    scopes: list = []
    left = Path(in_a_child(fill_and_stay_open, then_die=True))
    assert (left / "file").exists()
    with scratch_folder() as one, scratch_folder() as other:
        assert not left.exists() and mode_of(one) == 0o700
        assert one.is_dir() and other.is_dir()  # not taken for those of dead processes
    assert not list(private_folder().iterdir())


def test_temporary_files_of_libraries_go_where_the_next_process_removes_them(temporary):
    folder = private_folder()
    with temporary_files_in_scratch():
        made = Path(tempfile.mkdtemp())
        assert made.parent.parent == folder == private_folder()
    assert not made.exists() and tempfile.gettempdir() == str(temporary)
