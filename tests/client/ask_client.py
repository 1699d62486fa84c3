"""Runs the inference client's own code on questions, with rank_llm, in one of its versions, and a vllm on the path.

A line of standard input is a JSON list of questions; the answers come back as a line of standard output. Every question
names a kind, a function below, and its arguments.
"""

from __future__ import annotations

import asyncio
import functools
import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock, patch

import vllm

# Rerankers on T5, which version 0.25.7 imports beside ours and transformers 5 does not have the parts for.
sys.modules["rank_llm.rerank.listwise.lit5.model"] = MagicMock()

from rank_llm.data import Candidate, Query, Request, Result  # noqa: E402
from rank_llm.rerank import reranker as dispatch  # noqa: E402
from rank_llm.rerank import vllm_handler  # noqa: E402
from rank_llm.rerank.listwise.rank_listwise_os_llm import RankListwiseOSLLM  # noqa: E402

LOOP = asyncio.new_event_loop()
IS_ASYNC = hasattr(RankListwiseOSLLM, "run_llm_async")  # since 0.26.0
start_server, start_engine = vllm.LLM, vllm.AsyncLLMEngine.from_engine_args
SMALL = {"dtype": "float32", "enforce_eager": True, "max_logprobs": 30, "max_model_len": 4096}
"""Full precision and no compilation, which a small machine has no time for."""


@functools.cache
def server(model: str):
    """One server a model."""
    return start_server(model=model, **SMALL)


@functools.cache
def engine(model: str):
    return start_engine(vllm.AsyncEngineArgs(model=model, **SMALL))


vllm.LLM = lambda model, **_: server(model)
vllm.AsyncLLMEngine.from_engine_args = lambda arguments: engine(
    arguments["model"] if isinstance(arguments, dict) else arguments.model
)


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


def prompt(folder: str, style: str, query: str, documents: list[dict], **options) -> dict:
    """The prompt of one window that holds all the documents, and the tokens of answer the client asks for."""
    asked = client(folder, style, **options)
    text, _ = asked.create_prompt(result_of(query, documents), 0, len(documents))
    return {"text": text, "num_output_tokens": asked.num_output_tokens(len(documents))}


def windows(folder: str, num: int, window: int, stride: int, told: bool) -> list:
    """Windows the client visits over a list, told its length or not."""
    asked, visited = client(folder, "letters", window_size=window, stride=stride), []

    def visit(results, start, stop, *_):
        visited.append([start, stop])
        return results

    async def answer_nothing(*_):
        return "", "", {}

    if IS_ASYNC:
        asked.create_prompt = lambda result, start, stop: (visit(result, start, stop), 0)
        asked.run_llm_async = answer_nothing
    else:
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
    total = (1, num) if IS_ASYNC else (1, 9)  # as each version calls it
    text, _ = client(folder, style, use_logits=True, window_size=max(num, 20))._evaluate_logits(told, total)
    return answer(folder, style, num, text)


def rerank(folder: str, style: str, use_logits: bool, window: int, stride: int, passes: int, requests: list) -> list:
    """Documents of each request, reranked; requests of one length go together, as the client wants it."""
    asked = client(folder, style, use_logits, window_size=window, stride=stride)
    ranked = []
    for query, documents in requests:
        request = Request(Query(query, "q"), result_of(query, documents).candidates)
        for _ in range(passes):
            limits = {"rank_end": len(documents), "top_k_retrieve": len(documents)}
            if IS_ASYNC:  # a real engine belongs to one loop
                (result,) = LOOP.run_until_complete(asked.rerank_batch_async([request], **limits))
            else:
                (result,) = asked.rerank_batch([request], **limits)
            request = Request(result.query, result.candidates)
        ranked.append([candidate.docid for candidate in request.candidates])
    return ranked


def reranker(path: str) -> str:
    """The class of reranker that the client picks for a model path, or what else it does."""
    names = (
        ("listwise", ("SafeOpenai", "SafeGenai", "RankListwiseOSLLM")),
        ("listwise.rank_fid", ("RankFiDDistill", "RankFiDScore")),
        ("pointwise.monot5", ("MonoT5",)),
        ("pointwise.monoelectra", ("MonoELECTRA",)),
        ("pointwise.gaggle_reranker", ("GaggleReranker",)),
        ("pointwise.jina_reranker", ("JinaReranker",)),
        ("pairwise.duot5", ("DuoT5",)),
    )
    made: dict[str, MagicMock] = {name: MagicMock() for _, classes in names for name in classes}
    with ExitStack() as patches:
        patches.enter_context(patch.object(dispatch, "get_openai_api_key"))
        patches.enter_context(patch.object(dispatch, "get_genai_api_key"))
        for module, classes in names:  # 0.25.7 has all of them beside the function, 0.26.0 imports them in it
            stand_in = ModuleType(f"rank_llm.rerank.{module}")
            for name in classes:
                setattr(stand_in, name, made[name])
                if hasattr(dispatch, name):
                    patches.enter_context(patch.object(dispatch, name, made[name]))
            patches.enter_context(patch.dict(sys.modules, {stand_in.__name__: stand_in}))
        dispatch.Reranker.create_model_coordinator(path, None, False)
    picked = [name for name, constructor in made.items() if constructor.called]
    if not picked:
        return "none"
    (name,) = picked
    is_other = name == "RankListwiseOSLLM" and made[name].call_args.kwargs["model"] != path
    return f"{name} of another model" if is_other else name


def has_foreign_template(path: str) -> bool:
    """Whether the client replaces the chat template of a model at this path."""
    tokenizer = SimpleNamespace(chat_template="the model's own")
    made = MagicMock(**{"get_tokenizer.return_value": tokenizer})
    with (
        patch.object(vllm_handler.vllm, "LLM", lambda **_: made),
        patch.object(vllm_handler.vllm.AsyncLLMEngine, "from_engine_args", lambda _: made),
    ):
        vllm_handler.VllmHandler(path, None, False, 1, 1, 0.9).get_tokenizer()
    return tokenizer.chat_template != "the model's own"


def requests_of(path: str) -> dict:
    """What the client's command line and its reader make of a file of requests."""
    from dataclasses import asdict

    from rank_llm.cli.introspection import validate_rerank_batch_file
    from rank_llm.data import read_requests_from_file

    return {"valid": validate_rerank_batch_file(path), "read": [asdict(one) for one in read_requests_from_file(path)]}


def prompt_of_request(folder: str, style: str, path: str, number: int) -> str:
    """The prompt of all candidates of a request in a file."""
    from rank_llm.data import read_requests_from_file

    request = read_requests_from_file(path)[number]
    return client(folder, style).create_prompt(request, 0, len(request.candidates))[0]


def parsed(arguments: list[str]) -> dict:
    """Options that the client's command line takes from arguments."""
    from rank_llm.cli.main import build_parser

    options = vars(build_parser().parse_args(arguments))
    return {name: value for name, value in options.items() if isinstance(value, str | int)}


def main() -> None:
    functions = (prompt, windows, answer, likeliest, rerank, reranker, has_foreign_template, parsed)
    functions += (requests_of, prompt_of_request)
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
