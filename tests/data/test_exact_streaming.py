"""Every sample once per epoch, with equal rows per rank, also after restarts; or an error that names the shard."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from support.launching import launch, succeeded
from support.list_shards import damage, write_shards
from support.s3_server import s3_server
from support.small_disk import fill, small_disk
from support.streaming_loader import flat, ids, new_loader, read

from rankllm_composer.data.streams import Stream, check_stream
from rankllm_composer.errors import ShardError

WORKER = Path(__file__).parents[1] / "workers" / "read_epochs.py"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Sets by number of lists, with 4 lists per shard; the two ranks read them too."""
    folder = tmp_path_factory.mktemp("sets")
    for num in (3, 10, 11, 13):
        write_shards(folder / f"lists_{num}", range(num))
    write_shards(folder / "lists_vanishing", range(12))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_each_epoch_has_every_sample_once_in_a_different_order(sets, workers):
    loader = new_loader(Stream(local=str(sets / "lists_13")), workers=workers)
    epochs = read(loader, 3)
    assert len(loader) == 4
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [4, 4, 4, 1]
        assert sorted(flat(epoch)) == sorted(ids(*range(13)))
    assert len({tuple(flat(epoch)) for epoch in epochs}) == 3
    assert read(new_loader(Stream(local=str(sets / "lists_13")), workers=2 - workers), 3) == epochs
    assert read(new_loader(Stream(local=str(sets / "lists_13")), seed=8), 1) != epochs[:1]


def test_without_shuffle_samples_are_in_shard_order(sets):
    loader = new_loader(Stream(local=str(sets / "lists_10")), shuffle=False, num_canonical_nodes=1)
    assert read(loader, 2) == [[ids(0, 1, 2, 3), ids(4, 5, 6, 7), ids(8, 9)]] * 2


def test_more_canonical_nodes_than_samples(sets):
    (epoch,) = read(new_loader(Stream(local=str(sets / "lists_3")), num_canonical_nodes=64))
    assert sorted(flat(epoch)) == ids(0, 1, 2)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("name", "batch_size", "canonical_nodes"), [("lists_10", 4, None), ("lists_11", 2, 4)])
def test_an_epoch_resumes_where_it_stopped(sets, name, batch_size, canonical_nodes, workers):
    options = {"batch_size": batch_size, "num_canonical_nodes": canonical_nodes, "workers": workers}
    stream = Stream(local=str(sets / name))
    epochs = read(new_loader(stream, **options), 3)
    stops = range(1, len(epochs[0]) + 1) if not workers else (1, len(epochs[0]) - 1)
    for epoch, stop in itertools.product([0, 1], stops):
        interrupted = new_loader(stream, **options)
        assert read(interrupted, epoch) == epochs[:epoch]
        batches = itertools.islice(iter(interrupted), stop)
        assert [batch["ids"] for batch in batches] == epochs[epoch][:stop]
        states = [interrupted.dataset.state_dict(stop * batch_size, True), interrupted.state_dict()]
        for state in states if stop < len(epochs[0]) else states[:1]:
            resumed = new_loader(stream, **options)
            resumed.load_state_dict(state)
            assert read(resumed, 3 - epoch) == [epochs[epoch][stop:], *epochs[epoch + 1 :]]


def test_a_resume_between_epochs_starts_the_next_one(sets):
    stream = Stream(local=str(sets / "lists_10"))
    uninterrupted = new_loader(stream)
    epochs = read(uninterrupted, 3)
    loader = new_loader(stream)
    states = [
        loader.dataset.state_dict(0, True)
    ]  # as Composer calls it: (samples seen in the epoch, from its beginning)
    for _ in range(2):
        read(loader)
        states.append(loader.dataset.state_dict(0, True))
    assert [state["epoch"] for state in states] == [0, 1, 2]
    for number, state in enumerate(states):
        resumed = new_loader(stream)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert resumed.dataset.state_dict(0, True) == state
        assert read(resumed, 3 - number) == epochs[number:]


def test_a_checkpoint_of_other_shards_is_an_error(sets, tmp_path):
    state = new_loader(Stream(local=str(sets / "lists_10"))).dataset.state_dict(4, True)
    with pytest.raises(
        ShardError, match=r"lists_11: the checkpoint was trained on other shards \(it has 10 samples per epoch"
    ):
        new_loader(Stream(local=str(sets / "lists_11"))).load_state_dict(state)
    rebuilt = write_shards(tmp_path / "rebuilt", range(1, 11))
    with pytest.raises(ShardError, match="Restore the original shards or start a new run"):
        new_loader(Stream(local=str(rebuilt))).load_state_dict(state)


