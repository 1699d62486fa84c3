"""Lists whose order is how much of a query's words a passage holds: training data from documents alone.

What a first stage knows about whole texts, BM25 (Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework:
BM25 and Beyond"), is asked of what a list shows of them. Learning from such orders is weak supervision (Dehghani et al.
2017, "Neural Ranking Models with Weak Supervision").
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

K1, B = 0.9, 0.4  # of BM25, Anserini's
DEPTH = 20  # candidates of a query that its lists are drawn from
RANK_WEIGHT = 3.0  # what the logarithm of a candidate's rank takes off its score
JUDGED_WEIGHT = 100.0  # of a grade: more than words can make up for
MOST_WORDS = 6  # of one passage that ask
MOST_MISSED = 10_000  # draws in a row that make no list


@dataclass(frozen=True)
class WordList:
    """A query, the candidates in the order they are shown, and the score of each: higher is better."""

    query: str
    docids: list[str]
    scores: list[float]

    def grades(self) -> list[int]:
        """0 for the lowest score, one more for each higher one; equal scores have equal grades."""
        levels = sorted(set(self.scores))
        return [levels.index(score) for score in self.scores]


def words_of(text: str) -> list[str]:
    """Lower-case runs of letters and digits."""
    return re.findall(r"[a-z0-9]+", text.lower())


class Index:
    """BM25 of documents by docid."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        counts = {docid: Counter(words_of(text)) for docid, text in texts.items()}
        self.mean_length = sum(found.total() for found in counts.values()) / len(counts)
        self.places: defaultdict[str, list[tuple[str, int, int]]] = defaultdict(list)
        for docid, found in counts.items():
            for word, count in found.items():
                self.places[word].append((docid, count, found.total()))
        num = len(counts)
        self.rarity = {word: math.log(1 + (num - len(at) + 0.5) / (len(at) + 0.5)) for word, at in self.places.items()}
        self.unseen = math.log(1 + (num + 0.5) / 0.5)

    def _score(self, word: str, count: int, relative_length: float) -> float:
        return self.rarity.get(word, self.unseen) * count * (K1 + 1) / (count + K1 * (1 - B + B * relative_length))

    def top(self, query: str, count: int, without: str | None = None) -> list[str]:
        """The best docids for a query, `without` one of them."""
        scores: Counter[str] = Counter()
        for word in sorted(set(words_of(query))):
            for docid, found, length in self.places.get(word, ()):
                scores[docid] += self._score(word, found, length / self.mean_length)  # type: ignore[assignment]
        del scores[without or ""]
        return [docid for docid, _ in scores.most_common(count)]

    def score_shown(self, query: str, passage: str) -> float:
        """Score of a passage as it is shown; those of a list have about one length."""
        found = Counter(words_of(passage))
        return sum(self._score(word, found[word], 1.0) for word in sorted(set(words_of(query))) if found[word])


def without_gaps(draws: Iterator[WordList | None], what: str) -> Iterator[WordList]:
    """The lists among draws, of which some make none.

    Raises:
        SystemExit: so many draws in a row made none that the collection seems to hold none.
    """
    missed = 0
    for found in draws:
        missed = 0 if found else missed + 1
        if found:
            yield found
        elif missed == MOST_MISSED:
            raise SystemExit(
                f"found no {what} in {missed:,} draws; the collection is too small, or its texts too short"
            )


