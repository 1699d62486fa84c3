"""Values and gradients of other libraries, on strict orders, teacher's scores and grades."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from rankllm_composer.model.losses import (
    adr_mse_loss,
    approx_ndcg_loss,
    info_nce_loss,
    kl_divergence_loss,
    listmle_loss,
    listnet_loss,
    margin_mse_loss,
    p_listmle_loss,
    ranknet_loss,
)

# By sentence-transformers and lightning-ir; tests/support/teacher_loss_values.py wrote the file.
LIBRARY = json.loads((Path(__file__).parents[1] / "golden" / "library_losses.json").read_text())
TEMPERATURE = LIBRARY["temperature"]

# Name in the file → our loss, what it is given beside the scores, and our value as a multiple of theirs.
EQUALS = {
    "sentence-transformers ListMLELoss": (listmle_loss, "", 1),
    "sentence-transformers PListMLELoss": (p_listmle_loss, "", 1),
    "sentence-transformers ListNetLoss of log 1 / (rank + 1)": (listnet_loss, "", 1),
    "sentence-transformers ADRMSELoss": (adr_mse_loss, "", 1),
    "lightning-ir RankNet": (partial(ranknet_loss, weighted=False), "", 1),
    "lightning-ir ApproxRankMSE": (adr_mse_loss, "", 1),
    "lightning-ir ApproxNDCG": (partial(approx_ndcg_loss, temperature=TEMPERATURE), "grades", 1),
    "lightning-ir InfoNCE": (partial(info_nce_loss, temperature=TEMPERATURE), "", 1),
    "lightning-ir KLDivergence": (
        partial(kl_divergence_loss, temperature=TEMPERATURE),
        "teacher_scores",
        TEMPERATURE**2,  # it leaves the temperature to its caller, and so has no factor T^2
    ),
    "lightning-ir SupervisedMarginMSE": (margin_mse_loss, "teacher_scores", 1),
}


@pytest.mark.parametrize("key", EQUALS)
def test_values_and_gradients_are_those_of_the_library(key):
    loss, what, factor = EQUALS[key]
    assert len(LIBRARY["cases"]) == 3
    for case in LIBRARY["cases"]:
        assert set(case) == {"scores", "teacher_scores", "ranks", "grades", *EQUALS}
        grades = case["grades"]
        ranks = [sum(other > one for other in grades) for one in grades] if what == "grades" else case["ranks"]
        known = {what: torch.tensor([case[what]], dtype=torch.float64)} if what else {}
        scores = torch.tensor([case["scores"]], dtype=torch.float64, requires_grad=True)
        value = loss(scores, torch.tensor([ranks]), **known)
        value.backward()
        assert value.item() == pytest.approx(factor * case[key]["loss"], rel=2e-6)  # half of them compute in float32
        assert scores.grad[0].tolist() == pytest.approx([factor * slope for slope in case[key]["grad"]], abs=2e-6)
