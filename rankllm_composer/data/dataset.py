"""Shards to tokenized lists to batches for Composer: each list once per epoch, in an order that survives a restart."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import streaming
import torch
from composer.core import DataSpec
from composer.utils import dist

from rankllm_composer.data import packing
from rankllm_composer.data.exact_streaming import ExactStreamingDataset
from rankllm_composer.data.packing import TokenizedList
from rankllm_composer.data.shared_memory import MAKE_SPACE
from rankllm_composer.data.streams import Stream
from rankllm_composer.errors import PromptError, RunError, ShardError, counted
from rankllm_composer.options import BatchOptions, ObjectiveName, StreamOptions
from rankllm_composer.prompts.encoding import encode_record
from rankllm_composer.prompts.permutations import IdentifierStyle
from rankllm_composer.prompts.prompt_template import PromptTemplate
from rankllm_composer.prompts.record import Record, augment_record, record_key
from rankllm_composer.prompts.relevance import Preferences, draw_ties, relevance_of
from rankllm_composer.shards.index import record_from_sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Evens out the number of rows per rank; counted but never trained.
PADDING = TokenizedList(encoded=None, record_id="", record_key=0)


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
        template: what prompts say; None = what the shards hold.
        preferences: what counts as a preference between two candidates.
        needs_scores: the ranking loss that needs a teacher's scores; None = it needs none.
        needs_identifiers: whether each identifier must be one token, as for token weights by rank.
    """

    tokenizer: PreTrainedTokenizerBase
    objective: ObjectiveName
    max_length_tokens: int
    too_long: Literal["drop", "refuse"] = "drop"
    shuffle_passages: bool = False
    identifiers: IdentifierStyle | None = None
    template: PromptTemplate | None = None
    preferences: Preferences = field(default_factory=Preferences)
    needs_scores: str | None = None
    needs_identifiers: bool = False


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
        """Return the record of a sample number, augmented for the current epoch."""
        record = record_from_sample(super().__getitem__(at))
        if self.encoding.template is not None:
            record = replace(record, template=self.encoding.template)
        shuffle_passages, identifiers = self.encoding.shuffle_passages, self.encoding.identifiers
        if not shuffle_passages and identifiers is None:
            return record
        return augment_record(
            record,
            seed=self.shuffle_seed,
            epoch=self._epoch,
            shuffle_passages=shuffle_passages,
            identifiers=identifiers,
        )

    def __getitem__(self, at: Any) -> TokenizedList:
        """Return the tokenized list of a sample number, its ties drawn for the current epoch.

        Raises:
            PromptError: the record cannot be augmented or encoded, or lacks the scores that the loss needs.
            ShardError: the list is too long and `too_long` is "refuse", or its shard cannot be read.
        """
        record = self.record(at)
        if self.encoding.preferences.ties == "tied":
            record = draw_ties(record, seed=self.shuffle_seed, epoch=self._epoch)
        key = record_key(record.id)
        encoded = encode_record(record, self.encoding.tokenizer, self.encoding.objective)
        length, limit = len(encoded.input_ids), self.encoding.max_length_tokens
        if length > limit:
            if self.encoding.too_long == "refuse":
                raise ShardError(
                    f"record {record.id!r} has {length} tokens; data.max_length_tokens is {limit}. Raise it, leave out "
                    "and count such lists (data.too_long: drop), or build shards with fewer words per passage."
                )
            return TokenizedList(encoded=None, record_id=record.id, record_key=key)
        if self.encoding.needs_scores is not None and record.scores is None:
            raise PromptError(
                f"record {record.id!r} has no teacher's scores, which objective.ranking_loss="
                f"{self.encoding.needs_scores} needs. Build the shards with a teacher_run or with records that have "
                "scores, or choose another loss."
            )
        if self.encoding.needs_identifiers and encoded.identifier_token_ids is None:
            raise PromptError(
                f"record {record.id!r} has identifiers of several tokens, which objective.token_weights=by_rank cannot "
                "weigh. Set objective.token_weights=equal, or data.train.identifiers=letters."
            )
        relevance = relevance_of(record, encoded.ranks, self.encoding.preferences)
        return TokenizedList(encoded, record.id, key, relevance, record.docids)