def assembled_lists(index: Index, passages: Mapping[str, str], size: int, seed: int) -> Iterator[WordList | None]:
    """Draws without end, in an order by chance: words of several passages ask, of each another number of them.

    In a quarter of the lists words of one passage ask. In half of the others the passages are alike. None: a draw that
    makes no list.
    """
    source, docids = random.Random(seed), list(passages)
    while True:
        shown = source.sample(docids, size)
        counts = [source.randint(3, MOST_WORDS), *[0] * (size - 1)]
        if source.random() >= 0.25:
            counts = source.sample(range(MOST_WORDS + 1), size)
            if source.random() < 0.5:
                near = index.top(passages[shown[0]], DEPTH, without=shown[0])
                shown[1:] = source.sample(near, min(len(near), size - 1))
        asked: list[str] = []
        for docid, count in zip(shown, counts):
            words = words_of(passages[docid])
            asked += source.sample(words, min(count, len(words)))
        source.shuffle(asked)
        source.shuffle(shown)
        query = " ".join(asked)
        scores = [index.score_shown(query, passages[docid]) for docid in shown]
        is_clear = len(shown) == size and len(asked) >= 3 and scores.count(max(scores)) == 1
        yield WordList(query, shown, scores) if is_clear else None


def asked_by_texts(
    index: Index, texts: Mapping[str, tuple[str, str]], passages: Mapping[str, str], size: int, seed: int, by_rank: bool
) -> Iterator[WordList | None]:
    """Draws without end: a title, or up to 18 words of a sentence, ask among the first stage's best for it.

    None: a draw that makes no list.

    Args:
        index: of the documents.
        texts: title and text by docid.
        passages: what is shown of them.
        size: candidates of a list.
        seed: of queries and candidates.
        by_rank: candidates in the first stage's order, and its ranks count; otherwise in an order drawn by chance, and
            words alone count.
    """
    source, docids = random.Random(seed), list(passages)
    while True:
        asking = source.choice(docids)
        title, text = texts[asking]
        sentences = [words for part in re.split(r"\s\.\s|(?<=[.?!])\s", text) if len(words := part.split()) >= 6]
        words = title.split()
        if sentences and source.random() >= 0.3:
            words = source.choice(sentences)
            length = min(len(words), source.randint(6, 18))
            start = source.randint(0, len(words) - length)
            words = words[start : start + length]
        query = " ".join(words)
        ranked = index.top(query, DEPTH, without=asking)
        if len(words_of(query)) < 5 or len(ranked) < size:
            yield None
            continue
        found = _draw(index, query, ranked, passages, size, source, {}, RANK_WEIGHT if by_rank else 0.0)
        if len(set(found.scores)) < size:
            yield None
            continue
        if not by_rank:
            order = source.sample(range(size), size)
            found = WordList(query, [found.docids[i] for i in order], [found.scores[i] for i in order])
        yield found


def judged_lists(
    index: Index,
    queries: Mapping[str, str],
    run: Mapping[str, Sequence[str]],
    judgments: Mapping[str, Mapping[str, int]],
    passages: Mapping[str, str],
    size: int,
    seed: int,
) -> Iterator[WordList | None]:
    """Draws without end of judged queries, in the first stage's order: judged ones first, then by words and rank.

    None: a query with too few candidates.
    """
    source, qids = random.Random(seed), list(queries)
    while True:
        qid = source.choice(qids)
        ranked = list(run[qid])[:DEPTH]
        if len(ranked) < size:
            yield None
            continue
        yield _draw(index, queries[qid], ranked, passages, size, source, judgments.get(qid, {}), RANK_WEIGHT)


def _draw(
    index: Index,
    query: str,
    ranked: Sequence[str],
    passages: Mapping[str, str],
    size: int,
    source: random.Random,
    grades: Mapping[str, int],
    rank_weight: float,
) -> WordList:
    """Neighbours in a ranking, or any of it, in its order."""
    places: Iterable[int] = sorted(source.sample(range(len(ranked)), size))
    if source.random() < 0.5:
        start = source.randint(0, len(ranked) - size)
        places = range(start, start + size)
    scores = [
        JUDGED_WEIGHT * max(0, grades.get(ranked[place], 0))
        + index.score_shown(query, passages[ranked[place]])
        - rank_weight * math.log(place + 1)
        for place in places
    ]
    return WordList(query, [ranked[place] for place in places], scores)
