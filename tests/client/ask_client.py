"""Runs the inference client's own code on questions, with rank_llm and a vllm on the path.

A line of standard input is a JSON list of questions; the answers come back as a line of standard output. Every question
names a kind, a function below, and its arguments.
"""

from __future__ import annotations

import functools
import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import vllm

# Rerankers on T5, which the client imports beside ours and transformers 5 does not have the parts for.
sys.modules["rank_llm.rerank.listwise.lit5.model"] = MagicMock()

from rank_llm.data import Candidate, Query, Request, Result  # noqa: E402
from rank_llm.rerank.listwise.rank_listwise_os_llm import RankListwiseOSLLM  # noqa: E402

start_server = vllm.LLM


@functools.cache
def server(model: str):
    """One server a model, at full precision and without compilation, which a small machine has no time for."""
    return start_server(model=model, dtype="float32", enforce_eager=True, max_logprobs=30, max_model_len=4096)


vllm.LLM = lambda model, **_: server(model)


@dataclass
class Logprob:
    """What vLLM tells of a token, as far as the client reads it."""

    logprob: float
    decoded_token: str


@functools.cache
def client(folder: str, style: str, use_logits: bool = False, **options) -> RankListwiseOSLLM:
    return RankListwiseOSLLM(
        model=folder, device="cpu", use_alpha=style == "letters", use_logits=use_logits, batch_size=4, **options
    )


def result_of(query: str, documents: list[dict]) -> Result:
    candidates = [Candidate(docid=i, score=1.0 / (i + 1), doc=document) for i, document in enumerate(documents)]
    return Result(Query(query, "q"), candidates, [])


def prompt(folder: str, style: str, query: str, documents: list[dict], context_size: int = 4096) -> dict:
    """The prompt of one window that holds all the documents, and the tokens of answer the client asks for."""
    asked = client(folder, style, context_size=context_size)
    text, _ = asked.create_prompt(result_of(query, documents), 0, len(documents))
    return {"text": text, "num_output_tokens": asked.num_output_tokens(len(documents))}


def windows(folder: str, num: int, window: int, stride: int, told: bool) -> list:
    """Windows the client visits over a list, told its length or not."""
    asked, visited = client(folder, "letters", window_size=window, stride=stride), []

    def visit(results, start, stop, *_):
        visited.append([start, stop])
        return results

    asked.permutation_pipeline_batched = visit
    request = Request(Query("q", "q"), [Candidate(str(i), 1.0, {"text": "x"}) for i in range(num)])
    asked.rerank_batch([request], rank_end=num if told else 100, top_k_retrieve=num if told else 100)
    return visited


def answer(folder: str, style: str, num: int, text: str) -> list[int]:
    """The order the client takes from an answer."""
    result = result_of("q", [{"text": "x"}] * num)
    client(folder, style).receive_permutation(result, text, 0, num)
    return [candidate.docid for candidate in result.candidates]


def likeliest(folder: str, style: str, num: int, tokens: list) -> list[int]:
    """The order the client takes from the likeliest tokens of one position."""
    told = {i: Logprob(value, text) for i, (text, value) in enumerate(tokens)}
    text, _ = client(folder, style, use_logits=True)._evaluate_logits(told, (1, 9))
    return answer(folder, style, num, text)


def rerank(folder: str, style: str, use_logits: bool, window: int, stride: int, passes: int, requests: list) -> list:
    """Documents of each request, reranked; requests of one length go together, as the client wants it."""
    asked = client(folder, style, use_logits, window_size=window, stride=stride)
    ranked = []
    for query, documents in requests:
        request = Request(Query(query, "q"), result_of(query, documents).candidates)
        for _ in range(passes):
            num = len(documents)
            (result,) = asked.rerank_batch([request], rank_end=num, top_k_retrieve=num)
            request = Request(result.query, result.candidates)
        ranked.append([candidate.docid for candidate in request.candidates])
    return ranked


def reranker(path: str) -> str:
    """The class of reranker that the client picks for a model path."""
    from rank_llm.rerank import reranker as module

    names = ("SafeOpenai", "SafeGenai", "MonoT5", "DuoT5", "RankFiDDistill", "RankFiDScore", "RankListwiseOSLLM")
    with ExitStack() as patches:
        patches.enter_context(patch.object(module, "get_openai_api_key"))
        patches.enter_context(patch.object(module, "get_genai_api_key"))
        made = {name: patches.enter_context(patch.object(module, name)) for name in names}
        module.Reranker.create_model_coordinator(path, None, False)
    (picked,) = (name for name, constructor in made.items() if constructor.called)
    return picked


def has_foreign_template(path: str) -> bool:
    """Whether the client replaces the chat template of a model at this path."""
    from rank_llm.rerank import vllm_handler

    tokenizer = SimpleNamespace(chat_template="the model's own")
    llm = MagicMock(**{"return_value.get_tokenizer.return_value": tokenizer})
    with patch.object(vllm_handler.vllm, "LLM", llm):
        vllm_handler.VllmHandler(path, None, False, 1, 1, 0.9)
    return tokenizer.chat_template != "the model's own"


def main() -> None:
    functions = (prompt, windows, answer, likeliest, rerank, reranker, has_foreign_template)
    kinds = {function.__name__: function for function in functions}
    told, sys.stdout = sys.stdout, sys.stderr  # the client prints
    for line in sys.stdin:
        answers = []
        for kind, arguments in json.loads(line):
            try:
                answers.append(kinds[kind](**arguments))
            except Exception as error:
                answers.append({"error": f"{type(error).__name__}: {error}"})
        print(json.dumps(answers), file=told, flush=True)


if __name__ == "__main__":
    main()
