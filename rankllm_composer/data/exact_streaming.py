"""A StreamingDataset that yields every sample once per epoch, equally many rows per rank, or raises.

Streaming 0.13 evens out epochs by repeating samples, records the wrong epoch in a checkpoint between two epochs, and,
if a shard cannot be read, ends an epoch early without an error or waits forever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import streaming
import torch
from composer.utils import dist
from numpy.typing import NDArray
from streaming.base.constant import TICK
from streaming.base.dataset import _ShardState
from streaming.base.distributed import maybe_init_dist
from streaming.base.hashing import get_hash
from streaming.base.shuffle import get_shuffle
from streaming.base.util import bytes_to_int

from rankllm_composer.data.shard_files import CheckedStream
from rankllm_composer.data.shared_memory import private_shared_memory
from rankllm_composer.data.streams import Stream, cause, check_streams
from rankllm_composer.errors import ShardError, shell_line
from rankllm_composer.options import StreamOptions
from rankllm_composer.screen import get_logger

log = get_logger(__name__)


def interleave(num_samples: int, num_canonical_nodes: int) -> NDArray[np.int64]:
    """Return the E positions of an epoch in training order: one from the span of each of C canonical nodes in turn.

    Node k has the span E*k//C up to E*(k+1)//C. The order depends on C, but not on the number of ranks.
    """
    bounds = np.arange(num_canonical_nodes + 1) * num_samples // num_canonical_nodes
    starts, sizes = bounds[:-1], np.diff(bounds)
    steps = np.arange(sizes.max(initial=0))[:, None]  # (longest span, C)
    positions: NDArray[np.int64] = (starts + steps)[steps < sizes].astype(np.int64)
    return positions


def rank_rows(
    order: NDArray[np.int64], seen: int, *, node: int, num_nodes: int, rank_of_node: int, ranks_per_node: int
) -> tuple[NDArray[np.int64], int]:
    """Return the samples of one rank in an epoch after the `seen` rows (padding included) that were trained.

    Also returns the number of padding rows (0 or 1) that makes all ranks equally long. `order` are the samples of the
    epoch in training order, over all ranks.
    """
    rest = order[seen:]
    num_ranks = num_nodes * ranks_per_node
    samples = rest[node + num_nodes * rank_of_node :: num_ranks]
    return samples, -(-len(rest) // num_ranks) - len(samples)


def worker_rows(
    samples: NDArray[np.int64], num_padding: int, batch_size: int, worker: int, num_workers: int
) -> tuple[NDArray[np.int64], int]:
    """Return the samples, and the number of padding rows, that a loader worker reads: every `num_workers`-th batch."""
    batch_of_row = np.arange(len(samples) + num_padding) // batch_size
    is_read = batch_of_row % num_workers == worker
    return samples[is_read[: len(samples)]], int(is_read[len(samples) :].sum())


class ExactStreamingDataset(streaming.StreamingDataset):
    """Samples of MDS shards: each once per epoch, or as often as the proportions of the streams require.

    The order depends on seed, epoch and `num_canonical_nodes`, not on the number of ranks or workers. Ranks without a
    sample in the last batch end with a `padding_row`, so that all ranks have equally many rows.

    Args:
        streams: where the shards are; all of them have a proportion, or none has.
        options: order, cache and downloads. A cache may exceed its limit by one shard for each process that downloads
            at the same time.
        batch_size: rows per rank and optimizer step.
        seed: of the order.
        predownload: rows ahead of the current one for which a worker fetches shards; None = 8 batches.
        validate_hash: compare each file with its hash when it is fetched and when a process first uses it.
    Raises:
        ShardError: a stream does not match its index (see `streams.check_stream`), or the cache limit is too low.
    """

    padding_row: Any = None
    batch_size: int

    def __init__(
        self,
        streams: Sequence[Stream],
        options: StreamOptions | None = None,
        *,
        batch_size: int,
        seed: int = 42,
        predownload: int | None = None,
        validate_hash: bool = True,
    ) -> None:
        options = options or StreamOptions()
        own_process_group = maybe_init_dist()
        try:
            contents = check_streams(streams, options.store_patience_seconds, options.download_timeout_seconds)
            if options.cache_limit is not None:
                _check_cache_limit(options.cache_limit, streams, max(c.largest_shard_bytes for c in contents))
            with private_shared_memory():
                super().__init__(
                    streams=[
                        CheckedStream(
                            options.store_patience_seconds,
                            remote=stream.remote if stream.is_cache else None,
                            local=stream.local,
                            proportion=stream.proportion,
                            validate_hash=found.hash_algorithm if validate_hash else None,
                        )
                        for stream, found in zip(streams, contents)
                    ],
                    download_retry=1,  # `CheckedStream` repeats downloads
                    download_timeout=options.download_timeout_seconds,
                    predownload=predownload,
                    cache_limit=options.cache_limit,
                    num_canonical_nodes=options.num_canonical_nodes,
                    batch_size=batch_size,
                    shuffle=options.shuffle,
                    shuffle_seed=seed,
                )
        finally:
            if own_process_group:
                torch.distributed.destroy_process_group()
        self._sources = tuple(streams)
        self._fingerprint = ",".join(found.fingerprint for found in contents)
        self._epoch = 0
        self._num_rows_expected = self._num_padding = 0
        self._failure: BaseException | None = None
        self._checked_shards: set[int] = set()

    def __iter__(self) -> Iterator[Any]:
        """Yield the rows of this worker for the next epoch, or for the rest of a resumed one.

        Raises:
            ShardError: a shard cannot be fetched or is damaged, or fewer rows were read than expected.
        """
        for stream in self.streams:
            stream._downloader.clean_up()  # connections inherited by a forked worker belong to its parent
        self._failure, self._num_rows_expected, self._num_padding = None, 0, 0
        num_rows = 0
        try:
            for row in super().__iter__():
                yield row
                num_rows += 1
        except Exception as error:
            self._event.set()  # stops the threads that prefetch
            if self._failure is None or not isinstance(error, RuntimeError):
                raise
        if isinstance(self._failure, ShardError):
            raise self._failure
        if num_rows != self._num_rows_expected:
            raise ShardError(
                f"rank {dist.get_global_rank()}: epoch {self._epoch} gave {num_rows} samples; expected "
                f"{self._num_rows_expected}{f' ({self._failure!r})' if self._failure else ''}. "
                "Check the shards (rankllm-composer shards verify)."
            )
        for _ in range(self._num_padding):
            yield self.padding_row

    def _get_work(self, epoch: int, sample_in_epoch: int) -> np.ndarray:
        # Streaming's partition repeats samples. This one needs no shared memory: every worker computes it.
        self._shared_barrier(self._unique_worker_world.workers_per_node)  # all workers have advanced the epoch counter
        world = self._parallel_worker_world
        samples, num_padding = rank_rows(
            self._epoch_order(epoch),
            sample_in_epoch,
            node=world.node,
            num_nodes=world.num_nodes,
            rank_of_node=world.rank_of_node,
            ranks_per_node=world.ranks_per_node,
        )
        samples, num_padding = worker_rows(
            samples, num_padding, self.batch_size, world.worker_of_rank, world.workers_per_rank
        )
        self._epoch, self._num_rows_expected, self._num_padding = epoch, len(samples), num_padding
        return samples

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """Return the (epoch_size,) sample numbers in training order, over all ranks."""
        assert self.num_canonical_nodes is not None and self.shuffle_block_size is not None  # set as the epoch starts
        shuffle_units, samples = self.resample_streams(epoch)
        nodes = min(self.num_canonical_nodes, self.epoch_size)
        if self.shuffle:
            samples = samples[
                get_shuffle(self.shuffle_algo, shuffle_units, nodes, self.shuffle_seed, epoch, self.shuffle_block_size)
            ]
        return samples[interleave(len(samples), nodes)]

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return the position in training for a checkpoint between two batches; see `StreamingDataset`."""
        state = super().state_dict(num_samples, from_beginning)
        if state["sample_in_epoch"] == 0:  # between epochs, where streaming records the one that has just ended
            state["epoch"] = max(state["epoch"], self.next_epoch)
        return {**state, "epoch_size": self.epoch_size, "fingerprint": self._fingerprint}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Resume from a checkpoint at the next `iter`; raise ShardError if it was trained on other shards."""
        saved = {name: obj.get(name) for name in ("epoch_size", "fingerprint")}
        if saved != {"epoch_size": self.epoch_size, "fingerprint": self._fingerprint}:
            places = ", ".join(source.place for source in self._sources)
            raise ShardError(
                f"{places}: the checkpoint was trained on other shards (it has {saved['epoch_size']} samples per "
                f"epoch; these shards have {self.epoch_size}, or are another build). Restore the "
                "original shards or start a new run."
            )
        super().load_state_dict(obj)

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """Return a sample; check the hash of its shard when this process first uses the shard."""
        shard_id = int(self.spanner[sample_id][0])
        if shard_id not in self._checked_shards:
            self._check_shard(shard_id)
        return super().get_item(sample_id, retry)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch and decompress a shard. If that fails, remove its partial files and raise ShardError."""
        while True:
            was_cached = any(path.exists() for path in self._files(shard_id))
            try:
                return super().prepare_shard(shard_id, blocking)
            except Exception as error:  # each backend raises different errors
                if self._source(shard_id).is_cache:
                    for path in self._files(shard_id):
                        path.unlink(missing_ok=True)
                # Streaming leaves the state at "preparing", for which every other worker would wait forever.
                self._shard_states[shard_id] = _ShardState.REMOTE
                if was_cached and self._source(shard_id).is_cache:
                    continue  # the cached copy may be damaged while the remote one is intact
                is_gone = not was_cached and not self._source(shard_id).is_cache
                reason = "it is missing" if is_gone else cause(error, self._source(shard_id))
                raise self._shard_error(shard_id, reason) from error

    def _check_shard(self, shard_id: int) -> None:
        info, _ = self.shards[shard_id].file_pairs[0]
        raw = self._files(shard_id)[0]
        algorithm = self._stream(shard_id).validate_hash
        for _ in range(8):
            try:
                data = raw.read_bytes()
            except FileNotFoundError:
                self.prepare_shard(shard_id)
                continue
            if len(data) == info.bytes and (algorithm is None or get_hash(algorithm, data) == info.hashes[algorithm]):
                self._check_count(shard_id, data)
                self._checked_shards.add(shard_id)
                return
            if self._source(shard_id).is_cache:
                self.evict_shard(shard_id)
            elif len(self._files(shard_id)) > 1:  # it was decompressed from the file beside it
                raw.unlink(missing_ok=True)
            else:
                raise self._shard_error(shard_id, "its content does not match its hash")
            log.warning("%s does not match its hash; fetching or decompressing it again", raw)
        raise self._shard_error(
            shard_id, "it is evicted from the cache as fast as it is fetched; raise data.train.cache_limit"
        )

    def _check_count(self, shard_id: int, data: bytes) -> None:
        found, expected = int.from_bytes(data[:4], "little"), self.shards[shard_id].samples
        if found != expected:
            raise self._shard_error(shard_id, f"it holds {found} lists, but {expected} by the index")

    def _stream(self, shard_id: int) -> streaming.Stream:
        return self.streams[self.stream_per_shard[shard_id]]

    def _source(self, shard_id: int) -> Stream:
        return self._sources[self.stream_per_shard[shard_id]]

    def _files(self, shard_id: int) -> list[Path]:
        folder = Path(self._stream(shard_id).local)
        return [folder / file.basename for file in self.shards[shard_id].file_pairs[0] if file is not None]

    def _shard_error(self, shard_id: int, reason: str) -> ShardError:
        place = self._source(shard_id).place
        raw, packed = self.shards[shard_id].file_pairs[0]
        verify = shell_line("rankllm-composer", "shards", "verify", place)
        return ShardError(
            f"rank {dist.get_global_rank()}: shard {(packed or raw).basename} of {place} cannot be used: {reason}. "
            f"Find the damage ({verify}), repair it, and resume from the last checkpoint."
        )

    # Streaming's background threads: an error in one must reach `__iter__`, and none may wait for a dead one.

    def on_exception(self, future: Future) -> None:
        error = future.exception()
        if error is not None:
            self._failure = error
            self._event.set()

    def _prepare_thread(self, it: Any) -> None:
        try:
            super()._prepare_thread(it)
        except BaseException:
            it.on_exit()
            raise

    def _ready_thread(self, it: Any) -> None:
        # Streaming's method waits forever for a shard that another worker failed to fetch.
        try:
            while it.ready_index < it.total and not it.should_exit() and not self._event.is_set():
                shard_id = int(self.spanner[it.sample_ids[it.ready_index]][0])
                state = self._shard_states[shard_id]
                if it.ready_index - it.yield_index > self.predownload or state == _ShardState.PREPARING:
                    sleep(TICK)
                elif state == _ShardState.REMOTE:
                    self.prepare_shard(shard_id, blocking=False)
                else:
                    it.ready_index += 1
        finally:
            it.on_exit()


def _check_cache_limit(cache_limit: str, streams: Sequence[Stream], largest_shard_bytes: int) -> None:
    without_remote = [stream.place for stream in streams if not stream.is_cache]
    if without_remote:
        raise ShardError(
            f"data.train.cache_limit is {cache_limit!r}, but {', '.join(without_remote)} has no remote: shards above "
            "the limit would be deleted for good. Remove the limit or set data.train.remote."
        )
    if bytes_to_int(cache_limit) < 4 * largest_shard_bytes:
        raise ShardError(
            f"data.train.cache_limit is {cache_limit!r}; expected at least {4 * largest_shard_bytes} bytes (4 times "
            "the largest shard, compressed and decompressed). Raise it."
        )
