"""Windows of passages: the client's words, token for token, and what it cannot cut because it has no spaces."""

from __future__ import annotations

import string

import pytest

from rankllm_composer.prompts.clients import CLIENT_VERSIONS
from rankllm_composer.prompts.encoding import encode_prompt
from rankllm_composer.prompts.user_turn import SYSTEM_MESSAGE, render_user_turn
from rankllm_composer.prompts.windows import answer_lengths, fit_window


def as_client(query, texts, tokenizer, context, client="0.26.0"):
    """The client's own loop, slowly: (tokens of the prompt, words it shows of each passage)."""
    num = len(texts)
    words = 300 if client == "0.26.0" else int(300 * (20 / num))
    while True:
        user = render_user_turn(query, [" ".join(text.split()[: max(0, words)]) for text in texts])
        tokens = encode_prompt(SYSTEM_MESSAGE, user, tokenizer, append_bracket=False).tolist()
        excess = len(tokens) - context + answer_lengths(tokenizer, num, client=client)[0]
        if excess <= 0:
            return tokens, words
        words -= max(1, excess // (num * 4))


CHINESE = "检索模型按照与查询的相关性对段落排序、" * 13  # 247 characters, no space
BLOB = "c2hlIHNlbGxzIHNlYXNoZWxscw" * 300
ENGLISH = " ".join(f"the wing of case {i} see https://example.org/wing/{i}?query=heat&page={i}" for i in range(60))


@pytest.mark.parametrize("client", CLIENT_VERSIONS)
@pytest.mark.parametrize("context", [4096, 1500])
def test_english_prompts_are_the_clients_token_for_token(mistral_v3_tokenizer, context, client):
    for texts in ([ENGLISH] * 20, [ENGLISH, "wing", ENGLISH[:900]], ["heat flow " * 400] * 5):
        window = fit_window("w", "heat", texts, mistral_v3_tokenizer, context_size_tokens=context, client=client)
        tokens, words = as_client("heat", texts, mistral_v3_tokenizer, context, client)
        assert window.input_ids[:-1].tolist() == tokens and words > 0
        assert (window.num_emptied, window.client_empties) == (0, False)


@pytest.mark.parametrize(
    "texts, context",
    [
        ([CHINESE] * 20, 4096),
        ([f"{i}{CHINESE}" for i in range(5)], 800),
        ([ENGLISH] * 19 + [BLOB], 4096),
        ([BLOB], 600),
        ([f"https://example.org/{i}/" + "a1b2c3d4/" * 17 for i in range(20)], 1200),  # words shorter than the longest
    ],
    ids=["chinese", "chinese, few", "one blob", "a blob alone", "urls"],
)
def test_passages_without_spaces_are_cut_but_not_emptied(texts, context, mistral_v3_tokenizer):
    window = fit_window("w", "heat", texts, mistral_v3_tokenizer, context_size_tokens=context)
    asked, _ = answer_lengths(mistral_v3_tokenizer, len(texts))
    assert context * 0.8 < len(window.input_ids) - 1 + asked <= context
    prompt = mistral_v3_tokenizer.decode(window.input_ids)
    marks = [prompt.index(f"\n[{name}] ") for name in string.ascii_uppercase[: len(texts)]]
    ends = [*marks[1:], prompt.index("\nSearch Query:")]
    shown = [prompt[mark + 5 : end] for mark, end in zip(marks, ends)]
    assert all(part and text.startswith(part) for part, text in zip(shown, texts))
    _, words = as_client("heat", texts, mistral_v3_tokenizer, context)
    assert window.client_empties and words <= 0 and window.num_emptied == 0


def test_passages_that_are_shown_empty_are_counted(mistral_v3_tokenizer):
    """Not one piece of each fits, but the prompt without passages does."""
    texts, bare = [CHINESE, "", "heat " * 9], fit_window("w", "heat", [""] * 3, mistral_v3_tokenizer)
    context = len(bare.input_ids) - 1 + answer_lengths(mistral_v3_tokenizer, 3)[0]
    window = fit_window("w", "heat", texts, mistral_v3_tokenizer, context_size_tokens=context)
    assert window.input_ids.tolist() == bare.input_ids.tolist()
    assert (window.num_emptied, bare.num_emptied, bare.client_empties) == (2, 0, False)