def test_streams_mixed_by_proportion(sets, tmp_path):
    other = write_shards(tmp_path / "other", range(100, 110))
    streams = [Stream(local=str(sets / "lists_10"), proportion=0.25), Stream(local=str(other), proportion=0.75)]
    loader = new_loader(streams)
    epochs = [flat(epoch) for epoch in read(loader, 2)]
    for epoch in epochs:
        assert len(epoch) == 20
        few = [i for i in epoch if i in ids(*range(10))]
        many = [i for i in epoch if i not in few]
        assert (len(few), len(set(few))) == (5, 5)  # a quarter of the epoch, without repetition
        assert len(many) == 15 and set(many) == set(ids(*range(100, 110)))
    all_of_both = [Stream(local=str(sets / "lists_10")), Stream(local=str(other))]
    (epoch,) = read(new_loader(all_of_both))
    assert sorted(flat(epoch)) == sorted(ids(*range(10), *range(100, 110)))


@pytest.fixture()
def remote(sets, tmp_path):
    """A copy of 10 lists in 3 shards, and a stream that caches it."""
    folder = shutil.copytree(sets / "lists_10", tmp_path / "remote")
    return Stream(local=str(tmp_path / "cache"), remote=str(folder))


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.mds*"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["missing", "damaged"])
def test_a_shard_lost_during_the_epoch_stops_the_run(remote, fault, workers):
    loader = new_loader(remote, workers=workers, batch_size=2, predownload=2)
    shard = Path(remote.remote) / "01" / "shard.00000.mds.zstd"
    shard.unlink() if fault == "missing" else damage(shard)
    reason = "FileNotFoundError" if fault == "missing" else "its content does not match its hash"
    with pytest.raises(ShardError, match=rf"rank 0: shard 01/shard\.00000\.mds\.zstd of .*remote cannot be .*{reason}"):
        read(loader)
    assert not [name for name in files(remote.local) if name.startswith("01/")]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("compression", ["zstd", None])
def test_a_shard_damaged_in_place_stops_the_run_and_is_kept(tmp_path, compression, workers):
    folder = write_shards(tmp_path / "set", range(10), compression=compression)
    loader = new_loader(Stream(local=str(folder)), workers=workers, batch_size=2)
    (shard,) = (folder / "01").glob("shard*")
    damage(shard)
    with pytest.raises(ShardError, match=rf"shard 01/{shard.name} of .*set cannot be used: .*(hash|Checksum)"):
        read(loader)
    assert shard.exists()


def test_shards_unpacked_in_place_can_be_unpacked_again(tmp_path):
    stream = Stream(local=str(write_shards(tmp_path / "set", range(10))))
    epochs = read(new_loader(stream), 1)
    damage(tmp_path / "set" / "01" / "shard.00000.mds")
    assert read(new_loader(stream), 1) == epochs


def test_machines_that_share_a_folder_can_unpack_a_shard_at_the_same_time(tmp_path, monkeypatch):
    """Another machine unpacks the shard after this one has written its copy but before it renames it."""
    folder = write_shards(tmp_path / "shared", range(4))
    rename, others = os.replace, []

    def rename_late(source, target):
        if not others:
            others.append(None)
            others[0] = read(new_loader(Stream(local=str(folder)), shuffle=False))
        rename(source, target)

    monkeypatch.setattr(os, "replace", rename_late)
    assert read(new_loader(Stream(local=str(folder)), shuffle=False)) == [[ids(0, 1, 2, 3)]] == others[0]
    kept = [path.name for path in sorted(folder.rglob("*")) if path.is_file()]
    assert kept == ["shard.00000.mds", "shard.00000.mds.zstd", "index.json"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_cache_is_repaired_from_the_remote(remote, workers):
    epochs = read(new_loader(remote), 1)
    damage(Path(remote.local) / "01" / "shard.00000.mds")
    assert read(new_loader(remote, workers=workers), 1) == epochs


def test_hashes_can_be_left_unchecked(remote):
    read(new_loader(remote))
    shard = Path(remote.local) / "01" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes().replace(b"number 5", b"number 9"))
    assert "number 9" in new_loader(remote, validate_hash=False).dataset.get_item(5)["user"]
    assert "number 5" in new_loader(remote).dataset.get_item(5)["user"]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_stays_below_its_limit(remote, workers):
    loader = new_loader(remote)
    limit = 4 * max(shard.get_max_size() for shard in loader.dataset.shards)
    del loader
    loader = new_loader(remote, workers=workers, batch_size=2, cache_limit=f"{limit / 1024}kb", predownload=2)
    for epoch in read(loader, 3):
        assert sorted(flat(epoch)) == sorted(ids(*range(10)))
    assert sum((Path(remote.local) / name).stat().st_size for name in files(remote.local)) <= limit


