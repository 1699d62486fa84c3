"""The whole way at the smallest size: a collection made on the spot, a model trained from scratch, what it learned."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rankllm_composer.errors import RunError
from rankllm_composer.prompts.permutations import MAX_CANDIDATES, IdentifierStyle, identifiers
from rankllm_composer.prompts.user_turn import SYSTEM_MESSAGE, render_user_turn

if TYPE_CHECKING:
    from rankllm_composer.ranking.comparison import MeasureComparison
    from rankllm_composer.recipe.sections import Recipe

PIECE = r"\n| ?[A-Za-z]+| ?[^\sA-Za-z]| "
"""What the word-level tokenizer takes as one token: a word or a sign, with the space before it."""


PIECE_WITH_NUMBERS = r"\n| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]| "
"""The same, and whole numbers."""


CHAT_TEMPLATE = (
    "[INST]{% for message in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}[/INST]{% endif %}"
)


@dataclass(frozen=True)
class Collection:
    """Files of a collection: queries and documents as JSONL, first-stage runs and judgments in TREC format.

    Attributes:
        words: the vocabulary of queries and passages.
        docs, judgments: for all queries.
        train_queries, train_run: what a model may be trained on.
        test_queries, test_run: held out: no passage of theirs is shown in training, not even under another id.
    """

    words: tuple[str, ...]
    docs: Path
    judgments: Path
    train_queries: Path
    train_run: Path
    test_queries: Path
    test_run: Path


def invent_words(count: int, seed: int) -> tuple[str, ...]:
    """Different words of three syllables that no language owns."""
    source = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(source.choice("bdfgklmnprstvz") + source.choice("aeiou") for _ in range(3))] = None
    return tuple(words)


def build_collection(
    folder: Path,
    *,
    num_train_queries: int = 20000,
    num_test_queries: int = 200,
    num_candidates: int = 4,
    words_per_passage: int = 4,
    num_words: int = 16,
    passages_per_grade: int = 40,
    test_passages_per_grade: int = 20,
    seed: int = 42,
) -> Collection:
    """Write a collection. The same arguments write the same files.

    A candidate's grade is how often it says the query's word; the candidates of a query have grades 0, 1, 2, …, and
    come in an order drawn by chance.

    Args:
        folder: made if absent; its files are replaced.
        num_train_queries: queries to train on.
        num_test_queries: held-out queries.
        num_candidates: passages of a query; at most words_per_passage + 1.
        words_per_passage: length of a passage, in words.
        num_words: size of the vocabulary.
        passages_per_grade, test_passages_per_grade: passages written for each word and grade to train on, and held
            out; no two of all have the same text.
        seed: of words, passages and orders.
    Raises:
        ValueError: more candidates than there can be grades, too few words, or more passages than there are texts.
    """
    if not 2 <= num_candidates <= words_per_passage + 1:
        raise ValueError(
            f"num_candidates: found {num_candidates}, allowed are 2 to {words_per_passage + 1}, for a passage of "
            f"{words_per_passage} words says a word at most that often; make passages longer or lists shorter"
        )
    if num_words <= words_per_passage:
        raise ValueError(f"num_words: found {num_words}, allowed are more than the {words_per_passage} of a passage")
    _check_texts(num_words, words_per_passage, num_candidates - 1, passages_per_grade + test_passages_per_grade)
    source = random.Random(seed)
    words = invent_words(num_words, seed)
    folder.mkdir(parents=True, exist_ok=True)
    files = Collection(
        words,
        *(folder / name for name in ("docs.jsonl", "qrels.trec")),
        *(folder / name for name in ("train_queries.jsonl", "train_run.trec", "test_queries.jsonl", "test_run.trec")),
    )
    docs: list[dict[str, str]] = []
    judgments: list[str] = []
    written: set[tuple[str, ...]] = set()
    for part, queries, run, count, per_grade in (
        ("train", files.train_queries, files.train_run, num_train_queries, passages_per_grade),
        ("test", files.test_queries, files.test_run, num_test_queries, test_passages_per_grade),
    ):
        pool = _passages(words, words_per_passage, num_candidates - 1, per_grade, source, written)
        by_grade: dict[tuple[str, int], list[int]] = {}
        for number, passage in enumerate(pool):
            said = Counter(passage)
            for word in words:
                by_grade.setdefault((word, said[word]), []).append(number)
            docs.append({"docid": f"{part}-{number}", "title": "", "text": " ".join(passage)})
        asked, ranked = [], []
        for number in range(count):
            qid, word = f"{part}-{number}", source.choice(words)
            asked.append({"qid": qid, "text": word})
            candidates = [(source.choice(by_grade[word, grade]), grade) for grade in range(num_candidates)]
            source.shuffle(candidates)
            for place, (doc, grade) in enumerate(candidates):
                ranked.append(f"{qid} Q0 {part}-{doc} {place + 1} {num_candidates - place} chance")
                judgments.append(f"{qid} 0 {part}-{doc} {grade}")
        _write_json_lines(queries, asked)
        run.write_text("\n".join(ranked) + "\n")
    _write_json_lines(files.docs, docs)
    files.judgments.write_text("\n".join(judgments) + "\n")
    return files


def _check_texts(num_words: int, length: int, max_grade: int, per_grade: int) -> None:
    """Stop where there are fewer different texts than passages of a grade."""
    for grade in range(1, max_grade + 1):
        others = length - grade
        texts = math.comb(length, grade) * math.perm(num_words - 1, others)
        if grade == 1:
            texts //= length  # each of its words is said once, so it could be written for any of them
        if per_grade > texts:
            raise ValueError(
                f"passages_per_grade + test_passages_per_grade: found {per_grade}, allowed are {texts}, as many as "
                f"there are texts of {length} words that say one of them {grade} times; write fewer, or longer ones"
            )


def _passages(
    words: tuple[str, ...],
    length: int,
    max_grade: int,
    per_grade: int,
    source: random.Random,
    written: set[tuple[str, ...]],
) -> list[tuple[str, ...]]:
    """Passages that say a word 1 to `max_grade` times, each of them new; `written` grows by them."""
    passages: list[tuple[str, ...]] = []
    for word in words:
        others = [other for other in words if other != word]
        for grade in range(1, max_grade + 1):
            goal = len(passages) + per_grade
            while len(passages) < goal:
                drawn = [word] * grade + source.sample(others, length - grade)
                source.shuffle(drawn)
                passage = tuple(drawn)
                if passage not in written:
                    written.add(passage)
                    passages.append(passage)
    return passages


def _write_json_lines(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def build_model_folder(
    folder: Path,
    words: tuple[str, ...],
    *,
    with_numbers: bool = False,
    hidden_size: int = 64,
    num_layers: int = 2,
) -> None:
    """Write configuration and tokenizer of a small Mistral that reads the client's prompts about these words.

    The tokenizer knows the words of the prompt template, all letters as identifiers, and `words`. The sizes, the wide
    initialisation and the short rotary period are what learns within minutes; see benchmarks/EXPERIMENTS.md.

    Args:
        folder: made if absent; holds no weights.
        words: of the collection.
        with_numbers: 1 to 99 are a token each too; otherwise each of their digits is.
        hidden_size: D.
        num_layers: decoder layers.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import MistralConfig, PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    styles: list[IdentifierStyle] = ["letters", "numbers"] if with_numbers else ["letters"]
    piece = PIECE_WITH_NUMBERS if with_numbers else PIECE
    names = [name for style in styles for name in identifiers(MAX_CANDIDATES[style], style)]
    turns = [
        render_user_turn(" ".join(words), [" ".join(words)] * count, style)
        for style in styles
        for count in range(2, MAX_CANDIDATES[style] + 1)
    ]
    pieces = [found for text in (SYSTEM_MESSAGE, *turns) for found in re.findall(piece, text)]
    vocabulary = {text: index for index, text in enumerate(dict.fromkeys([*special, *names, *pieces]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(piece), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)  # type: ignore[attr-defined]
    MistralConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.12,
        rope_theta=1000.0,
        tie_word_embeddings=False,
        sliding_window=None,
        max_position_embeddings=4096,
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
        pad_token_id=vocabulary["</s>"],
    ).save_pretrained(folder)


MEASURE = "nDCG@10"


NUM_THREADS = 2


def run_demo(
    folder: Path,
    recipe_path: Path,
    overrides: Sequence[str] = (),
    *,
    num_train_queries: int = 20000,
    report: Callable[[str], None] = print,
) -> dict[str, float]:
    """Make the demo's collection, train its recipe, rank queries that were held out by the first token's scores.

    Args:
        folder: takes everything: `collection/`, `model/`, `shards/`, `untrained/`, and the run's own files.
        recipe_path: the demo's recipe.
        overrides: `key=value` laid over it.
        num_train_queries: lists to train on.
        report: told each step, and the table at the end.
    Returns:
        nDCG@10 on the held-out queries of "first stage", "untrained", "trained" and "oracle".
    Raises:
        RunError: training failed.
        ValueError: a key of the recipe is wrong.
    """
    import torch

    from rankllm_composer.recipe.load import load_recipe

    torch.set_num_threads(NUM_THREADS)
    report(f"1. A collection of invented words, in {folder / 'collection'}.")
    files = build_collection(folder / "collection", num_train_queries=num_train_queries)
    build_model_folder(folder / "model", files.words)
    overrides = [*_places(folder, files), *overrides]
    recipe = load_recipe(recipe_path, overrides)

    report("2. Lists become shards, shards train a small Mistral from random weights, an HF folder comes out.")
    untrained = export_untrained(recipe, folder / "untrained")
    _train(recipe_path, overrides)
    trained = max(Path(str(recipe.export_folder)).iterdir(), key=lambda path: path.stat().st_mtime)

    report("3. Queries that were held out, ranked by the first token's scores, before and after.")
    before = _rerank(untrained, files, folder / "untrained.trec")
    after = _rerank(trained, files, folder / "trained.trec")
    figures = {
        "first stage": before.comparison.first_mean,
        "untrained": before.comparison.second_mean,
        "trained": after.comparison.second_mean,
        "oracle": 1.0,
    }
    report(_table(figures, after))
    return figures


def _train(recipe_path: Path, overrides: Sequence[str]) -> None:
    """The command that a cluster runs, with one process."""
    launcher = Path(sys.executable).with_name("composer")
    script = Path(__file__).with_name("train.py")
    command = [sys.executable, str(launcher), "-n", "1", str(script), str(recipe_path), *overrides]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(NUM_THREADS)}, check=False)
    if done.returncode != 0:
        raise RunError(f"training ended with exit code {done.returncode}; what it said is above")


