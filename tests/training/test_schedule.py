"""Learning rates against transformers' schedules, which the published runs used, and against visible arithmetic."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from rankllm_composer.recipe.times import updates_in
from rankllm_composer.training.schedule import apply_schedule, build_schedule, learning_rate_factor


def rates(scheduler, optimizer, count):
    seen = []
    for _ in range(count):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def new_optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-6)


REFERENCES = {
    "cosine": lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 50, 120),
    "linear": lambda optimizer: get_linear_schedule_with_warmup(optimizer, 50, 120),
    "constant": lambda optimizer: get_constant_schedule_with_warmup(optimizer, 50),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_equals_the_schedule_of_transformers(name):
    ours, theirs = new_optimizer(), new_optimizer()
    schedule = build_schedule(
        ours,
        name=name,
        warmup="50ba",
        final_fraction=0.0,
        max_duration="3ep",
        updates_per_epoch=40,
        lists_per_update=128,
    )
    assert rates(schedule, ours, 120) == pytest.approx(rates(REFERENCES[name](theirs), theirs, 120), rel=1e-12)


def test_a_longer_run_resumes_with_its_new_rate():
    def schedule_of(optimizer, epochs):
        return build_schedule(
            optimizer,
            name="cosine",
            warmup="2ba",
            final_fraction=0.0,
            max_duration=f"{epochs}ep",
            updates_per_epoch=4,
            lists_per_update=8,
        )

    short, long = new_optimizer(), new_optimizer()
    first = schedule_of(short, 1)
    assert rates(first, short, 4)[-1] == pytest.approx(5e-6 / 2)
    second = schedule_of(long, 2)
    second.load_state_dict(first.state_dict())
    long.load_state_dict(short.state_dict())
    assert long.param_groups[0]["lr"] == 0.0  # where the short run ended
    apply_schedule(second, {"lr": 5e-6})
    assert long.param_groups[0]["lr"] == pytest.approx(5e-6 * 0.75)  # two of six updates down the cosine
    apply_schedule(second, {"lr": 1e-6, "betas": (0.8, 0.9), "weight_decay": 0.1})  # as a changed recipe says
    assert long.param_groups[0]["lr"] == pytest.approx(1e-6 * 0.75)
    assert (long.param_groups[0]["betas"], long.param_groups[0]["weight_decay"]) == ((0.8, 0.9), 0.1)
    second.step()
    assert long.param_groups[0]["lr"] == pytest.approx(1e-6 * 0.5)


def test_ends_at_its_final_fraction_and_stays_there():
    for name in ("cosine", "linear"):
        ends = [
            learning_rate_factor(update, name=name, num_updates=10, num_warmup=2, final_fraction=0.1)
            for update in (0, 1, 2, 6, 10, 99)
        ]
        assert ends == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1, 0.1])
    assert learning_rate_factor(0, name="cosine", num_updates=5, num_warmup=0) == 1.0


@pytest.mark.parametrize(
    "time, expected", [("50ba", 50), ("3ep", 120), ("130sp", 2), ("0.1dur", 12), ("0ba", 0), ("1sp", 1)]
)
def test_times_in_updates(time, expected):
    assert updates_in(time, updates_per_epoch=40, lists_per_update=128, num_updates=120) == expected


def test_other_units_and_names_are_refused():
    with pytest.raises(ValueError, match="time is '9tok'; expected epochs"):
        updates_in("9tok", updates_per_epoch=40, lists_per_update=128)
    with pytest.raises(ValueError, match=r"schedule\.name is 'step'"):
        build_schedule(
            new_optimizer(),
            name="step",
            warmup="1ba",
            final_fraction=0.0,
            max_duration="1ep",
            updates_per_epoch=1,
            lists_per_update=1,
        )
