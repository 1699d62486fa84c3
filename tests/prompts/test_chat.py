"""Chat template and tokenizer: the system role, what is rendered, and each tokenizer that cannot be used."""

from __future__ import annotations

import copy
import re

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from rankllm_composer.errors import PromptError
from rankllm_composer.prompts.chat import build_messages, check_tokenizer, identifier_token_ids, render_chat, tokenize
from rankllm_composer.prompts.encoding import encode_prompt, encode_record
from rankllm_composer.prompts.permutations import MAX_CANDIDATES, identifiers
from rankllm_composer.prompts.user_turn import SYSTEM_MESSAGE, render_user_turn

OBJECTIVES = ("generation", "ranking", "combined")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER_ONLY = (
    "{% for message in messages if message['role'] == 'user' %}{{ '<user>' + message['content'] + '\n<answer>\n' }}"
    "{% endfor %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + USER_ONLY
# How GPT-2 cuts text into words, and how Qwen and Llama 3 do: there a bracket and the letters after it are one word.
GPT2_WORDS = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def record(num_candidates: int = 3, style: str = "letters") -> dict:
    names = identifiers(num_candidates, style)
    values = (
        SYSTEM_MESSAGE,
        render_user_turn("query", [f"passage {i}" for i in range(num_candidates)], style),
        " > ".join(f"[{name}]" for name in reversed(names)),
    )
    return {"id": "r", "conversations": [{"from": "-", "value": value} for value in values]}


def byte_level_tokenizer(words: str) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer that has seen many lists, as GPT-2's or Qwen's cuts words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    texts = [
        record(n, style)["conversations"][k]["value"] for n in range(1, 27) for style in MAX_CANDIDATES for k in (1, 2)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
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


@pytest.fixture(scope="module")
def gpt2_like() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer(GPT2_WORDS)


@pytest.fixture(scope="module")
def qwen_like() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer(QWEN_WORDS)


@pytest.fixture
def changed(gpt2_like):
    """A copy of the tokenizer with some attributes changed."""

    def change(**attributes):
        tokenizer = copy.deepcopy(gpt2_like)
        for name, value in attributes.items():
            setattr(tokenizer, name, value)
        return tokenizer

    return change


@pytest.mark.parametrize(
    ("template", "has_system_role"),
    [(CHATML, True), (USER_ONLY, False), (NO_SYSTEM, False)],
    ids=["writes every role", "leaves the system out", "refuses a system turn"],
)
def test_system_role(changed, template: str, has_system_role: bool) -> None:
    messages = build_messages("Be brief.", "Rank.", changed(chat_template=template))
    if has_system_role:
        assert messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rank."}]
    else:
        assert messages == [{"role": "user", "content": "Be brief.\n Rank."}]


def test_system_role_of_the_real_ones(mistral_v3_tokenizer, zephyr_v1_tokenizer) -> None:
    for tokenizer in (mistral_v3_tokenizer, zephyr_v1_tokenizer):
        assert [message["role"] for message in build_messages("s", "u", tokenizer)] == ["system", "user"]
        assert build_messages("", "u", tokenizer) == [{"role": "user", "content": "u"}]


def test_another_template_is_noticed(changed) -> None:
    tokenizer = changed(chat_template=CHATML)
    assert len(build_messages("s", "u", tokenizer)) == 2
    tokenizer.chat_template = USER_ONLY
    assert build_messages("s", "u", tokenizer) == [{"role": "user", "content": "s\n u"}]


def test_render_repairs_text(mistral_v3_tokenizer, zephyr_v1_tokenizer) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "the keeperâ€™s\x07 log &amp; ﬁle"}]
    assert render_chat(messages, mistral_v3_tokenizer) == "<s>[INST] s\n\nthe keeper's log &amp; file[/INST]"
    assert render_chat(messages, zephyr_v1_tokenizer) == (
        "<|system|>\ns</s>\n<|user|>\nthe keeper's log &amp; file</s>\n<|assistant|>\n"
    )


def test_thinking_is_switched_off_as_the_client_does(changed) -> None:
    template = USER_ONLY + "{% if enable_thinking is defined and enable_thinking is false %}<no thoughts>\n{% endif %}"
    assert render_chat([{"role": "user", "content": "u"}], changed(chat_template=template)).endswith("<no thoughts>\n")


def test_doubled_beginning_of_sequence_is_kept(mistral_v3_tokenizer, zephyr_v1_tokenizer) -> None:
    # Mistral's template writes <s> and its tokenizer adds one; Zephyr's template writes none.
    assert encode_prompt("s", "u", mistral_v3_tokenizer, False)[:3].tolist() == [1, 1, 3]
    assert encode_prompt("s", "u", zephyr_v1_tokenizer, False)[:2].tolist() == [1, 523]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["mistral_v3", "zephyr_v1"])
def test_real_tokenizers_carry_every_objective(request, name: str, objective: str) -> None:
    tokenizer = request.getfixturevalue(f"{name}_tokenizer")
    check_tokenizer(tokenizer, objective, "letters", 26)
    check_tokenizer(tokenizer, objective, "numbers", 9)


