"""Size of each ranking loss beside weighted RankNet's, on lists of 20: the default weights of model/loss_table.py.

    python benchmarks/loss_scales.py

The size is the mean norm of the gradient of the scores, which is what a weight scales. The scores are those of a model
that has learned a part of the order: standard normal noise plus the teacher's score. Half of the lists have a strict
order, half have grades 0 to 2, most of them 0.
"""

from __future__ import annotations

import inspect

import torch

from rankllm_composer.model.losses import LOSSES

NUM_LISTS, NUM_CANDIDATES = 2000, 20


def lists(seed: int = 0) -> dict[str, torch.Tensor]:
    """Scores, ranks, grades and teacher's scores, (B, N)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_LISTS, NUM_CANDIDATES)
    teacher = torch.randn(shape, generator=generator)
    order = teacher.argsort(dim=1, descending=True).argsort(dim=1)
    grades = (order < 1).float() + (order < 3).float()
    grades[: NUM_LISTS // 2] = float("nan")
    ranks = torch.where(grades.isnan(), order, (grades.unsqueeze(1) > grades.unsqueeze(2)).sum(dim=2))
    scores = teacher + torch.randn(shape, generator=generator)
    return {"scores": scores, "ranks": ranks, "grades": grades, "teacher_scores": teacher}


def size(name: str, given: dict[str, torch.Tensor]) -> float:
    """Mean norm of the gradient of the scores of a list."""
    scores = given["scores"].clone().requires_grad_()
    known = {what: given[what] for what in ("grades", "teacher_scores")}
    known = {what: values for what, values in known.items() if what in inspect.signature(LOSSES[name]).parameters}
    LOSSES[name](scores, given["ranks"], reduction="sum", **known).backward()
    assert scores.grad is not None
    return float(scores.grad.norm(dim=1).mean())


if __name__ == "__main__":
    given = lists()
    sizes = {name: size(name, given) for name in LOSSES}
    for name, value in sizes.items():
        print(f"{name:<14} size {value:8.4f}   weight {10 * sizes['ranknet'] / value:8.3g}")
