"""Push an exported folder to the Hugging Face hub, or to the server that HF_ENDPOINT names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankllm_composer.errors import ModelError, StoreError, first_line, shown_path
from rankllm_composer.prompts.contract import CONTRACT_FILE
from rankllm_composer.redaction import redact
from rankllm_composer.storage.content import EXPORT_FILE, check_content, read_content

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
_KINDS = {".safetensors", ".json", ".yaml", ".jinja", ".txt", ".model", ".md"}
_WEIGHTS_AND_VOCABULARY = ("safetensors", "tokenizer.json", "vocab.", "merges.", "tokenizer.model")
_REPLACED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*config.json",
    "*.jinja",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "tokenizer.*",
)
"""Files of an earlier push that would be loaded beside those of this one."""


@dataclass(frozen=True)
class Push:
    """What is pushed, and where to."""

    folder: Path
    repo: str  # with its owner
    url: str
    is_new: bool
    is_private: bool
    files: dict[str, int]  # name → bytes
    left: tuple[str, ...]  # names of files in the folder that are not pushed

    def lines(self, dry_run: bool) -> Iterator[str]:
        yield f"{shown_path(self.folder)}: {'dry run, nothing was pushed; would be pushed' if dry_run else 'pushed'} to"
        access = "private" if self.is_private else "public"
        yield f"{self.url} ({access}, {'new' if self.is_new else 'exists'}), {sum(self.files.values()) / 1e6:,.1f} MB:"
        width = max(map(len, self.files))
        for name, size in self.files.items():
            yield f"    {name:<{width}}  {size:>14,} bytes"
        if self.left:
            yield f"not part of the export, and left here: {', '.join(self.left)}"


def files_to_push(folder: Path) -> dict[str, int]:
    """Bytes of the files of an export by name: those that it was written with, and its card.

    Raises:
        ModelError: it is not an export, a file is not what was exported, or one holds what looks like a credential.
    """
    content = read_content(folder)
    if content is None or not (folder / CONTRACT_FILE).is_file():
        raise ModelError(f"{folder} has no {EXPORT_FILE}; expected an export. Export the model again.")
    check_content(folder)
    names = [name for name in (CARD, *content.sha256, EXPORT_FILE) if (folder / name).is_file()]
    for name in names:
        if Path(name).suffix not in _KINDS:
            raise ModelError(f"{folder / name} is no file of a model. Remove it and {EXPORT_FILE}, and export again.")
        if not any(part in name for part in _WEIGHTS_AND_VOCABULARY):
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            if redact(text) != text:
                raise ModelError(
                    f"{folder / name} holds what looks like a credential; nothing was pushed. Remove it from the file."
                )
    return {name: (folder / name).stat().st_size for name in names}


def push_export(folder: Path, repo: str, *, public: bool = False, dry_run: bool = False) -> Push:
    """Push an export to a repository, which is created if it does not exist, private unless `public`.

    Files of an earlier push that this one would be mixed up with are removed in the same commit. Nothing else in the
    folder is read: no checkpoints, no state of an optimizer.

    Args:
        repo: NAME or OWNER/NAME.
        dry_run: check the account and the repository, and change nothing.
    Raises:
        ModelError: see `files_to_push`.
        StoreError: no token, or none that may write there; the repository is public and `public` is false; or the hub
            cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars, validate_repo_id

    files = files_to_push(folder)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise StoreError(
            f"--push is {repo!r}; expected NAME or OWNER/NAME ({first_line(error)}). Correct it."
        ) from error
    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="rankllm-composer")
    if huggingface_hub.get_token() is None:
        raise StoreError(
            f"{repo}: no token for {api.endpoint}; expected one that may write. Log in with `hf auth login`, or set "
            "HF_TOKEN."
        )
    with _explained(repo, api):
        repo = _owned(api.whoami(), repo)
        try:
            is_private, is_new = bool(api.repo_info(repo).private), False
        except RepositoryNotFoundError:
            is_private, is_new = not public, True
    if not is_private and not public:
        raise StoreError(
            f"{repo} is public, so that everyone could read the model. Add --public if they may, or name another "
            "repository, which will be private."
        )
    visible = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    url = f"{api.endpoint}/{repo}"
    push = Push(folder, repo, url, is_new, is_private, files, tuple(sorted(visible - files.keys())))
    if dry_run:
        return push
    if not os.isatty(2):
        disable_progress_bars()
    with _explained(repo, api):
        if is_new:
            api.create_repo(repo, private=is_private, exist_ok=True)
        _upload(api, push)
    return push


def _upload(api: HfApi, push: Push) -> None:
    api.upload_folder(
        repo_id=push.repo,
        folder_path=push.folder,
        allow_patterns=list(push.files),
        delete_patterns=list(_REPLACED),
        commit_message=f"Export of {push.folder.name} by rankllm-composer",
    )


def _owned(account: Any, repo: str) -> str:
    """The repository with its owner; StoreError if this account may not write there."""
    owners = [account["name"], *(group["name"] for group in account.get("orgs", ()))]
    owner, _, name = repo.rpartition("/")
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise StoreError(
            f"{repo}: the token of {owners[0]} may only read; expected one that may write. Create one in the settings "
            "of the hub, and set HF_TOKEN to it."
        )
    if owner and owner not in owners:
        raise StoreError(_no_permission(repo, f"{owners[0]} may write to {_listed(owners)}"))
    return f"{owner or owners[0]}/{name}"


def _listed(owners: Sequence[str]) -> str:
    return ", ".join(f"{owner}/…" for owner in owners)


def _no_permission(repo: str, reason: str) -> str:
    return f"{repo}: no permission to write there ({reason}); nothing was pushed. Name another repository or token."


@contextmanager
def _explained(repo: str, api: HfApi) -> Iterator[None]:
    """Turn the errors of the hub, and of the way to it, into ones that say what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # of requests, and what huggingface_hub makes of them in an upload
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        reason = redact(first_line(getattr(cause, "server_message", None) or cause))
        if status is None:
            message = f"{repo}: {api.endpoint} cannot be reached ({type(cause).__name__}); nothing was pushed. "
            message += "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE."
        elif status == 401:
            message = f"{repo}: {api.endpoint} refuses the token; nothing was pushed. Log in with `hf auth login`."
        elif status == 403:
            message = _no_permission(repo, reason)
        elif status == 404:
            message = f"{repo} was not found on {api.endpoint} ({reason}); nothing was pushed. Correct the name."
        else:
            message = f"{repo}: {api.endpoint} answered with an error ({reason}); nothing was pushed. Try again later."
        raise StoreError(message) from error