@pytest.mark.parametrize("name", ["gpt2_like", "qwen_like"])
def test_numbers_with_byte_level_tokenizers(request, name: str) -> None:
    tokenizer = request.getfixturevalue(name)
    check_tokenizer(tokenizer, "combined", "numbers", 9)
    ids = identifier_token_ids(tokenizer, 9, "numbers")
    assert tokenizer.convert_ids_to_tokens(ids) == [str(i) for i in range(1, 10)]
    encoded = encode_record(record(9, "numbers"), tokenizer, "combined")
    assert encoded.identifier_token_ids.tolist() == list(ids)
    assert tokenizer.decode(encoded.input_ids[encoded.response_start :]) == (
        "[9] > [8] > [7] > [6] > [5] > [4] > [3] > [2] > [1]<|im_end|>"
    )


def test_letters_with_a_byte_level_tokenizer(gpt2_like) -> None:
    check_tokenizer(gpt2_like, "combined", "letters", 26)
    encoded = encode_record(record(3), gpt2_like, "combined")
    assert gpt2_like.convert_ids_to_tokens(encoded.identifier_token_ids) == ["A", "B", "C"]
    assert gpt2_like.decode(encoded.input_ids[encoded.response_start :]) == "[C] > [B] > [A]<|im_end|>"


def test_words_and_marks_are_enough() -> None:
    tokenizer = word_level_tokenizer("[ ] > A B C query")
    encoded = encode_record(record(3), tokenizer, "combined")
    # <unk> 0, <eos> 1, [ 2, ] 3, > 4, A 5, B 6, C 7: [C] > [B] > [A] and the end
    assert encoded.input_ids[encoded.response_start :].tolist() == [2, 7, 3, 4, 2, 6, 3, 4, 2, 5, 3, 1]
    assert encoded.identifier_token_ids.tolist() == [5, 6, 7]


def test_merged_identifiers_stop_where_scores_are_read(changed, qwen_like) -> None:
    before = changed()
    before.add_tokens(["[B"])
    after = changed()
    after.add_tokens(["C]"])
    # To qwen_like "[A" is a word, and the lists it has seen made the word a token.
    for tokenizer, name in ((qwen_like, "A"), (before, "B"), (after, "C")):
        message = re.escape(f"identifier [{name}] merges with its bracket")
        for objective in ("ranking", "combined"):
            with pytest.raises(PromptError, match=message + ".* Use numbers"):
                encode_record(record(), tokenizer, objective)
            with pytest.raises(PromptError, match=message):
                check_tokenizer(tokenizer, objective)
            check_tokenizer(tokenizer, objective, "numbers", 3)  # the advice
        check_tokenizer(tokenizer, "generation")
        encoded = encode_record(record(), tokenizer, "generation")
        assert encoded.identifier_token_ids is None
        written = encoded.input_ids[encoded.response_start :]
        assert tokenizer.decode(written).replace(" ", "") == "[C]>[B]>[A]<|im_end|>"
        prompt = encode_prompt(*(turn["value"] for turn in record()["conversations"][:2]), tokenizer, False)
        assert encoded.input_ids[: encoded.response_start].tolist() == prompt.tolist()


def test_alternatives_are_named_only_if_they_work(qwen_like, mistral_v3_tokenizer) -> None:
    with pytest.raises(PromptError, match=r"\[A\] merges .* Use another tokenizer, or the objective generation"):
        identifier_token_ids(qwen_like, 20)  # 10 is two tokens to it
    with pytest.raises(PromptError, match=r"\[10\] is several .* Use lists of at most 9, or the objective generation"):
        identifier_token_ids(qwen_like, 20, "numbers")
    with pytest.raises(PromptError, match=r"Use letters, lists of at most 9, or the objective generation"):
        identifier_token_ids(mistral_v3_tokenizer, 20, "numbers")
    with pytest.raises(PromptError, match=r"Use lists of at most 9, or the objective generation"):
        identifier_token_ids(mistral_v3_tokenizer, 30, "numbers")


def test_only_identifiers_in_use_are_looked_at(changed) -> None:
    tokenizer = changed()
    tokenizer.add_tokens(["[Z"])
    check_tokenizer(tokenizer, "combined", "letters", 25)
    with pytest.raises(PromptError, match=r"\[Z\] merges"):
        check_tokenizer(tokenizer, "combined", "letters", 26)


