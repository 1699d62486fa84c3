"""Which list is trained when: an epoch's order, its division over ranks and workers, the proof that it was complete.

Streaming evens out what does not divide by repeating samples, and can then hand out more of them than the length it
tells, of which Composer cuts the last. Here the order holds every sample of the epoch once; a rank that has one list
less than the others in the last batch gets a row that is counted but not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from composer.core import Callback
from composer.utils import dist
from numpy.typing import NDArray

if TYPE_CHECKING:
    from composer.core import State
    from composer.loggers import Logger


class EpochError(ValueError):
    """An epoch ended before every list of it was trained."""


def interleave(num_samples: int, num_canonical_nodes: int) -> NDArray[np.int64]:
    """Places of an epoch in the order they are trained: one from each canonical node's span in turn.

    Args:
        num_samples: E, samples in the epoch; canonical node k has the span E*k//C up to E*(k+1)//C.
        num_canonical_nodes: C. The order depends on it, and not on how many ranks there are.
    Returns:
        (E,) int64, each of 0 … E-1 once.
    """
    bounds = np.arange(num_canonical_nodes + 1) * num_samples // num_canonical_nodes
    starts, sizes = bounds[:-1], np.diff(bounds)
    steps = np.arange(sizes.max(initial=0))[:, None]  # (longest span, C)
    places: NDArray[np.int64] = (starts + steps)[steps < sizes].astype(np.int64)
    return places


def rank_rows(
    order: NDArray[np.int64], seen: int, *, node: int, num_nodes: int, rank_of_node: int, ranks_per_node: int
) -> tuple[NDArray[np.int64], int]:
    """The samples of one rank in what is left of an epoch.

    Args:
        order: (E,) the epoch's samples in the order they are trained, over all ranks.
        seen: how many of them were trained before; the rows that even out the last batch may count on top.
    Returns:
        The rank's samples, and how many rows (0 or 1) it needs after them to have as many as any other rank.
    """
    left = order[seen:]
    num_ranks = num_nodes * ranks_per_node
    own = left[node + num_nodes * rank_of_node :: num_ranks]
    return own, -(-len(left) // num_ranks) - len(own)


def worker_rows(
    samples: NDArray[np.int64], num_padding: int, batch_size: int, worker: int, num_workers: int
) -> tuple[NDArray[np.int64], int]:
    """The part of a rank's samples that one of its loader workers reads: every `num_workers`-th batch.

    Returns:
        The worker's samples, and how many of the rank's padding rows follow them.
    """
    batch_of = np.arange(len(samples) + num_padding) // batch_size
    mine = batch_of % num_workers == worker
    return samples[mine[: len(samples)]], int(mine[len(samples) :].sum())


class EpochGuard(Callback):
    """Counts what every epoch trains, logs it, and stops the run where an epoch was not complete.

    Logs at the end of each batch, for the epoch so far and over all ranks: `data/lists_trained`, `data/lists_too_long`.
    An epoch that the Trainer was told to cut short (`train_subset_num_batches`) is counted but not judged.

    Raises:
        EpochError: at the end of an epoch, on every rank: lists are missing, or not one of them could be trained.
    """

    def __init__(self) -> None:
        self._counts = {"trained": 0, "too_long": 0, "padding": 0}

    def fit_start(self, state: State, logger: Logger) -> None:
        sample_in_epoch = state.timestamp.sample_in_epoch.value
        if sum(self._counts.values()) != sample_in_epoch:  # resumed from a checkpoint without these counts
            self._counts = {"trained": min(sample_in_epoch, _epoch_size(state)), "too_long": 0, "padding": 0}

    def batch_end(self, state: State, logger: Logger) -> None:
        sequences = state.batch["sequences"]
        trained = sum(s.encoded is not None for s in sequences)
        padding = sum(not s.record_id for s in sequences)
        counts = torch.tensor([trained, len(sequences) - trained - padding, padding])
        counts = state.device.tensor_to_device(counts)
        dist.all_reduce(counts, reduce_operation="SUM")
        for name, count in zip(self._counts, counts.tolist()):
            self._counts[name] += count
        logger.log_metrics(
            {"data/lists_trained": self._counts["trained"], "data/lists_too_long": self._counts["too_long"]}
        )

    def epoch_end(self, state: State, logger: Logger) -> None:
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        if state.dataloader_len is None or int(state.dataloader_len) < len(state.train_dataloader):  # type: ignore[arg-type]
            return
        found, expected = counts["trained"] + counts["too_long"], _epoch_size(state)
        epoch = state.timestamp.epoch.value - 1
        if found != expected:
            raise EpochError(
                f"epoch {epoch}: {found} lists were read ({counts['too_long']} of them too long), its data hold "
                f"{expected}; the input ended early, so check the shards (rankllm-composer shards verify) and start "
                "again from the last checkpoint"
            )
        if not counts["trained"]:
            raise EpochError(
                f"epoch {epoch}: all {found} lists are longer than data.max_length_tokens, so nothing was trained; "
                "raise it, or build shards with fewer words a passage"
            )

    def state_dict(self) -> dict[str, Any]:
        return dict(self._counts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._counts = {name: int(state[name]) for name in self._counts}


def _epoch_size(state: State) -> int:
    return int(state.train_dataloader.dataset.epoch_size)  # type: ignore[union-attr]
