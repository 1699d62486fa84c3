"""Values of ranking losses on strict orders and teacher's scores, by other libraries: writes library_losses.json.

python -m venv other && other/bin/pip install sentence-transformers==6.2.0 lightning-ir==0.0.6 torch==2.11.0
other/bin/python tests/support/teacher_loss_values.py > tests/golden/library_losses.json
"""

from __future__ import annotations

import json
from importlib.metadata import version
from types import SimpleNamespace

import lightning_ir.loss as lightning
import torch
from sentence_transformers.cross_encoder import losses as sentence

LISTS = [
    ([0.5, -0.2, 0.1], [0.3, 2.5, -1.0], [0, 2, 0]),
    ([1.2, -0.4, 0.3, 2.0, 0.0, -1.1], [0.1, 3.2, -0.7, 1.1, -4.0, 0.6], [0, 3, 0, 1, 0, 1]),
    ([0.1, 0.7, -0.6, 1.5, 0.9, -2.0, 0.4, 0.3], [1.5, -0.5, 2.0, 0.0, 5.0, -2.5, 0.5, 1.0], [1, 0, 2, 0, 3, 0, 0, 1]),
]
TEMPERATURE = 2.0


class Scores:
    """A CrossEncoder in name only, whose scores of the documents "0", "1", … are given."""

    num_labels = 1
    device = torch.device("cpu")

    def __init__(self, scores):
        self.scores = scores

    def preprocess(self, pairs, **_):
        return {"numbers": torch.tensor([int(document) for _, document in pairs])}

    def __call__(self, tokens):
        return {"scores": self.scores[tokens["numbers"]]}


def of_sentence(loss, scores, labels, **options):
    scores = torch.tensor(scores, requires_grad=True)
    documents = [str(number) for number in range(len(scores))]
    value = loss(Scores(scores), **options)([["query"], [documents]], [torch.tensor(labels, dtype=torch.float32)])
    return shown(value, scores)


def of_lightning(loss, scores, targets, temperature=1.0):
    """The loss of scores and targets, both divided by the temperature."""
    scores = torch.tensor([scores], dtype=torch.float64, requires_grad=True)
    output = SimpleNamespace(scores=scores / temperature)
    batch = SimpleNamespace(targets=torch.tensor([targets], dtype=torch.float64) / temperature)
    return shown(loss.compute_loss(output, batch), scores)


def shown(value, scores):
    (gradient,) = torch.autograd.grad(value, scores)
    return {"loss": value.item(), "grad": gradient.flatten().tolist()}


def cases():
    for scores, teacher, grades in LISTS:
        ranks = [sum(other > one for other in teacher) for one in teacher]
        order = [-float(rank) for rank in ranks]
        log_gains = torch.tensor([1.0 / (rank + 1) for rank in ranks]).log().tolist()
        yield {
            "scores": scores,
            "teacher_scores": teacher,
            "ranks": ranks,
            "grades": grades,
            "sentence-transformers ListMLELoss": of_sentence(
                sentence.ListMLELoss, scores, order, respect_input_order=False
            ),
            "sentence-transformers PListMLELoss": of_sentence(
                sentence.PListMLELoss, scores, order, respect_input_order=False
            ),
            "sentence-transformers ListNetLoss of log 1 / (rank + 1)": of_sentence(
                sentence.ListNetLoss, scores, log_gains
            ),
            "sentence-transformers ADRMSELoss": of_sentence(sentence.ADRMSELoss, scores, order),
            "lightning-ir RankNet": of_lightning(lightning.RankNet(), scores, order),
            "lightning-ir ApproxRankMSE": of_lightning(lightning.ApproxRankMSE(discount="log2"), scores, order),
            "lightning-ir ApproxNDCG": of_lightning(lightning.ApproxNDCG(TEMPERATURE), scores, grades),
            "lightning-ir InfoNCE": of_lightning(lightning.InfoNCE(), scores, teacher, TEMPERATURE),
            "lightning-ir KLDivergence": of_lightning(lightning.KLDivergence(), scores, teacher, TEMPERATURE),
            "lightning-ir SupervisedMarginMSE": of_lightning(lightning.SupervisedMarginMSE(), scores, teacher),
        }


if __name__ == "__main__":
    versions = {name: version(name) for name in ("sentence-transformers", "lightning-ir", "torch")}
    print(json.dumps({"versions": versions, "temperature": TEMPERATURE, "cases": list(cases())}, indent=1))
