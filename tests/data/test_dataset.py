"""Rows, batches and the DataSpec: every record reaches training, as counted by Composer's Trainer."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from composer import Trainer
from composer.models import ComposerModel
from support.list_shards import new_record, write_shards

from rankllm_composer.data import dataset as data
from rankllm_composer.data.dataset import ListDataset, ListEncoding, build_train_data_spec, lists_per_rank
from rankllm_composer.data.streams import Stream
from rankllm_composer.errors import PromptError, RunError, ShardError
from rankllm_composer.prompts.encoding import encode_record
from rankllm_composer.prompts.permutations import identifier_style
from rankllm_composer.prompts.record import Record, augment_record, record_key
from rankllm_composer.prompts.relevance import Preferences, draw_ties
from rankllm_composer.prompts.user_turn import parse_user_turn
from rankllm_composer.shards.verify import verify_shards
from rankllm_composer.training.guards import EpochGuard

LONG = 6  # index of the only long record


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """10 lists of 4 candidates; one has far more words."""
    records = [new_record(i, num_words=60 if i == LONG else 5) for i in range(10)]
    return str(write_shards(tmp_path_factory.mktemp("shards") / "set", records))


@pytest.fixture()
def new_dataset(shards, mistral_v3_tokenizer):
    def new(local=None, kind=ListDataset, **options):
        batch_size = options.pop("batch_size", 4)
        options = {"objective": "combined", "max_length_tokens": 2000, **options}
        encoding = ListEncoding(tokenizer=mistral_v3_tokenizer, **options)
        return kind([Stream(local=str(local or shards))], encoding, batch_size=batch_size, seed=3)

    return new


def new_loader(dataset, **options):
    return build_train_data_spec(dataset, **{"microbatch_lists": 2, "num_workers": 0, **options}).dataloader


def read(loader):
    return [batch["sequences"] for batch in loader]


def read_rows(loader):
    return [row for batch in read(loader) for row in batch]


@pytest.mark.parametrize("objective", ["generation", "ranking", "combined"])
def test_a_row_is_the_encoded_record(new_dataset, mistral_v3_tokenizer, objective):
    row, record = new_dataset(objective=objective)[2], new_record(2)
    expected = encode_record(record, mistral_v3_tokenizer, objective)
    assert (row.record_id, row.record_key, row.docids) == ("q2", record_key("q2"), record.docids)
    np.testing.assert_array_equal(row.encoded.input_ids, expected.input_ids)
    np.testing.assert_array_equal(row.encoded.ranks, expected.ranks)
    # Grades beside a teacher's answer are for measures; the answer alone is learned.
    np.testing.assert_array_equal(row.relevance.ranks, expected.ranks)
    assert np.isnan(row.relevance.grades).all() and np.isnan(row.relevance.teacher_scores).all()
    assert (row.encoded.response_start, row.encoded.score_position) == (
        expected.response_start,
        expected.score_position,
    )


def test_absent_grades_stay_absent(new_dataset, tmp_path):
    bare = dataclasses.replace(new_record(0), grades=None, docids=None)
    row = new_dataset(write_shards(tmp_path / "bare", [bare] * 4))[0]
    assert np.isnan(row.relevance.grades).all() and row.docids is None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_list_that_is_too_long_is_counted_but_not_trained(new_dataset, workers):
    dataset = new_dataset()
    limit = len(dataset[LONG].encoded.input_ids) - 1
    rows = read_rows(new_loader(new_dataset(max_length_tokens=limit), num_workers=workers))
    assert sorted(row.record_id for row in rows) == [f"q{i}" for i in range(10)]
    assert [row.record_id for row in rows if row.encoded is None] == [f"q{LONG}"]
    assert max(len(row.encoded.input_ids) for row in rows if row.encoded) <= limit
    assert new_dataset(max_length_tokens=limit + 1)[LONG].encoded is not None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_list_that_is_too_long_can_be_an_error(new_dataset, workers):
    length = len(new_dataset()[LONG].encoded.input_ids)
    loader = new_loader(new_dataset(max_length_tokens=300, too_long="refuse"), num_workers=workers)
    expected = rf"^record 'q6' has {length} tokens; data\.max_length_tokens is 300\. Raise it, .*data\.too_long: drop"
    with pytest.raises(ShardError, match=expected):
        read(loader)


def tied(number: int) -> Record:
    """A list of 4 in the order of grades, of which two are tied."""
    record = new_record(number, gpt="[C] > [A] > [B] > [D]")
    return dataclasses.replace(record, grades=(1, None, 2, 0), ordered_by="grades")


def test_ties_are_drawn_anew_in_every_epoch_and_alike_after_a_resume(new_dataset, tmp_path, mistral_v3_tokenizer):
    shards = write_shards(tmp_path / "tied", [tied(number) for number in range(10)])
    loader = new_loader(new_dataset(shards), num_workers=0)
    epochs = [{row.record_id: row for row in read_rows(loader)} for _ in range(3)]
    drawn = {tuple(row.encoded.ranks.tolist()) for rows in epochs for row in rows.values()}
    assert drawn == {(1, 2, 0, 3), (1, 3, 0, 2)}
    assert any(epochs[0][name].encoded.ranks.tolist() != epochs[1][name].encoded.ranks.tolist() for name in epochs[0])
    for row in epochs[2].values():
        assert (row.relevance.ranks.tolist(), row.relevance.grades.tolist()) == ([1, 2, 0, 2], [1, 0, 2, 0])
        number = int(row.record_id[1:])
        expected = encode_record(draw_ties(tied(number), seed=3, epoch=2), mistral_v3_tokenizer, "combined")
        np.testing.assert_array_equal(row.encoded.input_ids, expected.input_ids)

    resumed = new_loader(new_dataset(shards), num_workers=0)
    resumed.load_state_dict({**loader.dataset.state_dict(0, True), "epoch": 1, "sample_in_epoch": 4})
    rows = read_rows(resumed)
    assert len(rows) == 6
    for row in rows:
        np.testing.assert_array_equal(row.encoded.input_ids, epochs[1][row.record_id].encoded.input_ids)

    dataset = new_dataset(shards, preferences=Preferences(ties="ordered"))
    assert dataset[0].relevance.ranks.tolist() == dataset[0].encoded.ranks.tolist() == [1, 2, 0, 3]
    left_out = new_dataset(shards, preferences=Preferences(unjudged="left_out"))[0]
    assert left_out.relevance.ranks.tolist() == [1, -1, 0, 2]


def test_shards_without_the_columns_of_ties_have_strict_orders(new_dataset, tmp_path):
    shards = write_shards(tmp_path / "old", [tied(number) for number in range(4)], without=("scores", "ordered_by"))
    assert verify_shards(shards, records=True).problems == []
    row = new_dataset(shards)[0]
    assert row.relevance.ranks.tolist() == [1, 2, 0, 3] and np.isnan(row.relevance.grades).all()
    expected = r"record 'q0' has no teacher's scores, which objective.ranking_loss=margin_mse needs\. Build the shards"
    with pytest.raises(PromptError, match=expected):
        new_dataset(shards, needs_scores="margin_mse")[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_passages_are_shuffled_differently_every_epoch_and_alike_after_a_resume(
    new_dataset, mistral_v3_tokenizer, workers
):
    options = {"shuffle_passages": True, "identifiers": "letters"}
    loader = new_loader(new_dataset(**options), num_workers=workers)
    epochs = [{row.record_id: row for row in read_rows(loader)} for _ in range(2)]
    for epoch, rows in enumerate(epochs):
        for number in range(10):
            record = augment_record(
                new_record(number, num_words=60 if number == LONG else 5),
                seed=3,
                epoch=epoch,
                shuffle_passages=True,
                identifiers=None,
            )
            expected = encode_record(record, mistral_v3_tokenizer, "combined")
            row = rows[f"q{number}"]
            np.testing.assert_array_equal(row.encoded.input_ids, expected.input_ids)
            np.testing.assert_array_equal(row.relevance.ranks, expected.ranks)
            assert row.docids == record.docids
    assert any(epochs[0][name].docids != epochs[1][name].docids for name in epochs[0])

    resumed = new_loader(new_dataset(**options), num_workers=workers)
    resumed.load_state_dict({**loader.dataset.state_dict(0, True), "epoch": 1, "sample_in_epoch": 4})
    rows = read_rows(resumed)
    assert len(rows) == 6
    for row in rows:
        np.testing.assert_array_equal(row.encoded.input_ids, epochs[1][row.record_id].encoded.input_ids)


def test_records_follow_the_identifiers_and_shuffling_of_their_split(new_dataset):
    """Records for validation and for the decoding contract have the same identifiers and order as in training."""
    plain, augmented = new_dataset(), new_dataset(identifiers="numbers", shuffle_passages=True)
    before, after = plain.record(0), augmented.record(0)
    assert "[A] " in before.user and "[1] " in after.user and "[A] " not in after.user
    assert identifier_style(after.response) == "numbers"
    assert before.id == after.id
    first, second = (parse_user_turn(record.user) for record in (before, after))
    assert sorted(first.passages) == sorted(second.passages) and first.passages != second.passages


def test_letters_become_numbers(new_dataset, mistral_v3_tokenizer):
    row = new_dataset(identifiers="numbers", objective="generation")[0]
    text = mistral_v3_tokenizer.decode(row.encoded.input_ids[row.encoded.response_start :])
    assert text.startswith("[") and "A" not in text and text.count("[") == 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"human": "Order these."}, {"shuffle_passages": True}, PromptError, "record 'q1': its passages cannot"),
        ({"gpt": "[A] > [A]"}, {}, PromptError, "record 'q1': response"),
    ],
)
def test_an_invalid_record_stops_the_run(new_dataset, tmp_path, changes, options, error, message, workers):
    bad = write_shards(tmp_path / "bad", [new_record(0), new_record(1, **changes), new_record(2), new_record(3)])
    with pytest.raises(error, match=f"^{message}"):
        read(new_loader(new_dataset(bad, **options), num_workers=workers))


def test_the_spec_counts_rows_and_tokens(new_dataset):
    dataset = new_dataset(max_length_tokens=300)
    spec = build_train_data_spec(dataset, microbatch_lists=3, num_workers=0)
    batch = next(batch for batch in spec.dataloader if any(s.encoded is None for s in batch["sequences"]))
    tokens = sum(len(s.encoded.input_ids) for s in batch["sequences"] if s.encoded)
    num_rows = len(batch["sequences"])
    assert spec.num_samples == 10
    assert spec.get_num_samples_in_batch(batch) == num_rows
    assert spec.get_num_tokens_in_batch(batch) == tokens
    microbatches = spec.split_batch(batch, 1)
    assert sum(spec.get_num_samples_in_batch(m) for m in microbatches) == num_rows - 1
    assert [spec.get_num_tokens_in_batch(m, token_type="loss_generating") for m in microbatches] == [1] * len(
        microbatches
    )
    assert all(len(m["record_ids"]) <= 3 for m in microbatches)


@pytest.mark.parametrize(
    ("dataset_options", "options", "message"),
    [
        ({"batch_size": 11}, {}, r"data\.train has 10 lists per epoch; expected at least one global batch of 11"),
        ({}, {"microbatch_tokens": 64}, "expected exactly one of the two"),
        ({}, {"microbatch_lists": None}, "expected exactly one of the two"),
        (
            {},
            {"microbatch_lists": None, "microbatch_tokens": 1999},
            r"batch\.microbatch_tokens is 1999; expected at least data\.max_length_tokens=2000",
        ),
    ],
)
def test_impossible_batch_sizes_are_errors(new_dataset, dataset_options, options, message):
    with pytest.raises(ShardError, match=message):
        new_loader(new_dataset(**dataset_options), **options)


def test_lists_per_rank(monkeypatch):
    assert lists_per_rank(6) == 6
    monkeypatch.setattr(data.dist, "get_world_size", lambda: 4)
    assert lists_per_rank(8) == 2
    with pytest.raises(ShardError, match=r"batch\.global_lists is 6; expected a multiple of 4 \(4 ranks\)"):
        lists_per_rank(6)


class Stalling(ListDataset):
    def __getitem__(self, at):
        time.sleep(3)
        return super().__getitem__(at)


class Dying(ListDataset):
    def __getitem__(self, at):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("kind", "message"), [(Stalling, "timed out after 1 seconds"), (Dying, "exited unexpectedly")])
def test_a_worker_that_stalls_or_dies_is_an_error_that_names_the_rank(new_dataset, kind, message):
    loader = new_loader(new_dataset(kind=kind), num_workers=1, loader_timeout_seconds=1 if kind is Stalling else 60)
    with pytest.raises(RunError, match=rf"^rank 0: DataLoader .*{message}.*data\.loader_timeout_seconds"):
        read(loader)


def test_starting_an_epoch_draws_no_random_numbers(new_dataset):
    loader = new_loader(new_dataset(), num_workers=1)
    before = torch.get_rng_state()
    read(loader)
    assert torch.equal(torch.get_rng_state(), before)


class IdRecorder(ComposerModel):
    """Records the ids of every batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def forward(self, batch):
        self.seen += batch["record_ids"]
        return self.weight

    def loss(self, outputs, batch):
        return outputs * 0.0


