"""Chat template and tokenizer: the system role, what is rendered, and each tokenizer that cannot be used."""

from __future__ import annotations

import copy

import pytest
from support.small_tokenizers import CHATML, GPT2_WORDS, QWEN_WORDS, byte_level_tokenizer, record, word_level_tokenizer
from tokenizers import processors
from transformers import BertTokenizer, PreTrainedTokenizerFast

from rankllm_composer.errors import PromptError
from rankllm_composer.prompts.chat import build_messages, render_chat, tokenize
from rankllm_composer.prompts.encoding import encode_prompt, encode_record
from rankllm_composer.prompts.identifier_tokens import check_tokenizer, identifier_token_ids

OBJECTIVES = ("generation", "ranking", "combined")
USER_ONLY = (
    "{% for message in messages if message['role'] == 'user' %}{{ '<user>' + message['content'] + '\n<answer>\n' }}"
    "{% endfor %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + USER_ONLY


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