def test_impossible_cache_limits_are_errors(remote):
    with pytest.raises(ShardError, match=r"data\.train\.cache_limit is '1kb'; expected at least \d+ bytes"):
        new_loader(remote, cache_limit="1kb")
    with pytest.raises(ShardError, match="no remote: shards above the limit would be deleted for good"):
        new_loader(Stream(local=remote.remote), cache_limit="1gb")


@pytest.fixture(scope="module")
def store(sets):
    """13 lists in 4 shards on an S3 server, at s3://lists."""
    with s3_server() as server:
        client = server.client()
        client.create_bucket(Bucket="lists")
        for path in sorted(p for p in (sets / "lists_13").rglob("*") if p.suffix in (".json", ".zstd")):
            client.upload_file(str(path), "lists", str(path.relative_to(sets / "lists_13")))
        yield server


@pytest.fixture()
def in_store(store, tmp_path):
    yield Stream(local=str(tmp_path / "cache"), remote="s3://lists")
    store.on_get = lambda key: None


@pytest.mark.parametrize("workers", [0, 2])
def test_object_store(sets, in_store, workers):
    loader = new_loader(in_store, workers=workers)
    loader.dataset.get_item(0)  # opens a connection in this process, which workers must not use
    assert read(loader, 2) == read(new_loader(Stream(local=str(sets / "lists_13"))), 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_temporary_store_failures_lose_no_list(store, in_store, workers):
    loader = new_loader(in_store, workers=workers, store_patience_seconds=60)
    refusals = iter([500, 503] * 2)
    store.on_get = lambda key: next(refusals, None) if key.startswith("02/") else None
    (epoch,) = read(loader)
    assert sorted(flat(epoch)) == sorted(ids(*range(13)))
    assert next(refusals, None) is None  # all refusals were used


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda: 503, "ClientError: .*503"),
        (lambda: 403, "ClientError: .*(403|permission)"),
        (lambda: time.sleep(4), "Timeout"),
    ],
    ids=["503", "403", "stalled"],
)
def test_a_permanent_store_failure_stops_the_run(store, in_store, answer, reason, workers):
    loader = new_loader(in_store, workers=workers, download_timeout_seconds=1)
    store.on_get = lambda key: answer() if key.startswith("02/") else None
    with pytest.raises(ShardError, match=rf"shard 02/shard\.00000\.mds\.zstd of s3://lists cannot be used: .*{reason}"):
        read(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_stops_the_run(remote, tmp_path, workers):
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        stream = replace(remote, local=str(disk / "cache"))
        loader = new_loader(stream, workers=workers)
        filler = fill(disk)
        with pytest.raises(ShardError, match=r"shard 0\d/shard.* cannot be used: OSError: .*No space left on device"):
            read(loader)
        filler.unlink()
        assert sorted(flat(read(new_loader(stream))[0])) == sorted(ids(*range(10)))


@pytest.fixture(scope="module")
def two_ranks(sets, tmp_path_factory):
    """What two ranks read, and their folder for temporary files."""
    temporary = tmp_path_factory.mktemp("temporary")
    succeeded(launch(WORKER, sets, folder=temporary, timeout=1200, TMPDIR=str(temporary)))
    ranks = [json.loads((sets / f"rank_{rank}.json").read_text()) for rank in range(2)]
    return list(zip(*ranks)), temporary


@pytest.mark.slow
def test_two_ranks_share_every_epoch(two_ranks):
    cases, _ = two_ranks
    for ranks in cases[:-1]:
        num = int(ranks[0]["states"]["interrupted"]["epoch_size"])
        for epoch in range(2):
            counts = [[len(batch) for batch in rank["uninterrupted"][epoch]] for rank in ranks]
            assert counts[0] == counts[1]
            rows = [row for rank in ranks for row in flat(rank["uninterrupted"][epoch])]
            assert sorted(filter(None, rows)) == sorted(ids(*range(num)))
            assert len(rows) - num == num % 2  # one padding row if the number of lists is odd


@pytest.mark.slow
def test_two_ranks_resume_where_they_stopped(two_ranks):
    cases, _ = two_ranks
    for ranks in cases[:-1]:
        for rank in ranks:
            assert rank["before"] + rank["resumed"][0] == rank["uninterrupted"][0]
            assert rank["resumed"][1] == rank["uninterrupted"][1]


@pytest.mark.slow
def test_another_number_of_ranks_resumes_the_same_batches(two_ranks, sets):
    from workers.read_epochs import CASES

    cases, _ = two_ranks
    for (name, batch_size, _, shuffle, canonical_nodes, num_before), ranks in zip(CASES, cases):
        if not num_before:
            continue
        loader = new_loader(
            Stream(local=str(sets / name)),
            batch_size=2 * batch_size,
            shuffle=shuffle,
            num_canonical_nodes=canonical_nodes,
        )
        loader.load_state_dict(ranks[0]["states"]["interrupted"])
        two_rank_batches = [
            sorted(filter(None, flat(batches))) for batches in zip(*(rank["uninterrupted"][0] for rank in ranks))
        ]
        assert [sorted(batch) for batch in read(loader)[0]] == two_rank_batches[num_before:]


@pytest.mark.slow
def test_two_ranks_stop_at_a_lost_shard_and_leave_no_files(two_ranks):
    cases, temporary = two_ranks
    for rank, answer in enumerate(cases[-1]):
        assert f"rank {rank}: shard 01/shard.00000.mds.zstd of" in answer["error"]
    assert not list(temporary.rglob("names-*")) and not list(temporary.rglob("cache-*"))


@pytest.fixture(scope="module")
def two_ranks_in_a_store(tmp_path_factory):
    """What two ranks read of two sets in an object store, the sets on disk, the caches, and requests per shard."""
    from workers.read_store import SETS

    folder = tmp_path_factory.mktemp("store")
    roots = {
        name: write_shards(folder / name, range(100 * (name == "many"), 100 * (name == "many") + num))
        for name, num in SETS.items()
    }
    fetched: Counter[str] = Counter()
    with s3_server() as server:
        client = server.client()
        client.create_bucket(Bucket="exact")
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".zstd")):
            client.upload_file(str(path), "exact", str(path.relative_to(folder)))
        server.on_get = lambda key: fetched.update([key])
        contents = [check_stream(Stream(local=str(root))) for root in roots.values()]
        (folder / "limit").write_text(str(4 * max(found.largest_shard_bytes for found in contents)))
        worker = WORKER.with_name("read_store.py")
        succeeded(launch(worker, folder, folder=folder, timeout=1200))
    ranks = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]
    return list(zip(*ranks)), {name: (str(root), None) for name, root in roots.items()}, folder, fetched


