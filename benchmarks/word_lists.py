"""Training lists from documents alone, ordered by the words that query and passage share.

The score is BM25 (Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond") of the
passages in the list. Learning from such orders is weak supervision (Dehghani et al. 2017, "Neural Ranking Models with
Weak Supervision").
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

K1, B = 0.9, 0.4  # of BM25, as in Anserini
DEPTH = 20  # candidates per query that lists are sampled from
RANK_WEIGHT = 3.0  # subtracted from the score per unit of log(rank)
JUDGED_WEIGHT = 100.0  # added to the score per grade: more than words can outweigh
MAX_WORDS = 6  # from one passage in a query
MAX_EMPTY = 10_000  # consecutive draws without a list


@dataclass(frozen=True)
class WordList:
    """A query, its candidates in presentation order, and their scores: higher is better."""

    query: str
    docids: list[str]
    scores: list[float]

    def grades(self) -> list[int]:
        """Scores as grades: 0 for the lowest score, one more for each higher score."""
        levels = sorted(set(self.scores))
        return [levels.index(score) for score in self.scores]


def words_of(text: str) -> list[str]:
    """Lower-case words of letters and digits."""
    return re.findall(r"[a-z0-9]+", text.lower())


class Index:
    """A BM25 index of documents by docid."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        counts = {docid: Counter(words_of(text)) for docid, text in texts.items()}
        self.mean_length = sum(found.total() for found in counts.values()) / len(counts)
        self.postings: defaultdict[str, list[tuple[str, int, int]]] = defaultdict(list)
        for docid, found in counts.items():
            for word, count in found.items():
                self.postings[word].append((docid, count, found.total()))
        num = len(counts)
        self.rarity = {
            word: math.log(1 + (num - len(at) + 0.5) / (len(at) + 0.5)) for word, at in self.postings.items()
        }
        self.unseen_rarity = math.log(1 + (num + 0.5) / 0.5)

    def _score(self, word: str, count: int, relative_length: float) -> float:
        return (
            self.rarity.get(word, self.unseen_rarity) * count * (K1 + 1) / (count + K1 * (1 - B + B * relative_length))
        )

    def top(self, query: str, count: int, without: str | None = None) -> list[str]:
        """Docids with the highest scores for a query, except `without`."""
        scores: Counter[str] = Counter()
        for word in sorted(set(words_of(query))):
            for docid, found, length in self.postings.get(word, ()):
                scores[docid] += self._score(word, found, length / self.mean_length)  # type: ignore[assignment]
        del scores[without or ""]
        return [docid for docid, _ in scores.most_common(count)]

    def score_shown(self, query: str, passage: str) -> float:
        """Score of a passage; the passages of a list are assumed to have the same length."""
        found = Counter(words_of(passage))
        return sum(self._score(word, found[word], 1.0) for word in sorted(set(words_of(query))) if found[word])


def skip_empty(draws: Iterator[WordList | None], what: str) -> Iterator[WordList]:
    """Yield lists, skipping empty draws.

    Raises:
        SystemExit: too many consecutive draws were empty.
    """
    num_empty = 0
    for drawn in draws:
        num_empty = 0 if drawn else num_empty + 1
        if drawn:
            yield drawn
        elif num_empty == MAX_EMPTY:
            raise SystemExit(
                f"no {what} in {num_empty:,} draws. The collection is too small, or its texts are too short."
            )


def assembled_lists(index: Index, passages: Mapping[str, str], size: int, seed: int) -> Iterator[WordList | None]:
    """Draw lists endlessly whose query has a different number of words from each of several passages, in random order.

    In a quarter of the lists the query has words of only one passage. In half of the others the passages are similar.
    Yields None for a draw that gives no list.
    """
    rng, docids = random.Random(seed), list(passages)
    while True:
        shown = rng.sample(docids, size)
        counts = [rng.randint(3, MAX_WORDS), *[0] * (size - 1)]
        if rng.random() >= 0.25:
            counts = rng.sample(range(MAX_WORDS + 1), size)
            if rng.random() < 0.5:
                near = index.top(passages[shown[0]], DEPTH, without=shown[0])
                shown[1:] = rng.sample(near, min(len(near), size - 1))
        query_words: list[str] = []
        for docid, count in zip(shown, counts):
            words = words_of(passages[docid])
            query_words += rng.sample(words, min(count, len(words)))
        rng.shuffle(query_words)
        rng.shuffle(shown)
        query = " ".join(query_words)
        scores = [index.score_shown(query, passages[docid]) for docid in shown]
        is_clear = len(shown) == size and len(query_words) >= 3 and scores.count(max(scores)) == 1
        yield WordList(query, shown, scores) if is_clear else None


def lists_from_texts(
    index: Index, texts: Mapping[str, tuple[str, str]], passages: Mapping[str, str], size: int, seed: int, by_rank: bool
) -> Iterator[WordList | None]:
    """Draw lists endlessly whose query is a title or up to 18 words of a sentence, with candidates found by BM25.

    Yields None for a draw that gives no list.

    Args:
        index: of the documents.
        texts: title and text by docid.
        passages: passage by docid.
        size: candidates per list.
        seed: of queries and candidates.
        by_rank: order and score the candidates by BM25 rank, too; otherwise their order is random, and only the shared
            words give the score.
    """
    rng, docids = random.Random(seed), list(passages)
    while True:
        docid = rng.choice(docids)
        title, text = texts[docid]
        sentences = [words for part in re.split(r"\s\.\s|(?<=[.?!])\s", text) if len(words := part.split()) >= 6]
        words = title.split()
        if sentences and rng.random() >= 0.3:
            words = rng.choice(sentences)
            length = min(len(words), rng.randint(6, 18))
            start = rng.randint(0, len(words) - length)
            words = words[start : start + length]
        query = " ".join(words)
        ranked = index.top(query, DEPTH, without=docid)
        if len(words_of(query)) < 5 or len(ranked) < size:
            yield None
            continue
        found = _draw(index, query, ranked, passages, size, rng, {}, RANK_WEIGHT if by_rank else 0.0)
        if len(set(found.scores)) < size:
            yield None
            continue
        if not by_rank:
            order = rng.sample(range(size), size)
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
    """Draw lists of judged queries endlessly, in first-stage order, scored by grade, then by shared words and rank.

    Yields None for a query with too few candidates.
    """
    rng, qids = random.Random(seed), list(queries)
    while True:
        qid = rng.choice(qids)
        ranked = list(run[qid])[:DEPTH]
        if len(ranked) < size:
            yield None
            continue
        yield _draw(index, queries[qid], ranked, passages, size, rng, judgments.get(qid, {}), RANK_WEIGHT)


def _draw(
    index: Index,
    query: str,
    ranked: Sequence[str],
    passages: Mapping[str, str],
    size: int,
    rng: random.Random,
    grades: Mapping[str, int],
    rank_weight: float,
) -> WordList:
    """Sample consecutive or arbitrary candidates of a ranking, in its order."""
    places: Iterable[int] = sorted(rng.sample(range(len(ranked)), size))
    if rng.random() < 0.5:
        start = rng.randint(0, len(ranked) - size)
        places = range(start, start + size)
    scores = [
        JUDGED_WEIGHT * max(0, grades.get(ranked[place], 0))
        + index.score_shown(query, passages[ranked[place]])
        - rank_weight * math.log(place + 1)
        for place in places
    ]
    return WordList(query, [ranked[place] for place in places], scores)
