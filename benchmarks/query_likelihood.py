"""Rank candidates by the likelihood of the query under a language model that has read the passage: no training.

The score of a candidate is the mean log-probability of the query's tokens after the passage (Ponte and Croft 1998, "A
language modeling approach to information retrieval"; with a pretrained model: Sachan et al. 2022, "Improving Passage
Retrieval with Zero-Shot Question Generation").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import log_softmax

BATCH_SIZE = 20


@torch.inference_mode()
def likelihoods(model: Any, tokenizer: Any, query: str, passages: Sequence[str]) -> list[float]:
    """Return the mean log-probability of the query's tokens after each passage."""
    asked = tokenizer(f" {query}", add_special_tokens=False)["input_ids"]
    given = [tokenizer(f"{text}\nQuery:", add_special_tokens=False)["input_ids"] for text in passages]
    ids = torch.full((len(given), max(map(len, given)) + len(asked)), tokenizer.pad_token_id)
    for row, tokens in enumerate(given):  # padding is on the right, so the causal mask hides it
        ids[row, : len(tokens) + len(asked)] = torch.tensor(tokens + asked)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    scores = []
    for row, tokens in enumerate(given):
        logits = model.lm_head(hidden[row, len(tokens) - 1 : len(tokens) + len(asked) - 1])
        scores.append(float(log_softmax(logits, -1)[torch.arange(len(asked)), asked].mean()))
    return scores


def rank_by_likelihood(
    folder: Path, queries: Mapping[str, str], run: Mapping[str, Sequence[str]], texts: Mapping[str, str], output: Path
) -> None:
    """Rank the candidates of each query by likelihood and write a TREC run."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = []
    for qid, docids in run.items():
        scores: list[float] = []
        for start in range(0, len(docids), BATCH_SIZE):
            passages = [texts[docid] for docid in docids[start : start + BATCH_SIZE]]
            scores += likelihoods(model, tokenizer, queries[qid], passages)
        ranked = sorted(zip(docids, scores), key=lambda pair: -pair[1])
        lines += [f"{qid} Q0 {docid} {rank} {score:.6f} likelihood\n" for rank, (docid, score) in enumerate(ranked, 1)]
    output.write_text("".join(lines), encoding="utf-8")