class ListLoader(streaming.StreamingDataLoader):
    """The data loader of a rank. Errors of its workers are raised again without the traceback of the worker."""

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Yield the batches of this rank for the next epoch; raise RunError if a worker dies or is too slow."""
        try:
            yield from super().__iter__()
        except (PromptError, ShardError) as error:
            self.close()
            name = f"{type(error).__module__}.{type(error).__qualname__}: "  # ends torch's copy of the traceback
            raise type(error)(str(error).rpartition(name)[2].strip()) from None
        except RuntimeError as error:
            self.close()
            if (known := loader_error(error)) is None:
                raise
            raise known from error

    def close(self) -> None:
        """Stop the workers. A later `iter` starts new ones."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            _end_workers(iterator, os.getpid())

    def _get_iterator(self) -> Any:
        try:
            iterator = super()._get_iterator()
        except OSError as error:
            raise RunError(
                f"rank {dist.get_global_rank()}: the workers of the loader cannot start ({error.strerror}). "
                f"{MAKE_SPACE if error.errno == errno.ENOSPC else 'Lower data.num_workers.'}"
            ) from error
        if self.num_workers:
            # If garbage collection removes the queues before the loader, torch waits 5 seconds per worker.
            weakref.finalize(self, _end_workers, iterator, os.getpid())
        return iterator


def _end_workers(iterator: Any, process: int) -> None:
    if os.getpid() == process:  # a forked worker has copies of its parent's loaders
        iterator._shutdown_workers()
        for worker in iterator._workers:
            if worker.is_alive():  # it ignores SIGTERM, and this process would wait for it at its end
                worker.kill()


def loader_error(error: BaseException) -> RunError | None:
    """Say what a loader's error means; None if it is another one.

    A signal handler of torch raises the error of a lost worker wherever the rank is at that moment.
    """
    text = " ".join(str(error).split())
    if not isinstance(error, RuntimeError) or not text.startswith("DataLoader "):
        return None
    cause = (
        f"Its shared memory is full. {MAKE_SPACE}"
        if "Bus error" in text
        else "Possible causes: a download that hangs, a machine out of memory, too few data.num_workers. If loading is "
        "only slow, raise data.loader_timeout_seconds."
    )
    return RunError(f"rank {dist.get_global_rank()}: {text.rstrip('.')}. {cause}")


def lists_per_rank(global_lists: int) -> int:
    """Return the rows per rank in an optimizer step; raise ShardError unless the ranks divide the global batch."""
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
    """Return the loader of a dataset as a DataSpec, the `train_dataloader` of `composer.Trainer`.

    Workers are forked if that is the platform's default: they start within milliseconds, share the tokenizer's memory,
    do not touch the GPU, and open their own connections. They live until training ends.

    Args:
        dataset: the lists; its `batch_size` is the number of rows per rank and optimizer step.
        microbatch_lists, microbatch_tokens: the most that a packed microbatch holds; set exactly one.
        num_workers: processes of this rank that read, tokenize and pack; 0 = read in the training process.
        prefetch_factor: batches that each worker keeps ready.
        loader_timeout_seconds: longest wait for a batch before the run stops; 0 = wait forever. Used only with workers.
    Raises:
        ShardError: an epoch has fewer lists than one global batch, or the limit of a microbatch is invalid.
    """
    global_lists = dataset.batch_size * dist.get_world_size()
    if dataset.epoch_size < global_lists:
        raise ShardError(
            f"data.train has {counted(dataset.epoch_size, 'list')} per epoch; expected at least one global batch of "
            f"{global_lists}. Lower batch.global_lists or add lists."
        )
    batch = BatchOptions(microbatch_lists=microbatch_lists, microbatch_tokens=microbatch_tokens)
    for problem in batch.problems(dataset.encoding.max_length_tokens):
        raise ShardError(str(problem))
    # Tokenizers that have used threads warn when the process forks; here the workers provide the parallelism.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = ListLoader(
        dataset,
        batch_size=dataset.batch_size,
        collate_fn=partial(packing.pack_rows, max_lists=microbatch_lists, max_tokens=microbatch_tokens),
        num_workers=num_workers,
        generator=torch.Generator(),  # so that starting an epoch does not advance the run's random state
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=num_workers > 0,
        timeout=loader_timeout_seconds if num_workers else 0,
    )
    return DataSpec(
        loader,
        num_samples=len(dataset) * dist.get_world_size(),
        split_batch=lambda batch, microbatch_size: packing.split_batch(
            batch, max_lists=microbatch_lists, max_tokens=microbatch_tokens
        ),
        get_num_samples_in_batch=packing.num_samples_in_batch,
        get_num_tokens_in_batch=packing.num_tokens_in_batch,
    )
