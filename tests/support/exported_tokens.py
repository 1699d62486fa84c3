"""Token ids before export and after reload, held in tests/golden/exported_tokens.json for all versions of transformers.

`python tests/support/exported_tokens.py` writes that file; it was made with transformers 4.53.3.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from support import real_tokenizers

TOKENS = Path(__file__).parents[1] / "golden" / "exported_tokens.json"
TEXTS = (
    "Hello  world",
    "</s>Hello</s> there",
    "<|user|>\nRank [1] > [2]</s>\n<|assistant|>\n[A",
    " leading",
    "  ",
    "\n\nx\t",
    "[INST] query cat [/INST][A] > [B]</s>",
    "é日本👍 don't stop .",
    "<s>a<s> b 1234 5.6<|im_end|> [27",
)
TURNS = [{"role": "user", "content": "query  cat [1]\n"}]
NAMES = ("mistral_v3", "zephyr_v1", "demo", "tiny", "byte_level")


def base_folder(name: str, cache: Path) -> Path:
    """Folder with a tokenizer as a user has it."""
    if name in real_tokenizers.SOURCES:
        return real_tokenizers.tokenizer_folder(name, cache)
    folder = Path(tempfile.mkdtemp(dir=cache)) / name
    if name == "demo":
        from rankllm_composer.demo import build_model_folder

        build_model_folder(folder, ("cat", "query"))
    else:
        from support.tiny_training import new_tokenizer  # imports torch and Composer

        (new_tokenizer() if name == "tiny" else _byte_level()).save_pretrained(folder)
    return folder


def _byte_level():
    """A byte-level tokenizer that puts a space before a text, and has tokens that are special only by its own list."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate(["<s>", "</s>", *letters, "Ġ[", "Ġq", "st"])}
    backend = Tokenizer(models.BPE(vocabulary, [("Ġ", "["), ("Ġ", "q"), ("s", "t")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=["<|im_end|>", "<|user|>"],
        add_prefix_space=True,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template="{% for turn in messages %}<|user|>{{ turn.content }}<|im_end|>{% endfor %}",
    )


def tokens(tokenizer) -> dict[str, list]:
    """Token ids of the texts, and of a prompt by the chat template."""
    prompt = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    return {"texts": rows, "prompt": tokenizer(prompt, add_special_tokens=False)["input_ids"]}


if __name__ == "__main__":
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as cache:
        found = {name: tokens(AutoTokenizer.from_pretrained(base_folder(name, Path(cache)))) for name in NAMES}
    about = "Token ids of TEXTS and TURNS of support/exported_tokens.py, with transformers 4.53.3 and tokenizers 0.21"
    rows = [f' "{name}": {json.dumps(row)}' for name, row in {"about": about, **found}.items()]
    TOKENS.write_text("{\n" + ",\n".join(rows) + "\n}\n")
