"""Values of ranking losses on lists with ties, by other libraries: writes tests/golden/tied_losses.json.

    python -m venv other && other/bin/pip install allRank==1.4.3 rax==0.4.0 jax==0.10.2 torch==2.7.0
    other/bin/python tests/support/loss_values.py > tests/golden/tied_losses.json

allRank asks for an old attrs and torchvision; `pip install --no-deps allRank==1.4.3` suffices for its losses.
"""

from __future__ import annotations

import json
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import rax
import torch
from allrank.models.losses import approxNDCGLoss, lambdaLoss, rankNet

LISTS = [
    ([0.5, 0.2, 0.1], [1, 0, 0]),
    ([0.2, 0.5, 0.1, -0.3], [1, 1, 0, 0]),
    ([1.2, -0.4, 0.3, 2.0, 0.0, -1.1], [0, 2, 1, 1, 0, 0]),
    ([0.1, 0.7, -0.6, 1.5, 0.9, -2.0, 0.4, 0.3], [0, 0, 3, 0, 1, 0, 1, 3]),
]


def of_allrank(loss, scores, grades, **options):
    scores = torch.tensor([scores], dtype=torch.float64, requires_grad=True)
    value = loss(scores, torch.tensor([grades], dtype=torch.float64), **options)
    (gradient,) = torch.autograd.grad(value, scores)
    return {"loss": value.item(), "grad": gradient[0].tolist()}


def of_rax(loss, scores, labels, scale=1.0):
    def value(given):
        return scale * loss(given, jnp.array(labels, dtype=jnp.float64))

    found, gradient = jax.value_and_grad(value)(jnp.array(scores, dtype=jnp.float64))
    return {"loss": float(found), "grad": np.asarray(gradient).tolist()}


def cases():
    for scores, grades in LISTS:
        num_pairs = sum(one > other for one in grades for other in grades)
        gains = [2.0**grade - 1 for grade in grades]
        yield {
            "scores": scores,
            "grades": grades,
            "num_pairs": num_pairs,
            "allrank ranknet": of_allrank(rankNet, scores, grades),
            "allrank ndcg_loss2": of_allrank(
                lambdaLoss, scores, grades, weighing_scheme="ndcgLoss2_scheme", reduction="mean"
            ),
            "allrank ndcg_loss2++": of_allrank(
                lambdaLoss, scores, grades, weighing_scheme="ndcgLoss2PP_scheme", reduction="mean"
            ),
            "allrank approx_ndcg": of_allrank(approxNDCGLoss, scores, grades),
            "rax pairwise_logistic_loss": of_rax(rax.pairwise_logistic_loss, scores, grades),
            "rax softmax_loss of 2^g - 1": of_rax(rax.softmax_loss, scores, gains, 1 / sum(gains)),
        }


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    versions = {name: version(name) for name in ("allRank", "rax", "jax", "torch")}
    print(json.dumps({"versions": versions, "cases": list(cases())}, indent=1))
