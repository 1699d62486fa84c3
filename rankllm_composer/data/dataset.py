"""Shards → tokenised lists → batches for Composer: each list of an epoch once, in an order that survives a restart."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import streaming
import torch
from composer.core import DataSpec
from composer.utils import dist

from rankllm_composer.data import packing
from rankllm_composer.data.exact_streaming import ExactStreamingDataset
from rankllm_composer.data.packing import TokenizedList
from rankllm_composer.data.streams import Stream
from rankllm_composer.errors import PromptError, ShardError
from rankllm_composer.options import BatchOptions, ObjectiveName, StreamOptions
from rankllm_composer.prompts.encoding import encode_record
from rankllm_composer.prompts.permutations import IdentifierStyle
from rankllm_composer.prompts.record import Record, augment_record, record_key
from rankllm_composer.shards.index import record_from_sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Counted as a row so that every rank has as many, never trained.
PADDING = TokenizedList(encoded=None, record_id="", record_key=0)


class LoaderError(RuntimeError):
    """The input pipeline of a rank stalled or lost a worker."""


@dataclass(frozen=True, kw_only=True)
class ListEncoding:
    """How a list becomes tokens.

    Args:
        tokenizer: fast HF tokenizer with a chat template.
        objective: "generation", "ranking" or "combined".
        max_length_tokens: most tokens in prompt and response together. A longer list is never truncated.
        too_long: for longer lists, "drop" = count the list but do not train on it; "refuse" = stop.
        shuffle_passages: permute the passages of each list, differently in every epoch.
        identifiers: identifiers in the prompt; None = those of the shards.
    """

    tokenizer: PreTrainedTokenizerBase
    objective: ObjectiveName
    max_length_tokens: int
    too_long: Literal["drop", "refuse"] = "drop"
    shuffle_passages: bool = False
    identifiers: IdentifierStyle | None = None


class ListDataset(ExactStreamingDataset):
    """Teacher-ranked lists from MDS shards, tokenized as they are read; each row is a `TokenizedList`.

    Args:
        streams: where the shards are; all of them have a proportion, or none has.
        encoding: how a list becomes tokens.
        options: order, cache and downloads.
        batch_size: rows per rank and optimizer step (see `lists_per_rank`).
        seed: of the order and of `shuffle_passages`.
    Raises:
        ShardError: see `ExactStreamingDataset`.
    """

    padding_row = PADDING

    def __init__(
        self,
        streams: Sequence[Stream],
        encoding: ListEncoding,
        options: StreamOptions | None = None,
        *,
        batch_size: int,
        seed: int = 42,
    ) -> None:
        super().__init__(streams, options, batch_size=batch_size, seed=seed)
        self.encoding = encoding

    def record(self, at: Any) -> Record:
        """The record of a sample number, as this epoch shows it.

        Raises:
            PromptError: it cannot be laid out anew.
            ShardError: its shard cannot be read.
        """
        record = record_from_sample(super().__getitem__(at))
        encoding = self.encoding
        if not encoding.shuffle_passages and encoding.identifiers is None:
            return record
        return augment_record(
            record,
            seed=self.shuffle_seed,
            epoch=self._epoch,
            shuffle_passages=encoding.shuffle_passages,
            identifiers=encoding.identifiers,
        )

    def __getitem__(self, at: Any) -> TokenizedList:
        """Row of a sample number: the list, tokenised.

        Raises:
            ShardError: the list is too long and `too_long` is "refuse", or it cannot be laid out anew.
            PromptError: the record cannot be encoded.
            ShardError: its shard cannot be read.
        """
        record = self.record(at)
        encoded = encode_record(record, self.encoding.tokenizer, self.encoding.objective)
        length = len(encoded.input_ids)
        limit = self.encoding.max_length_tokens
        if length > limit:
            if self.encoding.too_long == "refuse":
                raise ShardError(
                    f"record {record.id!r}: {length} tokens, data.max_length_tokens allows {limit}; "
                    "raise it, leave out and count such lists (data.too_long: drop), or build shards with fewer words "
                    "a passage"
                )
            return TokenizedList(encoded=None, record_id=record.id, record_key=record_key(record.id))
        return TokenizedList(
            encoded=encoded,
            record_id=record.id,
            record_key=record_key(record.id),
            grades=None if record.grades is None else np.array(record.grades),
            docids=record.docids,
        )


class ListLoader(streaming.StreamingDataLoader):
    """The loader of a rank. Errors of its workers come as they were raised there, without the workers' traceback."""

    def __iter__(self) -> Iterator[dict[str, list[TokenizedList]]]:  # type: ignore[override]
        """Batches of this rank for the next epoch.

        Raises:
            LoaderError: no batch came within the timeout, or a worker died.
            PromptError, ShardError, PromptError, ShardError: as `ListDataset`.
        """
        try:
            yield from super().__iter__()
        except (PromptError, ShardError) as error:
            self.close()
            raise type(error)(_without_traceback(error)) from None
        except RuntimeError as error:
            self.close()
            if not str(error).startswith("DataLoader "):
                raise
            raise LoaderError(
                f"rank {dist.get_global_rank()}: {error}; a download that hangs, a machine without memory left or too "
                "few data.num_workers can be the cause; where all is well but slow, raise data.loader_timeout_seconds"
            ) from error

    def close(self) -> None:
        """End the workers now. A later `iter` starts new ones."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            _end_workers(iterator, os.getpid())

    def _get_iterator(self) -> Any:
        iterator = super()._get_iterator()
        if self.num_workers:
            # Where the collector takes a loader, its queues may go first, and then torch waits 5 seconds a worker.
            weakref.finalize(self, _end_workers, iterator, os.getpid())
        return iterator


def _end_workers(iterator: Any, process: int) -> None:
    if os.getpid() == process:  # a forked worker knows the loaders of its parent, too
        iterator._shutdown_workers()


def collate(rows: list[TokenizedList]) -> dict[str, list[TokenizedList]]:
    """A batch of one rank, as `packing.split_batch` takes it."""
    return {"sequences": rows}


def lists_per_rank(global_lists: int) -> int:
    """Rows of each rank in an optimizer step.

    Raises:
        ShardError: the global batch cannot be dealt evenly to the ranks.
    """
    num_ranks = dist.get_world_size()
    for problem in BatchOptions(global_lists=global_lists).rank_problems(num_ranks):
        raise ShardError(str(problem))
    return global_lists // num_ranks


def build_train_data_spec(
    dataset: ListDataset,
    *,
    microbatch_lists: int | None = None,
    microbatch_tokens: int | None = None,
    num_workers: int = 2,
    prefetch_factor: int = 2,
    loader_timeout_seconds: float = 600,
) -> DataSpec:
    """Loader and DataSpec over a dataset: what `composer.Trainer` takes as `train_dataloader`.

    Workers are forked (where the platform's default is that): they start within milliseconds and share the tokenizer's
    memory, touch no GPU, and open connections of their own. They live through all epochs.

    Args:
        dataset: the lists; its `batch_size` is the rows of this rank in an optimizer step.
        microbatch_lists, microbatch_tokens: exactly one; what a packed microbatch holds at most.
        num_workers: processes of this rank that read and tokenise; 0 = in the training process.
        prefetch_factor: batches each of them keeps ready.
        loader_timeout_seconds: longest wait for a batch before the run stops; 0 = wait forever. Needs workers.
    Returns:
        A DataSpec with batches `{"sequences": [TokenizedList, …]}` and the microbatches of `packing.split_batch`.
    Raises:
        ShardError: an epoch holds fewer lists than one global batch, or a microbatch may not hold the longest list.
    """
    global_lists = dataset.batch_size * dist.get_world_size()
    if dataset.epoch_size < global_lists:
        raise ShardError(
            f"data.train: found {dataset.epoch_size} lists an epoch, allowed is at least one global batch of "
            f"{global_lists}; lower batch.global_lists, or add lists"
        )
    batch = BatchOptions(microbatch_lists=microbatch_lists, microbatch_tokens=microbatch_tokens)
    for problem in batch.problems(dataset.encoding.max_length_tokens):
        raise ShardError(str(problem))
    # Tokenisers warn at a fork, once they have used threads of their own; the workers are the parallelism here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    of_workers: dict[str, Any] = {}
    if num_workers:
        of_workers = {
            "prefetch_factor": prefetch_factor,
            "persistent_workers": True,
            "timeout": loader_timeout_seconds,
        }
    loader = ListLoader(
        dataset,
        batch_size=dataset.batch_size,
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator(),  # so that starting an epoch draws nothing from the run's random numbers
        **of_workers,
    )

    def split(batch: Mapping[str, Any], microbatch_size: int | float) -> list[dict[str, Any]]:
        return packing.split_batch(batch, max_lists=microbatch_lists, max_tokens=microbatch_tokens)

    return DataSpec(
        loader,
        num_samples=len(dataset) * dist.get_world_size(),
        split_batch=split,
        get_num_samples_in_batch=packing.num_samples_in_batch,
        get_num_tokens_in_batch=packing.num_tokens_in_batch,
    )


def _without_traceback(error: ValueError) -> str:
    """What an error of a worker said there: torch puts the worker's whole traceback in front."""
    return str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2].strip()
