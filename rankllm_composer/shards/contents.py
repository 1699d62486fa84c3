"""What the lists of one or several sets are like, all of them: their sizes, their identifiers, and their origin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rankllm_composer.errors import ShardError
from rankllm_composer.prompts.clients import (
    CLIENT_VERSIONS,
    UNNAMED_CLIENT,
    ClientVersion,
    given_word_limit,
    passage_word_limit,
)
from rankllm_composer.prompts.lists import ListKind, list_kind, trained_window
from rankllm_composer.prompts.permutations import MAX_CANDIDATES, IdentifierStyle
from rankllm_composer.prompts.record import Record
from rankllm_composer.screen import get_logger
from rankllm_composer.shards.manifest import MANIFEST_NAME, Manifest, read_set
from rankllm_composer.shards.prepared import source_names
from rankllm_composer.shards.read import SplitRecords
from rankllm_composer.storage.object_store import open_folder

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SetContents:
    """The lists of a split.

    Attributes:
        lists: number of lists by the style of their identifiers and their number of candidates.
        sources: names of the files or data sets that they were built from; of the set itself where it does not say.
        windows: (window, stride, most words of a passage in it) of the builds from a first-stage run.
        left_out: what the builds left out, by reason.
        pairs: pairs of candidates, see `count_pairs`, of the sets whose builds counted them.
    """

    lists: Mapping[ListKind, int]
    sources: tuple[str, ...] = ()
    windows: tuple[tuple[int, int, int], ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    pairs: Mapping[str, int] = field(default_factory=Counter)

    @property
    def strides(self) -> set[int]:
        """Steps by which the lists were cut from longer ones."""
        return {stride for _, stride, _ in self.windows}

    def max_passage_words(self, client: ClientVersion) -> int | None:
        """Words of a passage in these lists, as the client is given them; None if they are unknown."""
        size = trained_window(self.lists).size
        words = {words for window, _, words in self.windows if window == size}
        return given_word_limit(words.pop(), size, client) if len(words) == 1 else None

    def renamed(self, style: IdentifierStyle | None) -> SetContents:
        """The lists with other identifiers, `data.train.identifiers`; None = with their own."""
        if style is None:
            return self
        lists: Counter[ListKind] = Counter()
        for (_, size), number in self.lists.items():
            lists[style, size] += number
        longest = max(size for _, size in lists)
        if longest > MAX_CANDIDATES[style]:
            raise ShardError(
                f"data.train.identifiers is {style}, but lists have up to {longest} candidates; expected at most "
                f"{MAX_CANDIDATES[style]}. Use numbers, or build shorter lists."
            )
        return replace(self, lists=lists)


def count_lists(records: Iterable[Record]) -> Counter[ListKind]:
    """Number of records by identifiers and size."""
    return Counter(map(list_kind, records))


def read_contents(sets: Sequence[tuple[str, str | None]]) -> SetContents:
    """Contents of sets of shards by their manifests; a set without counts is read once from end to end.

    Args:
        sets: (local, remote) of each set; remote None = all of it is in `local`.
    Raises:
        ShardError: a set is missing, damaged or empty.
        StoreError: an object store cannot be reached.
    """
    lists: Counter[ListKind] = Counter()
    sources: list[str] = []
    windows: list[tuple[int, int, int]] = []
    left_out: Counter[str] = Counter()
    pairs: Counter[str] = Counter()
    for local, remote in sets:
        folder = open_folder(remote or local)
        _, manifest = read_set(folder)
        counted = None if manifest is None else _counted(manifest)
        if counted is None:
            log.warning("%s: no counts of identifiers in %s; reading all lists", folder.name, MANIFEST_NAME)
            counted = count_lists(SplitRecords([(local, remote)]))
        lists += counted
        if manifest is None:
            sources.append(folder.name)
            continue
        pairs += manifest.stats.pairs
        sources += source_names(manifest.source)
        left_out += manifest.stats.dropped + Counter({"records with errors": manifest.stats.num_quarantined})
        options = manifest.source.get("options")
        if isinstance(options, Mapping) and {"window", "stride"} <= options.keys():
            client = options.get("client_version", UNNAMED_CLIENT)
            if client not in CLIENT_VERSIONS:
                raise ShardError(
                    f"{folder.name}/{MANIFEST_NAME}: client_version is {client!r}; expected one of "
                    f"{', '.join(CLIENT_VERSIONS)}. Build the set again."
                )
            words = options.get("max_passage_words") or passage_word_limit(options["window"], client=client)
            windows.append((options["window"], options["stride"], words))
    if not lists:
        raise ShardError(f"{', '.join(remote or local for local, remote in sets)}: no lists. Build the set again.")
    return SetContents(lists, tuple(dict.fromkeys(sources)), tuple(windows), left_out, pairs)


def held_out_share(target: str | Path) -> float:
    """Share of the queries that the build of a set kept apart; both of its sets know it.

    Raises:
        ShardError: the set is missing or damaged, or its build kept no queries apart.
        StoreError: an object store cannot be reached.
    """
    folder = open_folder(target)
    _, manifest = read_set(folder)
    share = None if manifest is None else manifest.source.get("hold_out")
    if not isinstance(share, float):
        raise ShardError(
            f"{folder.name}: its build held out no queries; expected a set of `shards build --hold-out`. Name one, or "
            "pass the queries that the model was not trained on as --queries."
        )
    return share


def _counted(manifest: Manifest) -> Counter[ListKind] | None:
    """Lists by identifiers and size as the build counted them; None if it did not."""
    stats = manifest.stats
    if stats.numbered is None:
        return None
    lists: Counter[ListKind] = Counter()
    for size, number in stats.candidates.items():
        lists["numbers", size] += stats.numbered[size]
        lists["letters", size] += number - stats.numbered[size]
    return +lists
