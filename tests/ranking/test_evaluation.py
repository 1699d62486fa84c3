"""Rankings read from a model: packed and cached against one window at a time, the client's reading, the figures."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support.launching import run_python, succeeded
from support.small_tokenizers import GPT2_WORDS, QWEN_WORDS, byte_level_tokenizer
from support.tiny_rerankers import (
    FAMILIES,
    NO_SYSTEM_TEMPLATE,
    WORDS,
    KnownReranker,
    new_contract,
    new_model,
    new_tokenizer,
    record_of,
)

from rankllm_composer.errors import PromptError, RunError
from rankllm_composer.prompts.encoding import EncodedRecord, encode_record
from rankllm_composer.prompts.permutations import identifiers, parse_answer
from rankllm_composer.prompts.prompt_template import Prompt
from rankllm_composer.prompts.windows import Window, answer_lengths, fit_window, record_window, sliding_spans
from rankllm_composer.ranking.decoding import generate_windows, read_likeliest, score_windows_first_token
from rankllm_composer.ranking.evaluation import (
    EvaluationOptions,
    WindowResult,
    evaluate_windows,
    position_matrix,
    summarize,
)
from rankllm_composer.ranking.metrics import chance_ndcg, ndcg

EOS = WORDS.index("</s>")
TOKENIZERS = {
    "doubled_bos": {},
    "one_bos": {"template": NO_SYSTEM_TEMPLATE},
    "no_bos": {"adds_bos": False, "template": NO_SYSTEM_TEMPLATE},
}


@pytest.fixture(params=TOKENIZERS)
def each_tokenizer(request):
    return new_tokenizer(**TOKENIZERS[request.param])


@pytest.fixture
def tokenizer():
    return new_tokenizer()


def several_windows(tokenizer, style: str = "letters", sizes=(5, 1, 3, 6, 2)) -> list[Window]:
    """Windows of different lengths and numbers of candidates."""
    generator = np.random.default_rng(0)
    return [
        record_window(record_of(generator.integers(0, 100, size).tolist(), style, f"r{i}"), tokenizer)
        for i, size in enumerate(sizes)
    ]


def first_token(model, tokenizer, windows, append_bracket=False, **options):
    contract = dataclasses.replace(new_contract(tokenizer), append_bracket=append_bracket)
    return score_windows_first_token(model, tokenizer, windows, contract, **options)


def generate(model, tokenizer, windows, **options):
    return generate_windows(model, tokenizer, windows, new_contract(tokenizer), **options)


def next_logits(model, tokens) -> torch.Tensor:
    """Slow: the whole sequence alone through the plain model."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(map(int, tokens))]), use_cache=False).logits[0, -1]


def greedy(model, tokens, num: int, forbidden: int) -> list[int]:
    tokens = [int(token) for token in tokens]
    for _ in range(num):
        logits = next_logits(model, tokens)
        logits[forbidden] = -math.inf
        tokens.append(int(logits.argmax()))
    return tokens[-num:]


def check_scores(model, tokenizer, append_bracket: bool, top_k: int | None) -> None:
    windows = several_windows(tokenizer)
    answers = first_token(model, tokenizer, windows, append_bracket, top_k=top_k, batch_tokens=800)
    for window, answer in zip(windows, answers, strict=True):
        prompt = window.input_ids[:-1].tolist()
        own = greedy(model, prompt, 1, EOS)[0]
        assert answer.opens_with_bracket == (own == WORDS.index("["))
        read_from = [*prompt, WORDS.index("[") if append_bracket else own]
        log_probabilities = torch.log_softmax(next_logits(model, read_from), -1)
        counted = log_probabilities.argsort(descending=True)[:top_k].tolist()
        for i in range(window.num_candidates):
            token = WORDS.index(identifiers(26)[i])
            expected = float(log_probabilities[token]) if token in counted else -math.inf
            assert answer.scores[i] == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert answer.permutation == tuple(sorted(range(window.num_candidates), key=lambda i: -answer.scores[i]))


def check_writing(model, tokenizer, style: str) -> None:
    windows = several_windows(tokenizer, style, (3, 1, 2))
    answers = generate(model, tokenizer, windows, batch_tokens=250)
    for window, answer in zip(windows, answers, strict=True):
        asked, whole = answer_lengths(tokenizer, window.num_candidates, style)
        tokens = greedy(model, window.input_ids[:-1], whole, EOS)
        assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True)
        text = tokenizer.decode(tokens[:asked], skip_special_tokens=True)
        assert answer.permutation == parse_answer(text, window.num_candidates, style).permutation


