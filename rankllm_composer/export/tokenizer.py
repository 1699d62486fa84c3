"""The tokenizer of an exported folder: the same tokens under every version of transformers that reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG = "tokenizer_config.json"
CLASS = "PreTrainedTokenizerFast"
"""The class that reads tokenizer.json as it is. Transformers 5 builds others, such as Llama's, from a vocabulary."""
_REBUILDING = {"add_bos_token", "add_eos_token", "from_slow", "legacy", "sp_model_kwargs", "use_default_system_prompt"}
_OF_THIS_MACHINE = {"backend", "is_local", "local_files_only", "name_or_path"}
_PROBE = " A  b</s>\n[C] [12]\tdé日👍 don't "


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer into a folder, where transformers 4 and 5 load it with the tokens of training."""
    # Older readers look for the chat template in tokenizer_config.json only.
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    if not tokenizer.is_fast:
        return
    path = folder / CONFIG
    keys: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    keys = {name: value for name, value in keys.items() if name not in _REBUILDING | _OF_THIS_MACHINE}
    # What the class of the tokenizer sets.
    keys |= {"tokenizer_class": CLASS, "model_input_names": tokenizer.model_input_names}
    keys |= {"padding_side": tokenizer.padding_side, "truncation_side": tokenizer.truncation_side}
    first = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"] or {}
    if "add_prefix_space" in first:  # the class overwrites it
        keys["add_prefix_space"] = first["add_prefix_space"]
    if isinstance(keys.get("extra_special_tokens"), list):  # transformers 4 has another name for them
        keys["additional_special_tokens"] = keys.pop("extra_special_tokens")
    path.write_text(json.dumps(keys, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def probe_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a text with every special token between other characters, which differ if a tokenizer was rebuilt."""
    special = [token for token in tokenizer.all_special_tokens if isinstance(token, str)]
    text = _PROBE + "".join(f" a{token}b {token}\nc" for token in special)
    return list(tokenizer(text)["input_ids"])