def train(dataset, folder, *, load=None, max_duration="2ep", workers=0):
    """Train on a dataset; return the ids in training order, and the Trainer."""
    model = IdRecorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            model=model,
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
            train_dataloader=build_train_data_spec(dataset, microbatch_lists=2, num_workers=workers),
            max_duration=max_duration,
            device="cpu",
            callbacks=[EpochGuard()],
            save_folder=str(folder),
            save_filename="ba{batch}.pt",
            save_interval="1ba",
            save_overwrite=True,
            load_path=load and str(load),
            device_train_microbatch_size=2,
            accumulate_train_batch_on_tokens=True,
            progress_bar=False,
            seed=0,
        )
        trainer.fit()
    trainer.close()
    return model.seen, trainer


@pytest.mark.parametrize("workers", [0, 2])
def test_composer_trains_each_list_once_per_epoch_and_resumes_anywhere(new_dataset, tmp_path, workers):
    # 10 lists, batches of 4, 4 and 2; list 6 is too long
    options = {"max_length_tokens": 300, "batch_size": 4}
    seen, trainer = train(new_dataset(**options), tmp_path / "uninterrupted", workers=workers)
    expected = sorted(f"q{i}" for i in range(10) if i != LONG)
    first, second = seen[:9], seen[9:]
    assert sorted(first) == sorted(second) == expected and first != second
    assert trainer.state.timestamp.sample.value == 20 and trainer.state.timestamp.batch.value == 6

    trained = [len([i for i in batch if i]) for batch in batches_of(new_dataset(**options))]
    for batch in (1, 2, 3, 4) if not workers else (2, 3):  # 3 = between the epochs
        resumed, _ = train(
            new_dataset(**options),
            tmp_path / "resumed",
            load=tmp_path / "uninterrupted" / f"ba{batch}.pt",
            workers=workers,
        )
        assert resumed == seen[sum(trained[:batch]) :]


def batches_of(dataset):
    """Return the ids trained in each batch of two epochs."""
    loader = new_loader(dataset)
    return [[row.record_id if row.encoded else None for row in batch] for batch in read(loader) + read(loader)]


def test_an_epoch_that_ends_early_stops_composer(new_dataset, tmp_path):
    dataset = new_dataset()
    dataset.epoch_size += 1
    with pytest.raises(RunError, match=r"epoch 1: 10 lists were read .*; expected 11"):
        train(dataset, tmp_path)
    assert not Path(tmp_path / "ba4.pt").exists()