def _places(folder: Path, files: Collection) -> list[str]:
    return [
        f"run.folder={folder}",
        f"model.name_or_path={folder / 'model'}",
        f"data.train.local={folder / 'shards'}",
        f"data.train.source.run={files.train_run}",
        f"data.train.source.judgments={files.judgments}",
        f"data.train.source.queries={files.train_queries}",
        f"data.train.source.docs={files.docs}",
    ]


def export_untrained(recipe: Recipe, folder: Path) -> Path:
    """Export the model as training starts from it, with letters; fresh weights are those that the seed draws."""
    from composer.utils import reproducibility

    from rankllm_composer.export.model_folder import ServedModel, write_model_folder
    from rankllm_composer.model.loading import load_causal_lm, load_tokenizer
    from rankllm_composer.prompts.contract import decoding_contract

    tokenizer = load_tokenizer(recipe.model)
    contract = decoding_contract(tokenizer, recipe.objective.name, context_size_tokens=recipe.data.max_length_tokens)
    reproducibility.seed_all(recipe.run.seed)
    model = load_causal_lm(recipe.model)
    served = ServedModel(model.config, tokenizer, contract, dtype="float32")
    return write_model_folder(folder, model.state_dict(), served, "The model before training.")


def _rerank(model: Path, files: Collection, output: Path) -> MeasureComparison:
    from rankllm_composer.options import RerankOptions
    from rankllm_composer.ranking.rerank import RerankFiles, rerank_files

    job = RerankFiles(
        queries=files.test_queries,
        documents=files.docs,
        first_stage=files.test_run,
        judgments=files.judgments,
        output=output,
    )
    options = RerankOptions(decoding="first_token")
    return rerank_files(model, job, options, measures=[MEASURE], progress_bar=False).comparisons[0]


def _table(figures: dict[str, float], trained: MeasureComparison) -> str:
    told = {
        "first stage": "the candidates in random order",
        "untrained": "the model before training",
        "trained": "the model after training",
        "oracle": "the best possible order",
    }
    lines = [f"\n{MEASURE} on {len(trained.reranked)} held-out queries, first-token decoding"]
    lines += [f"    {name:<12} {value:.3f}   {told[name]}" for name, value in figures.items()]
    won, same, lost = trained.comparison.wins, trained.comparison.ties, trained.comparison.losses
    lines.append(f"    trained against first stage: {won} queries better, {same} the same, {lost} worse")
    return "\n".join(lines)
