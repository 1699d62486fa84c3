"""Small tokenizers of the kinds that models use, and a record to tokenize."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rankllm_composer.prompts.permutations import MAX_CANDIDATES, identifiers
from rankllm_composer.prompts.user_turn import SYSTEM_MESSAGE, render_user_turn

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# How GPT-2 cuts text into words, and how Qwen and Llama 3 do: there a bracket and the letters after it are one word.
GPT2_WORDS = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = QWEN_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def record(num_candidates: int = 3, style: str = "letters") -> dict:
    names = identifiers(num_candidates, style)
    values = (
        SYSTEM_MESSAGE,
        render_user_turn("query", [f"passage {i}" for i in range(num_candidates)], style),
        " > ".join(f"[{name}]" for name in reversed(names)),
    )
    return {"id": "r", "conversations": [{"from": "-", "value": value} for value in values]}


def byte_level_tokenizer(words: str, vocabulary_size: int = 800, more: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer that has seen many lists, and `more`, as GPT-2's or Qwen's cuts words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    texts = [turn["value"] for turn in record(99, "numbers")["conversations"]] * 4
    texts += [
        record(n, style)["conversations"][k]["value"] for n in range(1, 27) for style in MAX_CANDIDATES for k in (1, 2)
    ]
    texts += more
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML)


def word_level_tokenizer(words: str, **changes) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words and marks, of which it knows only `words`."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *words.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[\[\]<>]"), "isolated")]
    )
    settings = {"eos_token": "<eos>", "unk_token": "<unk>", "chat_template": CHATML, **changes}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