@pytest.mark.parametrize("added", ["[A", "B]", "\n[", "assistant\n[", "]", "A"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tokens_added_after_the_first_record(changed, objective: str, added: str) -> None:
    tokenizer = changed()
    before = encode_record(record(), tokenizer, objective)
    tokenizer.add_tokens([added], special_tokens=True)
    if added in ("]", "A"):  # tokens already, only cut out first: places move, what they mean does not
        after = encode_record(record(), tokenizer, objective)
        assert after.identifier_token_ids.tolist() == before.identifier_token_ids.tolist()
        assert tokenizer.decode(after.input_ids[after.score_position]) == "["
        assert tokenizer.decode(after.input_ids) == tokenizer.decode(before.input_ids)
    elif objective == "ranking" and added in ("[A", "B]"):  # these are in the prompt, but not where it ends
        after = encode_record(record(), tokenizer, objective)
        assert tokenizer.decode(after.input_ids[after.score_position]) == "["
    else:
        with pytest.raises(PromptError, match=r"merges with its neighbors|is not the token"):
            encode_record(record(), tokenizer, objective)


@pytest.mark.parametrize("objective", ["ranking", "combined"])
def test_identifiers_of_several_tokens_stop_where_scores_are_read(mistral_v3_tokenizer, objective: str) -> None:
    message = r"identifier \[10\] is several tokens.*lists of at most 9, or the objective generation"
    with pytest.raises(PromptError, match=message):
        encode_record(record(10, "numbers"), mistral_v3_tokenizer, objective)
    with pytest.raises(PromptError, match=message):
        check_tokenizer(mistral_v3_tokenizer, objective, "numbers", 20)


def test_identifiers_of_several_tokens_are_generated(mistral_v3_tokenizer) -> None:
    check_tokenizer(mistral_v3_tokenizer, "generation", "numbers", 99)
    encoded = encode_record(record(10, "numbers"), mistral_v3_tokenizer, "generation")
    assert encoded.identifier_token_ids is None
    assert encoded.ranks.tolist() == list(range(9, -1, -1))
    response = mistral_v3_tokenizer.decode(encoded.input_ids[encoded.response_start :])
    assert response == "[10] > [9] > [8] > [7] > [6] > [5] > [4] > [3] > [2] > [1]</s>"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_unknown_identifiers_stop(objective: str) -> None:
    tokenizer = word_level_tokenizer("[ ] > A C")
    with pytest.raises(PromptError, match=r"identifier \[B\] is not the token 'B' everywhere"):
        encode_record(record(), tokenizer, objective)


def test_more_candidates_than_names(mistral_v3_tokenizer) -> None:
    with pytest.raises(PromptError, match="1 to 26"):
        check_tokenizer(mistral_v3_tokenizer, "combined", "letters", 27)
    with pytest.raises(PromptError, match="1 to 99"):
        identifier_token_ids(mistral_v3_tokenizer, 100, "numbers")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template.*Set tokenizer.chat_template"),
        ("{{ nothing.at.all }}", "the chat template failed on the roles user.*Correct tokenizer.chat_template"),
        ("{% for %}", "the chat template failed"),
        ("{{ raise_exception('not today') }}", "failed on the roles user: not today"),
        ("<user>\n", "omits the user turn"),
        (USER_ONLY.replace("<answer>\n", "ANSWER: "), "is tokenized differently when a response follows.*line break"),
    ],
)
def test_templates_that_cannot_be_used(changed, template: str | None, message: str, objective: str) -> None:
    tokenizer = changed(chat_template=template)
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(PromptError, match=message):
            encode_record(record(), tokenizer, objective)
        with pytest.raises(PromptError, match=message):
            check_tokenizer(tokenizer, objective)
        with pytest.raises(PromptError, match=message):
            encode_prompt("s", "u", tokenizer, True)


def test_slow_tokenizers_stop(tmp_path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    tokenizer = BertTokenizer(tmp_path / "vocab.txt", chat_template=CHATML)
    with pytest.raises(PromptError, match=r"BertTokenizer is a slow tokenizer.*use_fast=True"):
        check_tokenizer(tokenizer, "ranking")


def test_no_end_of_sequence(changed) -> None:
    tokenizer = changed(eos_token=None)
    encode_record(record(), tokenizer, "ranking")
    check_tokenizer(tokenizer, "ranking")
    for objective in ("generation", "combined"):
        for call in (lambda o: encode_record(record(), tokenizer, o), lambda o: check_tokenizer(tokenizer, o)):
            with pytest.raises(
                PromptError, match=r"no end-of-sequence token.*Set tokenizer.eos_token, or use the objective"
            ):
                call(objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padding_changes_nothing(changed, gpt2_like, objective: str) -> None:
    assert gpt2_like.pad_token is None
    expected = encode_record(record(), gpt2_like, objective).input_ids.tolist()
    for tokenizer in (gpt2_like, changed(pad_token="<|im_end|>", padding_side="left")):
        check_tokenizer(tokenizer, objective)
        assert encode_record(record(), tokenizer, objective).input_ids.tolist() == expected


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tokens_after_the_text_stop(changed, objective: str) -> None:
    tokenizer = changed()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
    )
    with pytest.raises(PromptError, match=r"adds tokens after the end of the text.*add_eos_token=False"):
        encode_record(record(), tokenizer, objective)


def test_a_small_model_max_length_cuts_nothing(changed) -> None:
    tokenizer = changed(model_max_length=16)
    assert len(tokenize("word " * 100, tokenizer)["input_ids"]) > 100
