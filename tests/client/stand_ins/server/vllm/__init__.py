"""Stand-in for vLLM: greedy decoding with plain transformers, as slow and as simple as can be.

Prompts are texts and are tokenized with special tokens, no sequence may end before `min_tokens`, and the `logprobs`
likeliest tokens of each step are told by the text each decodes to: what the inference client relies on. rank_llm 0.25.7
asks an LLM, 0.26.0 an AsyncLLMEngine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm.outputs import CompletionOutput, Logprob, RequestOutput


@dataclass
class SamplingParams:
    min_tokens: int
    max_tokens: int
    temperature: float
    logprobs: int | None = None


class LLM:
    def __init__(self, model: str, **_) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        has_weights = Path(model, "model.safetensors").exists()
        self.model = AutoModelForCausalLM.from_pretrained(model).float().eval() if has_weights else None

    def get_tokenizer(self):
        return self.tokenizer

    def generate(self, prompts: list[str], params: SamplingParams) -> list[RequestOutput]:
        return [self.complete(prompt, params) for prompt in prompts]

    @torch.no_grad()
    def complete(self, prompt: str, params: SamplingParams) -> RequestOutput:
        assert params.temperature == 0.0
        tokens = self.tokenizer.encode(prompt)
        start, told = len(tokens), []
        while len(tokens) < start + params.max_tokens:
            logits = self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
            log_probabilities = torch.log_softmax(logits, dim=-1)
            if len(tokens) - start < params.min_tokens:
                logits[self.tokenizer.eos_token_id] = -torch.inf
            chosen = int(logits.argmax())
            if params.logprobs is not None:
                likeliest = log_probabilities.topk(min(params.logprobs, len(logits))).indices.tolist()
                told.append(
                    {
                        token: Logprob(float(log_probabilities[token]), self._text(token))
                        for token in dict.fromkeys([chosen, *likeliest])
                    }
                )
            tokens.append(chosen)
            if chosen == self.tokenizer.eos_token_id:
                break
        written = tokens[start:]
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        return RequestOutput([CompletionOutput(text, written, told or None)], tokens[:start])

    def _text(self, token: int) -> str:
        """Text of a token, with the leading space that decoding drops, as vLLM tells it since July 2026."""
        text = self.tokenizer.decode([token])
        piece = self.tokenizer.convert_ids_to_tokens(token)
        return " " * (piece[:1] == "▁" and text[:1] != " ") + text


class AsyncEngineArgs(dict):
    def __init__(self, **arguments) -> None:
        super().__init__(arguments)


class AsyncLLMEngine:
    def __init__(self, server: LLM) -> None:
        self.server = server

    @classmethod
    def from_engine_args(cls, arguments: AsyncEngineArgs) -> AsyncLLMEngine:
        return cls(LLM(**arguments))

    def get_tokenizer(self):
        return self.server.get_tokenizer()

    async def generate(self, prompt: str, params: SamplingParams, request_id: str):
        yield self.server.complete(prompt, params)

    def shutdown(self) -> None:
        pass
