"""A loss or gradient that is not finite stops every rank before the update and names the lists."""

from __future__ import annotations

import pytest
from support.guarded_updates import INF, NAN, run

from rankllm_composer.errors import RunError
from rankllm_composer.training.guards import LossGuard


def test_finite_losses_pass():
    guard = LossGuard()
    assert run([0.5, 0.5, 0.25, 0.25], guard) == [0.5, 0.25]
    assert guard.num_skipped == 0


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_loss_stops_before_the_update(bad):
    with pytest.raises(RunError, match=r"batch 2: the loss is not finite \(rank 0: q3\); the weights are"):
        run([0.5, 0.5, 0.25, bad], LossGuard())


def test_a_bad_gradient_after_finite_losses():
    with pytest.raises(
        RunError, match=r"the gradient is not finite although all losses are \(lists of the batch: q0, q1"
    ):
        run([0.5, 0.5], LossGuard(), slopes=[0.0, INF])


def test_a_limited_number_of_updates_is_skipped():
    guard = LossGuard(max_skipped_updates=2)
    assert run([0.5, 0.5, NAN, 1, 0.25, 0.25, 1, INF], guard) == [0.5, 0.5, 0.25, 0.25]
    assert guard.num_skipped == 2
    resumed = LossGuard(max_skipped_updates=2)
    resumed.load_state_dict(guard.state_dict())
    with pytest.raises(RunError, match=r"batch 1: .*, after 2 skipped updates; .*max_skipped_updates"):
        run([NAN, NAN], resumed)