@pytest.mark.parametrize("append_bracket", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_scores_equal_each_window_alone(family, append_bracket, tokenizer):
    check_scores(new_model(family), tokenizer, append_bracket, top_k=None)


@pytest.mark.parametrize("top_k", [1, 5, 30, 1000])
def test_packed_scores_of_the_likeliest_tokens(top_k, each_tokenizer):
    check_scores(new_model(), each_tokenizer, False, top_k)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_batches_equal_each_window_alone(family, tokenizer):
    check_writing(new_model(family, seed=1), tokenizer, "letters")


@pytest.mark.parametrize("style", ["letters", "numbers"])
def test_cached_batches_with_every_bos_convention(style, each_tokenizer):
    check_writing(new_model(seed=1), each_tokenizer, style)


def test_constrained_answers_choose_among_the_candidates_left(tokenizer):
    model, windows = new_model(), several_windows(tokenizer)
    answers = generate(model, tokenizer, windows, constrained=True, batch_tokens=700)
    for window, answer in zip(windows, answers, strict=True):
        tokens, left = window.input_ids.tolist(), list(range(window.num_candidates))
        for place in range(window.num_candidates):
            logits = next_logits(model, tokens)
            best = max(left, key=lambda i, logits=logits: float(logits[WORDS.index(identifiers(26)[i])]))
            assert answer.permutation[place] == best
            left.remove(best)
            tokens += [WORDS.index(word) for word in (identifiers(26)[best], "]", ">", "[")]
        assert answer.parsed.is_well_formed


def test_constrained_answers_may_mix_styles(tokenizer):
    windows = several_windows(tokenizer, "letters", (2, 3)) + several_windows(tokenizer, "numbers", (4, 2))
    together = generate(new_model(), tokenizer, windows, constrained=True)
    apart = [generate(new_model(), tokenizer, [window], constrained=True)[0] for window in windows]
    assert together == apart


def test_the_state_of_the_model_is_restored(tokenizer):
    model = new_model().train()
    model.config._attn_implementation = "eager"
    windows = several_windows(tokenizer, sizes=(2, 3))
    first_token(model, tokenizer, windows, append_bracket=True)
    generate(model, tokenizer, windows)
    assert model.training and model.config._attn_implementation == "eager"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_adapters_and_checkpointed_layers_change_nothing(tokenizer):
    from peft import LoraConfig, get_peft_model

    expected = evaluate(new_model(), RECORDS, num_shuffles=1)
    checkpointed = new_model().train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed.config.use_cache = False
    assert evaluate(checkpointed, RECORDS, num_shuffles=1) == expected
    adapted = get_peft_model(new_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert evaluate(adapted, RECORDS, num_shuffles=1) == expected  # a new adapter adds nothing


def test_a_forward_pass_ranks_many_windows(tokenizer):
    model, windows = KnownReranker(), several_windows(tokenizer)
    total = sum(len(window.input_ids) for window in windows)
    for batch_tokens, expected in ((total, 1), (10, len(windows)), (total - 1, 2)):
        model.num_forwards = 0
        first_token(model, tokenizer, windows, append_bracket=False, batch_tokens=batch_tokens)
        assert model.num_forwards == expected


@pytest.mark.parametrize("opening", ["[", ">"])
def test_scores_are_read_after_the_first_token_that_the_model_writes(opening, tokenizer):
    """A model that opens otherwise is scored behind its own token, in a second forward, unless `[` is appended."""
    model, windows = KnownReranker(opening=[opening]), several_windows(tokenizer)
    model.num_forwards = 0
    answers = first_token(model, tokenizer, windows, append_bracket=False)
    assert [answer.opens_with_bracket for answer in answers] == [opening == "["] * len(windows)
    assert model.num_forwards == (1 if opening == "[" else 2)
    appended = first_token(model, tokenizer, windows, append_bracket=True)
    assert [answer.permutation for answer in answers] == [answer.permutation for answer in appended]


def test_an_answer_cannot_begin_with_its_end(tokenizer):
    model = KnownReranker(opening=["</s>"])
    window = record_window(record_of([1, 3, 2]), tokenizer)
    (answer,) = first_token(model, tokenizer, [window], append_bracket=False)
    assert not answer.opens_with_bracket
    unlimited = dataclasses.replace(new_contract(tokenizer), eos_token_ids=())
    (free,) = generate_windows(model, tokenizer, [window], unlimited)
    assert free.text.startswith("B]")  # </s> was written, and is no text
    (held,) = generate(model, tokenizer, [window])
    assert held.text.startswith("wing")


# The client's reading, spelled out: (text of each token, likeliest first; candidates; style) → scores -1, -2, …
# A fourth value names what rank_llm 0.25.7 reads where that is something else.
READINGS = {
    "in order": (["B", "A", "C"], 3, "letters", [-2, -1, -3]),
    "others are passed over": (["B", "x", "]", "AB", "A"], 3, "letters", [-5, -1, None]),
    "lower case and spaces are other tokens": (["b", " A", "A ", "C"], 3, "letters", [None, None, -4]),
    "beyond the list": (["D", "A"], 3, "letters", [-2, None, None]),
    "the likeliest of the same text counts": (["A", "B", "A"], 2, "letters", [-1, -2], [-3, -2]),
    "digits": (["2", "10", "1"], 3, "numbers", [-3, -1, None]),
    "digits of other scripts": (["２", "²", "1"], 3, "numbers", [-3, -1, None]),
    "numbers of two digits": (["10", "2"], 10, "numbers", [None, -2, *[None] * 7, -1]),
    "a number with a zero before it": (["07", "7", "٠٧"], 7, "numbers", [*[None] * 6, -1], [*[None] * 6, -2]),
    "letters are no numbers": (["A", "3"], 3, "numbers", [None, None, -2]),
}


@pytest.mark.parametrize("case", READINGS)
def test_read_likeliest(case):
    texts, num_candidates, style, expected, *older = READINGS[case]
    window = Window("w", np.zeros(1, np.int32), num_candidates, style)
    for client, values in (("0.26.0", expected), ("0.25.7", older[0] if older else expected)):
        scores = read_likeliest(texts, [-1.0 - i for i in range(len(texts))], window, client)
        assert scores.tolist() == [-math.inf if value is None else value for value in values]


def test_first_token_decoding_refuses_numbers_of_several_tokens(tokenizer):
    window = record_window(record_of(list(range(10)), "numbers", "long"), tokenizer)
    with pytest.raises(RunError, match=r"window long has 10 candidates named by numbers, .*\[10\] is several tokens"):
        first_token(new_model(), tokenizer, [window], append_bracket=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_logits_are_refused_and_name_the_window(value, tokenizer):
    """One weight of the head is broken: no order is made up from what it gives."""
    model = new_model()
    with torch.no_grad():
        model.lm_head.weight[40, 0] = value  # times the hidden state: NaN, inf or -inf
    windows = [record_window(record_of([1, 3, 2], record_id=name), tokenizer) for name in ("one", "two")]
    message = "window one: logits contain NaN" if math.isnan(value) else "logits contain NaN"
    for top_k in (30, None):
        with pytest.raises(RunError, match=message):
            first_token(model, tokenizer, windows, append_bracket=True, top_k=top_k)
    if math.isnan(value):
        for constrained in (False, True):
            with pytest.raises(RunError, match=message):
                generate(model, tokenizer, windows, constrained=constrained)


# Windows


@pytest.mark.parametrize(
    "num_candidates, window, stride, expected",
    [
        (100, 20, 10, [(start, start + 20) for start in range(80, -1, -10)]),
        (20, 20, 10, [(0, 20)]),
        (21, 20, 10, [(1, 21), (0, 11)]),
        (35, 20, 10, [(15, 35), (5, 25), (0, 15)]),
        (15, 20, 10, [(0, 15)]),
        (10, 20, 10, [(0, 10)]),
        (2, 20, 10, [(0, 2)]),
        (1, 20, 10, []),
        (0, 20, 10, []),
        (21, 20, 20, [(1, 21)]),
        (40, 20, 20, [(20, 40), (0, 20)]),
        (5, 2, 1, [(3, 5), (2, 4), (1, 3), (0, 2)]),
    ],
)
def test_sliding_spans(num_candidates, window, stride, expected):
    assert sliding_spans(num_candidates, window, stride) == expected


@pytest.mark.parametrize("window, stride", [(1, 1), (20, 0), (20, 21), (0, 0)])
def test_sliding_spans_that_skip_candidates_are_refused(window, stride):
    with pytest.raises(PromptError, match=f"window is {window} and stride {stride}; expected a window"):
        sliding_spans(100, window, stride)


def test_passages_are_cut_until_the_context_holds_them(tokenizer):
    texts = ["wing " * 900, "heat flow", "w5 " * 400]
    older = {"max_passage_words": 45, "client": "0.25.7"}  # 45 words in a window of 20 are 300 in one of 3
    for options in ({}, older):
        free = fit_window("w", "heat", texts, tokenizer, context_size_tokens=10_000, **options)
        assert tokenizer.decode(free.input_ids).count("wing") == 300
    window = fit_window("w", "heat", texts, tokenizer, context_size_tokens=400)
    asked, _ = answer_lengths(tokenizer, 3)
    counts = [tokenizer.decode(window.input_ids).split().count(word) for word in ("wing", "w5")]
    assert counts[0] == counts[1] < 300
    assert 400 - 20 < len(window.input_ids) - 1 + asked <= 400
    with pytest.raises(PromptError, match=r"window w: \d+ tokens of prompt without passages"):
        fit_window("w", "heat " * 400, texts, tokenizer, context_size_tokens=400)


@pytest.mark.parametrize("num, style", [(0, "letters"), (0, "numbers"), (27, "letters"), (100, "numbers")])
def test_more_candidates_than_identifiers_are_refused(num, style, tokenizer):
    with pytest.raises(PromptError, match=f"number of candidates is {num}; expected 1 to .* with {style}"):
        fit_window("w", "heat", ["wing"] * num, tokenizer, prompt=Prompt(style))


@pytest.mark.parametrize("style, num", [("letters", 26), ("numbers", 99), ("letters", 1)])
def test_windows_of_empty_passages_are_ranked(style, num, tokenizer):
    """No text, brackets in the query, as many as there are names, or one: every candidate comes back once."""
    model = new_model()
    window = fit_window("w", "[3] wing [a] {0}", [""] * num, tokenizer, prompt=Prompt(style))
    assert window.num_candidates == num
    answers = generate(model, tokenizer, [window])
    answers += generate(model, tokenizer, [window], constrained=True) if style == "letters" else []
    if style == "letters":
        answers += first_token(model, tokenizer, [window], append_bracket=False)
    assert all(sorted(answer.permutation) == list(range(num)) for answer in answers) and answers


def test_ties_keep_the_presented_order(tokenizer):
    """A head of equal rows scores all candidates alike; the likeliest 30 may miss some, which follow."""
    model = new_model()
    with torch.no_grad():
        model.lm_head.weight[:] = model.lm_head.weight[0]
    window = fit_window("w", "heat", ["wing"] * 20, tokenizer)
    (answer,) = first_token(model, tokenizer, [window], append_bracket=True, top_k=None)
    assert answer.permutation == tuple(range(20))


def test_answer_lengths(each_tokenizer):
    tokenizer = each_tokenizer
    # [ A ] > [ B ] > [ C ] are 11 tokens; without <s> rank_llm 0.25.7, which takes it off, asks for one too few.
    adds_bos = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    assert answer_lengths(tokenizer, 3) == (11, 11)
    assert answer_lengths(tokenizer, 3, client="0.25.7") == (11 if adds_bos else 10, 11)
    # [ 1 0 ] takes two digits
    assert answer_lengths(tokenizer, 10, "numbers")[1] == 10 * 3 + 9 + 1


def test_a_missing_last_bracket_does_not_make_an_answer_malformed(each_tokenizer):
    window = record_window(record_of([1, 3, 2]), each_tokenizer)
    (answer,) = generate(KnownReranker(ending="]"), each_tokenizer, [window])
    assert answer.permutation == (1, 2, 0) and answer.parsed.is_well_formed


class Writer(KnownReranker):
    """Writes the answer of an encoded record, and then `x` without end."""

    def __init__(self, encoded: EncodedRecord, tokenizer) -> None:
        super().__init__()
        self.start, self.size = encoded.response_start, len(tokenizer)
        self.tokens = [*encoded.input_ids[encoded.response_start : -1].tolist(), tokenizer.convert_tokens_to_ids("x")]

    def next_token_logits(self, tokens: list[int]) -> torch.Tensor:
        logits = torch.full((self.size,), -20.0)
        logits[self.tokens[min(len(tokens) - self.start, len(self.tokens) - 1)]] = 10.0
        return logits


@pytest.mark.parametrize("objective", ["generation", "combined"])
def test_answers_whose_first_identifier_may_be_one_token_with_its_bracket(objective):
    some = byte_level_tokenizer(GPT2_WORDS)
    some.add_tokens(["[C"])
    for tokenizer in (byte_level_tokenizer(QWEN_WORDS), some):
        contract = new_contract(tokenizer, objective)
        assert contract.bracket_merges
        assert (contract.identifier_token_ids is None) == (objective == "generation")
        for response in ("[C] > [A] > [B]", "[A] > [C] > [B]"):
            record = dataclasses.replace(record_of([2, 1, 3]), response=response)
            model = Writer(encode_record(record, tokenizer, objective), tokenizer)
            (answer,) = generate_windows(model, tokenizer, [record_window(record, tokenizer)], contract)
            assert answer.text == response and answer.parsed.is_well_formed
            assert answer.permutation == parse_answer(response, 3).permutation
            windows = [record_window(record, tokenizer)]
            if objective == "combined":
                (scored,) = score_windows_first_token(model, tokenizer, windows, contract)
                assert scored.opens_with_bracket and scored.permutation[0] == answer.permutation[0]
            else:
                for call in (score_windows_first_token, partial(generate_windows, constrained=True)):
                    with pytest.raises((PromptError, RunError), match=r"merges with its bracket in the token '\[[AC]'"):
                        call(model, tokenizer, windows, contract)


# Figures


def evaluate(model, records, **options):
    tokenizer = new_tokenizer()
    return evaluate_windows(model, tokenizer, records, new_contract(tokenizer), EvaluationOptions(**options))


RECORDS = [
    record_of([0, 3, 1, 2], record_id="a"),
    record_of([2, 0], record_id="b"),
    record_of([0, 0, 0], record_id="c"),
]
# DCG of [0, 3, 1, 2] over that of [3, 2, 1, 0], and of [2, 0], which is in its best order; c has nothing relevant.
PRESENTED = ((3 / math.log2(3) + 1 / 2 + 2 / math.log2(5)) / (3 + 2 / math.log2(3) + 1 / 2) + 1) / 2


def test_figures_of_a_perfect_model():
    results = evaluate(KnownReranker(ending="]"), RECORDS, num_shuffles=4, bias_decodings=("first_token", "generation"))
    figures = summarize(results)
    assert figures.pop("presented/ndcg@10") == pytest.approx(PRESENTED)
    assert figures.pop("presented/mrr@10") == (1 / 2 + 1) / 2
    chance = figures.pop("chance/ndcg@10")
    assert 0.5 < chance < PRESENTED
    # c's passages are the same, so its order under shuffles is the order shown
    for name in ("first_token", "generation"):
        assert figures.pop(f"{name}/reversed/tau") == pytest.approx((1 + 1 - 1) / 3)
        assert -1 < figures.pop(f"{name}/shuffled/tau") < 1
    expected = {"windows": 3, "judged_windows": 2, "first_token/opens_with_bracket": 1.0}
    expected |= {f"generation/{fault}": 0.0 for fault in ("malformed", "repeated", "out_of_range", "incomplete")}
    expected |= {f"{name}/{metric}@10": 1.0 for name in ("teacher", "oracle") for metric in ("ndcg", "mrr")}
    for name in ("first_token", "generation"):
        expected |= {f"{name}/ndcg@10": 1.0, f"{name}/mrr@10": 1.0, f"{name}/tau": 1.0}
        expected |= {f"{name}/{way}/ndcg@10": 1.0 for way in ("reversed", "shuffled")}
        expected |= {f"{name}/shuffled/ndcg@10_deviation": 0.0}
    expected |= {"agreement/tau": 1.0, "agreement/same_first": 1.0}
    assert figures == pytest.approx(expected)


def test_figures_of_a_model_that_repeats_the_presented_order():
    """The constant order: as good as the first stage, and all position bias."""
    in_order = KnownReranker(rule=lambda values: list(range(len(values))))
    results = evaluate(in_order, RECORDS[:1], num_shuffles=24)
    figures = summarize(results)
    assert figures["first_token/ndcg@10"] == figures["presented/ndcg@10"]
    assert figures["first_token/reversed/tau"] == -1.0
    assert -0.5 < figures["first_token/shuffled/tau"] < 0.5
    assert figures["first_token/shuffled/ndcg@10_deviation"] > 0.05
    matrix = position_matrix(results, "first_token")
    assert (matrix == 24 * np.eye(4)).all()
    assert position_matrix(results, "generation").shape == (0, 0)  # not asked for by default

    backwards = KnownReranker(rule=lambda values: list(reversed(range(len(values)))))
    matrix = position_matrix(evaluate(backwards, RECORDS[:1], num_shuffles=3), "first_token")
    assert (matrix == 3 * np.eye(4)[::-1]).all()


def test_position_matrix_of_a_perfect_model_has_no_diagonal():
    results = evaluate(KnownReranker(), [record_of([5, 9, 1, 7])], num_shuffles=200, decodings=["first_token"])
    matrix = position_matrix(results, "first_token")
    assert matrix.sum() == 800 and matrix.min() > 20 and matrix.max() < 85  # 50 expected in each


@pytest.mark.parametrize(
    "opening, faults",
    [  # the answer has 11 tokens; what it opens with takes the place of its end
        ("[", set()),
        ("[ B ] > [", {"malformed", "repeated", "incomplete"}),
        ("[ Z ] > [", {"malformed", "out_of_range", "incomplete"}),
        ("wing [", {"malformed", "out_of_range"}),
        ("> [", {"malformed"}),
    ],
)
def test_faults_of_answers(opening, faults):
    model = KnownReranker(rule=lambda values: [1, 0, 2], opening=opening.split(), ending="]")
    figures = summarize(evaluate(model, [record_of([1, 2, 3])], decodings=["generation"]))
    found = {name for name in ("malformed", "repeated", "out_of_range", "incomplete") if figures[f"generation/{name}"]}
    assert found == faults
    assert "first_token/tau" not in figures and "agreement/tau" not in figures


def test_agreement():

    def result(first, written):
        return WindowResult("x", (0, 1, 2), None, {"first_token": first, "generation": written})

    figures = summarize([result((0, 1, 2), (0, 2, 1))])
    assert figures["agreement/tau"] == pytest.approx((2 - 1) / 3) and figures["agreement/same_first"] == 1.0
    assert "presented/ndcg@10" not in figures  # nothing is judged
    figures = summarize([result((0, 1, 2), (2, 1, 0))])
    assert (figures["agreement/tau"], figures["agreement/same_first"]) == (-1.0, 0.0)


def test_windows_of_two_ranks_count_once():
    results = evaluate(new_model(), RECORDS)
    gathered = pickle.loads(pickle.dumps([*results, results[0], results[2]]))
    assert summarize(gathered) == summarize(results)
    assert summarize([]) == {"windows": 0, "judged_windows": 0}


@pytest.mark.parametrize("grades", [(0, 3, 1, 2), (1, 0, 0), (0, 0), (2, 2, 2), (1,) + (0,) * 11])
def test_chance_is_the_mean_over_all_orders(grades):
    if len(grades) <= 4:
        expected = np.mean([ndcg(order, k=10) for order in itertools.permutations(grades)])
    else:  # one relevant of 12: at each place as often
        expected = np.mean([1 / math.log2(place + 2) if place < 10 else 0.0 for place in range(12)])
    assert chance_ndcg(grades) == pytest.approx(expected)


def test_shuffles_depend_only_on_seed_and_record():
    one = evaluate(new_model(), RECORDS, num_shuffles=3, seed=5, decodings=["first_token"])
    alone = evaluate(new_model(), RECORDS[1:2], num_shuffles=3, seed=5, decodings=["first_token"])
    orders = [shown.order for shown in one[1].shuffled["first_token"]]
    assert orders == [shown.order for shown in alone[0].shuffled["first_token"]]
    other = evaluate(new_model(), RECORDS, num_shuffles=3, seed=6, decodings=["first_token"])
    assert [r.shuffled for r in other] != [r.shuffled for r in one]


@pytest.mark.slow
def test_ranks_with_a_sharded_model_and_unequal_shares(tmp_path):
    """FSDP2: ranks with fewer windows, or none, keep up with the others; results are those of the whole model."""
    records = [record_of(values, record_id=str(values)) for values in ([1, 2, 3], [9, 4], [6, 2])]
    worker = Path(__file__).parents[1] / "workers" / "evaluate_ranks.py"
    succeeded(run_python([worker, tmp_path], folder=tmp_path, timeout=300))
    ranks = [pickle.loads((tmp_path / f"rank{rank}.pickle").read_bytes()) for rank in (0, 1)]
    for constrained in (False, True):
        whole = evaluate(new_model(), records, constrained=constrained)
        for name in ("uneven", "one rank has no records"):
            assert [*ranks[0][name, constrained], *ranks[1][name, constrained]] == whole