@pytest.mark.slow
def test_two_ranks_mix_sets_of_a_store_through_small_caches(two_ranks_in_a_store):
    from workers.read_store import CASES, NUM_EPOCHS, new_loader_of_sets

    cases, roots, folder, fetched = two_ranks_in_a_store
    few, many = ids(*range(12)), ids(*range(100, 124))
    epochs_by_shares = {}
    for (proportions, _), ranks in zip(CASES, cases):
        for epoch in range(NUM_EPOCHS):
            assert [[len(batch) for batch in rank[epoch]] for rank in ranks] == [[2] * 9] * 2  # 36 lists, 4 per step
            rows = [row for rank in ranks for row in flat(rank[epoch])]
            if proportions == (0.25, 0.75):
                samples_of_set = [row for row in rows if row in few]
                assert (
                    len(rows) == 36 and len(samples_of_set) == len(set(samples_of_set)) == 9
                )  # a quarter of the epoch, without repetition
                others = Counter(row for row in rows if row not in few)
                assert set(others) == set(many) and sorted(others.values()) == [1] * 21 + [2] * 3
            else:
                assert sorted(rows) == sorted(few + many)  # also with proportions: each set has exactly its share
        # The steps are the same for any number of workers, and as if one rank read the sets from disk.
        steps = [[sorted(flat(step)) for step in zip(*(rank[epoch] for rank in ranks))] for epoch in range(NUM_EPOCHS)]
        assert epochs_by_shares.setdefault(proportions, steps) == steps
        assert steps[0] != steps[1]
    for proportions, steps in epochs_by_shares.items():
        alone = read(new_loader_of_sets(roots, proportions, batch_size=4), NUM_EPOCHS)
        assert [[sorted(batch) for batch in epoch] for epoch in alone] == steps
    shards = [key for key in fetched if key.endswith(".zstd")]
    requests_per_fetch = 3  # one for the size, two by the client: before and during the download
    assert (
        len(shards) == 9 and sum(fetched[key] for key in shards) > 9 * len(CASES) * requests_per_fetch
    )  # some were evicted from the caches
    limit = int((folder / "limit").read_text())
    for number, (_, workers) in enumerate(CASES):
        held = sum(path.stat().st_size for path in (folder / f"cache {number}").rglob("shard*"))
        num_concurrent = 2 * max(workers, 1)  # processes that can fetch at the same time
        assert 0 < held <= limit + (num_concurrent - 1) * limit // 4


def test_an_epoch_resumes_with_another_number_of_workers(sets):
    stream = Stream(local=str(sets / "lists_13"))
    (epoch,) = read(new_loader(stream, batch_size=2))
    for before, after in ((2, 0), (0, 3), (2, 1)):
        loader = new_loader(stream, batch_size=2, workers=before)
        assert [batch["ids"] for batch in itertools.islice(iter(loader), 3)] == epoch[:3]
        resumed = new_loader(stream, batch_size=2, workers=after)
        resumed.load_state_dict(loader.dataset.state_dict(6, True))
        assert read(resumed) == [epoch[3:]]
