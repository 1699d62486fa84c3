"""The tokenizers of Mistral-7B-Instruct-v0.3 and Zephyr as HF folders, built from files of the package mistral-common.

Both are SentencePiece BPE models. Their pieces are read from the protobuf file here, so that neither sentencepiece nor
a download is needed; a test holds the result against known token ids. Tekken, of later Mistral models, is there too.
"""

from __future__ import annotations

import base64
import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # SentencePiece's types of a piece that is no text or byte


@dataclass(frozen=True)
class Source:
    """Where a tokenizer comes from: a file of mistral-common, and whether a space is put before every piece of text."""

    file: str
    legacy: bool


SOURCES = {
    "mistral_v3": Source("mistral_instruct_tokenizer_240323.model.v3", legacy=False),
    "zephyr_v1": Source("tokenizer.model.v1", legacy=True),
}


def tokenizer_folder(name: str, cache: Path) -> Path:
    """HF folder of a tokenizer in `cache`, built if it is not there; processes may ask at the same time."""
    folder = cache / f"{name}-mistral-common-{version('mistral-common')}-transformers-{version('transformers')}"
    if not folder.exists():
        made = Path(tempfile.mkdtemp(dir=cache))
        build_tokenizer(name).save_pretrained(made)
        config = json.loads((made / "tokenizer_config.json").read_text(encoding="utf-8"))
        config |= {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "legacy": SOURCES[name].legacy}
        (made / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(made)
    return folder


def build_tokenizer(name: str):
    """The tokenizer `name` of `SOURCES` as a LlamaTokenizerFast, pad = eos, with the model's chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import LlamaTokenizerFast

    source = SOURCES[name]
    pieces = list(read_pieces(files("mistral_common").joinpath("data", source.file).read_bytes()))
    vocabulary = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges(pieces, vocabulary), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    for piece, _, kind in pieces:
        if kind in (UNKNOWN, CONTROL):
            tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False)])
    if source.legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0", pair="<s>:0 $A:0 <s>:1 $B:1", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    beginning, end, unknown = (AddedToken(piece, normalized=False) for piece in ("<s>", "</s>", "<unk>"))
    return LlamaTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=beginning,
        eos_token=end,
        pad_token=end,
        unk_token=unknown,
        legacy=source.legacy,
        sp_model_kwargs={},
        spaces_between_special_tokens=False,
        chat_template=(GOLDEN / f"{name}.jinja").read_text(encoding="utf-8"),
    )


TEKKEN = "tekken_240911.json"
TEKKEN_TEMPLATE = (
    "{{- bos_token }}{%- for m in messages %}{%- if m['role'] == 'system' %}"
    "{{- '[SYSTEM_PROMPT]' + m['content'] + '[/SYSTEM_PROMPT]' }}{%- else %}{{- '[INST]' + m['content'] + '[/INST]' }}"
    "{%- endif %}{%- endfor %}"
)


def build_tekken():
    """Tekken (Mistral Small, Nemo) as a fast tokenizer, with its short ASCII tokens alone, and so with other ids."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    data = json.loads(files("mistral_common").joinpath("data", TEKKEN).read_bytes())
    size = data["config"]["default_vocab_size"] - data["config"]["default_num_special_tokens"]
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in data["vocab"][:size]]
    kept = (token for token in tokens if len(token) == 1 or (token.isascii() and len(token) <= 5))
    ranks = {token: rank for rank, token in enumerate(kept)}
    shown = bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(shown[byte] for byte in token)

    merged = [pair for token, rank in ranks.items() if (pair := _last_merge(token, rank, ranks)) is not None]
    vocabulary = {text(token): rank for token, rank in ranks.items()}
    pairs = [(text(left), text(right)) for left, right in merged]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(data["config"]["pattern"]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    beginning = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[beginning])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEKKEN_TEMPLATE
    )


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The pair that joins to a token, after all joins of lower rank."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
        best = min(range(len(joined)), key=joined.__getitem__)
        if joined[best] >= rank:
            return None
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def merges(pieces: list[tuple[str, float, int]], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a piece, the best-scored piece first."""
    found = []
    for piece, score, _ in pieces:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
        found += [(score, *pair) for pair in sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def read_pieces(model: bytes) -> Iterator[tuple[str, float, int]]:
    """(piece, score, type) of each piece of a SentencePiece model: field 1 of the file, whose fields are 1, 2 and 3."""
    for number, message in read_fields(model):
        if number == 1:
            fields = dict(read_fields(message))
            yield fields[1].decode("utf-8"), struct.unpack("<f", fields[2])[0], fields.get(3, 1)


def read_fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(number, value) of each field of a protobuf message."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while place < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            length = {1: 8, 5: 4}.get(key & 7) or varint()
            yield key >> 3, message[place : place + length]
            place += length
