"""The gradient of a global batch is the same however it is split over microbatches and ranks, DDP or FSDP2.

One update of SGD with learning rate 1 moves the weights by exactly the gradient; all runs through Composer's loop.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.launching import launch, succeeded
from support.packed_models import new_model, plain_losses, random_sequences
from workers.one_update import FAMILIES

from rankllm_composer.model.objective import Objective

WORKER = Path(__file__).parents[1] / "workers" / "one_update.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{1: cases, 2: cases} by number of ranks."""
    folder = tmp_path_factory.mktemp("one_update")
    for family in ("mistral_tied", "phi_biased_head", *FAMILIES):
        new_model(family).save_pretrained(folder / family)
    for ranks in (1, 2):
        succeeded(launch(WORKER, folder, folder=folder, ranks=ranks))
    return {ranks: torch.load(folder / f"results_{ranks}.pt", weights_only=True) for ranks in (1, 2)}


def normalize_names(weights):
    """Use the parameter names of the HF model."""
    return {name.removeprefix("model."): value for name, value in weights.items()}


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["generation", "ranking", "combined", "combined with noise"])
def test_one_update_is_the_same_for_every_split(results, objective):
    reference_limit = "by_1" if objective == "combined with noise" else "by_3"
    reference = results[1][objective, reference_limit, "ddp"]
    moved = 0
    before = normalize_names({f"model.{k}": v for k, v in new_model("mistral_tied").state_dict().items()})
    compared = 0
    for ranks, cases in results.items():
        for (name, *how), case in ((key, case) for key, case in cases.items() if isinstance(key, tuple)):
            if name != objective:
                continue
            compared += 1
            assert case["losses"] == pytest.approx(reference["losses"], rel=2e-6), (ranks, how)
            for parameter, value in normalize_names(case["weights"]).items():
                expected = normalize_names(reference["weights"])[parameter]
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=3e-6, msg=f"{ranks} {how} {parameter}")
                moved = max(moved, float((value - before[parameter]).abs().max()))
    assert moved > 0.01  # the update is far above the tolerance
    assert compared >= 6


def test_noise_changes_the_gradient(results):
    plain, noised = (results[1][name, "by_1", "ddp"]["losses"] for name in ("combined", "combined with noise"))
    assert plain != pytest.approx(noised, rel=1e-3)


def test_gradients_of_different_weights_stop_both_ranks(results):
    text = results[2]["gradients of other weights"]
    assert text.startswith("batch 1: 2 weights, such as 0.weight, have a gradient on some ranks only")


UPDATES = [(family, activations, "fsdp2") for family in FAMILIES for activations in ("kept", "recomputed")]
UPDATES += [("mixtral", "kept", "ddp"), ("phi_biased_head", "kept", "fsdp2")]


@pytest.mark.parametrize("update", UPDATES, ids="-".join)
def test_an_update_of_two_ranks_equals_that_of_single_lists(results, update):
    """Two ranks, packed by a token budget, against a plain Hugging Face forward of one list at a time.

    Tokens of one rank reach other experts of a mixture than those of the other rank.
    """
    family = update[0]
    reference = new_model(family)
    before = {name: weight.detach().clone() for name, weight in reference.named_parameters()}
    objective = "ranking" if family == "phi_biased_head" else "combined"
    sequences = random_sequences(objective, num=7, seed=5)
    losses = plain_losses(reference, sequences, Objective(objective, ranking_weight=3.0))
    losses["total"].backward()
    case = results[2][update]
    assert case["losses"]["loss/train/total"] == pytest.approx(float(losses["total"]), rel=2e-6)
    after = normalize_names(case["weights"])
    assert after.keys() == before.keys()
    for name, weight in reference.named_parameters():
        gradient = before[name] - after[name]
        expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=3e-6, msg=lambda text, n=name: f"{n}: {text}")
        if "experts" not in name:  # no token may reach an expert; every other weight has a gradient
            assert weight.grad is not None and weight.grad.abs().max() > (1e-5 if objective == "ranking" else 1e-4)
