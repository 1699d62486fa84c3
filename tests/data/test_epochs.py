"""The sample order of an epoch, its split over ranks and workers, and the guard that counts samples."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rankllm_composer.data.exact_streaming import interleave, rank_rows, worker_rows
from rankllm_composer.data.packing import TokenizedList
from rankllm_composer.errors import RunError
from rankllm_composer.training.guards import EpochGuard


@pytest.mark.parametrize(
    ("num_samples", "num_canonical_nodes", "expected"),
    [
        (5, 1, [0, 1, 2, 3, 4]),
        (6, 2, [0, 3, 1, 4, 2, 5]),
        (7, 3, [0, 2, 4, 1, 3, 5, 6]),  # spans 0–1, 2–3, 4–6
        (3, 3, [0, 1, 2]),
        (0, 2, []),
    ],
)
def test_interleave(num_samples, num_canonical_nodes, expected):
    assert interleave(num_samples, num_canonical_nodes).tolist() == expected


def ranks_of(order, seen, num_nodes, ranks_per_node):
    """Return (samples, number of padding rows) of every rank, in the order in which samples are assigned."""
    return [
        rank_rows(
            np.array(order),
            seen,
            node=node,
            num_nodes=num_nodes,
            rank_of_node=rank_of_node,
            ranks_per_node=ranks_per_node,
        )
        for rank_of_node in range(ranks_per_node)
        for node in range(num_nodes)
    ]


def test_a_rank_without_a_sample_in_the_last_batch_is_padded():
    # 7 samples on 2 ranks: 0 2 4 6, and 1 3 5 plus a padding row
    (first, no_padding), (second, padding) = ranks_of(range(7), 0, 1, 2)
    assert (first.tolist(), no_padding) == ([0, 2, 4, 6], 0)
    assert (second.tolist(), padding) == ([1, 3, 5], 1)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize(("num_nodes", "ranks_per_node"), [(1, 1), (1, 2), (2, 1), (2, 2), (1, 8), (4, 2)])
def test_every_sample_goes_to_one_row_of_one_rank(num_nodes, ranks_per_node, num_workers):
    num_ranks = num_nodes * ranks_per_node
    for num_samples, batch_size in itertools.product([1, 2, 7, 8, 9, 16, 23, 31, 64], [1, 2, 4]):
        order = np.random.default_rng(num_samples).permutation(num_samples)
        global_batch = num_ranks * batch_size
        for seen in {0, global_batch, 2 * global_batch}:
            if seen > num_samples:
                continue
            left = order[seen:].tolist()
            ranks = ranks_of(order, seen, num_nodes, ranks_per_node)
            assert sorted(itertools.chain(*(samples for samples, _ in ranks))) == sorted(left)
            rows = {len(samples) + padding for samples, padding in ranks}
            assert rows == {-(-len(left) // num_ranks)}
            # The k-th global batch is the k-th slice of the order, for any number of ranks.
            for start in range(0, len(left), global_batch):
                step = start // num_ranks
                together = [samples[step : step + batch_size] for samples, _ in ranks]
                assert sorted(itertools.chain(*together)) == sorted(left[start : start + global_batch])
            for samples, padding in ranks:
                assert read_by_workers(samples, padding, batch_size, num_workers) == [
                    ([*samples.tolist(), *[None] * padding])[i : i + batch_size]
                    for i in range(0, len(samples) + padding, batch_size)
                ]


def read_by_workers(samples, padding, batch_size, num_workers):
    """Return batches in DataLoader order: one per worker in turn, skipping workers that have none left."""
    queues = []
    for worker in range(num_workers):
        worker_samples, num_padding = worker_rows(samples, padding, batch_size, worker, num_workers)
        rows = [*worker_samples.tolist(), *[None] * num_padding]
        queues.append([rows[i : i + batch_size] for i in range(0, len(rows), batch_size)])
    return [batch for turn in itertools.zip_longest(*queues) for batch in turn if batch is not None]


TRAINED = TokenizedList(encoded=object(), record_id="a", record_key=1)
TOO_LONG = TokenizedList(encoded=None, record_id="b", record_key=2)
PADDING = TokenizedList(encoded=None, record_id="", record_key=0)


class Log:
    def __init__(self):
        self.metrics = {}

    def log_metrics(self, metrics):
        self.metrics.update(metrics)


def run_epoch(guard, batches, *, epoch_size, num_batches=None, seen=0, steps_in_loader=None):
    """Run the events of an epoch as the Trainer does; return the logged metrics."""
    state = SimpleNamespace(
        device=SimpleNamespace(tensor_to_device=torch.clone),
        dataloader_len=num_batches or len(batches),
        timestamp=SimpleNamespace(
            sample_in_epoch=SimpleNamespace(value=seen), epoch=SimpleNamespace(value=1), batch=SimpleNamespace(value=4)
        ),
    )
    state.train_dataloader = type("Loader", (), {"__len__": lambda self: steps_in_loader or len(batches)})()
    state.train_dataloader.dataset = SimpleNamespace(epoch_size=epoch_size)
    log = Log()
    guard.fit_start(state, log)
    for batch in batches:
        state.batch = {"sequences": batch}
        guard.batch_start(state, log)
        kinds = Counter("trained" if row.encoded else "too_long" if row.record_id else "padding" for row in batch)
        state.batch = {"num_rows": kinds}
        guard.before_forward(state, log)
        guard.batch_end(state, log)
    guard.epoch_end(state, log)
    return log.metrics


def test_a_complete_epoch_is_counted_and_told(capsys):
    guard = EpochGuard()
    metrics = run_epoch(guard, [[TRAINED, TRAINED], [TOO_LONG, TRAINED], [TRAINED, PADDING]], epoch_size=5)
    assert metrics == {"data/lists_trained": 4, "data/lists_too_long": 1}
    assert guard.latest == {"trained": 4, "too_long": 1, "total": 4}  # for the model card
    told = "epoch 1: 4 lists trained, 1 left out as longer than data.max_length_tokens\n"
    assert capsys.readouterr().out == told


def test_a_short_epoch_stops_the_run():
    with pytest.raises(RunError, match=r"epoch 1: 3 lists were read \(0 of them too long\); expected 4"):
        run_epoch(EpochGuard(), [[TRAINED, TRAINED], [TRAINED, PADDING]], epoch_size=4)


def test_an_update_of_only_long_lists_stops_the_run_before_it():
    guard = EpochGuard()
    expected = r"batch 5: all its lists are longer than data\.max_length_tokens \(b\), so the update would"
    with pytest.raises(RunError, match=expected):
        run_epoch(guard, [[TRAINED], [TOO_LONG, PADDING]], epoch_size=2)
    latest = {"trained": 1, "too_long": 0, "total": 1}
    assert guard.state_dict() == {"trained": 1, "too_long": 0, "padding": 0, "total": 1, "latest": latest}


def test_an_epoch_limited_on_purpose_is_not_checked():
    run_epoch(EpochGuard(), [[TRAINED, TRAINED]], epoch_size=8, num_batches=1, steps_in_loader=4)


def test_counts_survive_a_resume():
    before, after = EpochGuard(), EpochGuard()
    with pytest.raises(RunError):
        run_epoch(before, [[TRAINED, TOO_LONG]], epoch_size=4)
    assert before.latest == {"trained": 1, "too_long": 1, "total": 1}
    before.load_state_dict({"trained": 1, "too_long": 1, "padding": 0, "total": 1})
    after.load_state_dict(before.state_dict())
    metrics = run_epoch(after, [[TRAINED, TRAINED]], epoch_size=4, seen=2)
    assert metrics == {"data/lists_trained": 3, "data/lists_too_long": 1}
    assert after.latest["total"] == 3
    # If a checkpoint has no counts, earlier samples count as trained.
    assert run_epoch(EpochGuard(), [[TRAINED, TRAINED]], epoch_size=4, seen=2)["data/lists_trained"] == 4
