"""The smallest complete example: invent a collection, train a model from scratch, measure what it learned."""

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

from rankllm_composer.errors import RunError, shell_line
from rankllm_composer.prompts.permutations import MAX_CANDIDATES, IdentifierStyle, identifiers
from rankllm_composer.prompts.user_turn import SYSTEM_MESSAGE, render_user_turn
from rankllm_composer.screen import doing, say

if TYPE_CHECKING:
    from rankllm_composer.ranking.comparison import MeasureComparison
    from rankllm_composer.recipe.sections import Recipe

# A token of the word-level tokenizer: a word or a sign, with the space before it; in the second also a whole number.
PIECE = r"\n| ?[A-Za-z]+| ?[^\sA-Za-z]| "
PIECE_WITH_NUMBERS = r"\n| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]| "
CHAT_TEMPLATE = (
    "[INST]{% for message in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}[/INST]{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class CollectionOptions:
    """Sizes of a collection.

    Attributes:
        num_train_queries, num_test_queries: queries to train on, and held out.
        num_candidates: passages per query; at most words_per_passage + 1.
        words_per_passage: length of a passage, in words.
        num_words: size of the vocabulary.
        passages_per_grade, test_passages_per_grade: passages per word and grade to train on, and held out; no two of
            all have the same text.
        seed: seed of words, passages and orders.
    """

    num_train_queries: int = 20000
    num_test_queries: int = 200
    num_candidates: int = 4
    words_per_passage: int = 4
    num_words: int = 16
    passages_per_grade: int = 40
    test_passages_per_grade: int = 20
    seed: int = 42

    def __post_init__(self) -> None:
        length = self.words_per_passage
        if not 2 <= self.num_candidates <= length + 1:
            raise ValueError(
                f"num_candidates is {self.num_candidates}; expected 2 to {length + 1}, because a passage of {length} "
                "words contains a word at most that often. Use longer passages or shorter lists."
            )
        if self.num_words <= length:
            raise ValueError(f"num_words is {self.num_words}; expected more than the {length} of a passage.")
        per_grade = self.passages_per_grade + self.test_passages_per_grade
        for grade in range(1, self.num_candidates):
            num_texts = math.comb(length, grade) * math.perm(self.num_words - 1, length - grade)
            if grade == 1:
                num_texts //= length  # it contains each of its words once, so it counts for any of them
            if per_grade > num_texts:
                raise ValueError(
                    f"passages_per_grade + test_passages_per_grade is {per_grade}; expected at most {num_texts}, the "
                    f"number of texts of {length} words that contain one of them {grade} times. Use fewer or longer "
                    "passages."
                )


@dataclass(frozen=True)
class Collection:
    """Files of a collection: queries and documents as JSONL, first-stage runs and judgments in TREC format.

    `words` is the vocabulary. No passage of a test query occurs in training, not even under another id.
    """

    words: tuple[str, ...]
    docs: Path
    judgments: Path
    train_queries: Path
    train_run: Path
    test_queries: Path
    test_run: Path


def invent_words(count: int, seed: int) -> tuple[str, ...]:
    """Invent different words of three syllables."""
    source = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(source.choice("bdfgklmnprstvz") + source.choice("aeiou") for _ in range(3))] = None
    return tuple(words)


def build_collection(folder: Path, options: CollectionOptions | None = None) -> Collection:
    """Write a collection, replacing existing files. The same options write the same files.

    The grade of a candidate is how often it contains the query's word; the candidates of a query have grades 0, 1, 2,
    …, in random order.
    """
    options = options or CollectionOptions()
    source = random.Random(options.seed)
    words = invent_words(options.num_words, options.seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = "docs.jsonl qrels.trec train_queries.jsonl train_run.trec test_queries.jsonl test_run.trec"
    files = Collection(words, *(folder / name for name in names.split()))
    docs: list[dict[str, str]] = []
    judgments: list[str] = []
    written: set[tuple[str, ...]] = set()
    train = ("train", files.train_queries, files.train_run, options.num_train_queries, options.passages_per_grade)
    test = ("test", files.test_queries, files.test_run, options.num_test_queries, options.test_passages_per_grade)
    for part, query_file, run_file, num_queries, per_grade in (train, test):
        by_grade: dict[tuple[str, int], list[int]] = {}
        for number, passage in enumerate(_draw_passages(words, per_grade, options, source, written)):
            counts = Counter(passage)
            for word in words:
                by_grade.setdefault((word, counts[word]), []).append(number)
            docs.append({"docid": f"{part}-{number}", "title": "", "text": " ".join(passage)})
        queries, run = [], []
        for number in range(num_queries):
            qid, word = f"{part}-{number}", source.choice(words)
            queries.append({"qid": qid, "text": word})
            candidates = [(source.choice(by_grade[word, grade]), grade) for grade in range(options.num_candidates)]
            source.shuffle(candidates)
            for place, (doc, grade) in enumerate(candidates):
                run.append(f"{qid} Q0 {part}-{doc} {place + 1} {options.num_candidates - place} chance")
                judgments.append(f"{qid} 0 {part}-{doc} {grade}")
        _write_json_lines(query_file, queries)
        run_file.write_text("\n".join(run) + "\n")
    _write_json_lines(files.docs, docs)
    files.judgments.write_text("\n".join(judgments) + "\n")
    return files


def _draw_passages(
    words: tuple[str, ...],
    per_grade: int,
    options: CollectionOptions,
    source: random.Random,
    written: set[tuple[str, ...]],
) -> list[tuple[str, ...]]:
    """Draw passages that contain a word 1, 2, … times and are not in `written`, to which they are added."""
    passages: list[tuple[str, ...]] = []
    for word in words:
        others = [other for other in words if other != word]
        for grade in range(1, options.num_candidates):
            goal = len(passages) + per_grade
            while len(passages) < goal:
                drawn = [word] * grade + source.sample(others, options.words_per_passage - grade)
                source.shuffle(drawn)
                passage = tuple(drawn)
                if passage not in written:
                    written.add(passage)
                    passages.append(passage)
    return passages


def _write_json_lines(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def build_model_folder(folder: Path, words: tuple[str, ...], *, with_numbers: bool = False) -> None:
    """Write the configuration and tokenizer of a small Mistral that reads the client's prompts about these words.

    The vocabulary contains the words of the prompt template, all letters as identifiers, `words`, and digits or, with
    numbers, 1 to 99. The sizes, the wide initialization and the short rotary period make the model learn within
    minutes; see benchmarks/EXPERIMENTS.md.
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
    pieces = [match for text in (SYSTEM_MESSAGE, *turns) for match in re.findall(piece, text)]
    vocabulary = {text: index for index, text in enumerate(dict.fromkeys([*special, *names, *pieces]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(piece), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)  # type: ignore[attr-defined]
    MistralConfig(  # type: ignore[no-untyped-call]
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
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
    report: Callable[[str], None] = say,
) -> dict[str, float]:
    """Build the demo's collection, train its recipe, and rank held-out queries by first-token decoding.

    Args:
        folder: for `collection/`, `model/`, `shards/`, `untrained/`, and the files of the run.
        recipe_path, overrides: the recipe of the demo, and `key=value` that override it.
        num_train_queries: number of lists to train on.
        report: called with each step, and with the table at the end.
    Returns:
        nDCG@10 on the held-out queries of "first stage", "untrained", "trained" and "oracle".
    Raises:
        RunError: training failed.
        ValueError: the recipe cannot be used.
    """
    import torch

    from rankllm_composer.recipe.load import load_recipe

    torch.set_num_threads(NUM_THREADS)
    report(f"1. Build a collection of invented words in {folder / 'collection'}.")
    with doing("writing queries, passages, judgments and a tokenizer"):
        files = build_collection(folder / "collection", CollectionOptions(num_train_queries=num_train_queries))
        build_model_folder(folder / "model", files.words)
    paths = {
        "run.folder": folder,
        "model.name_or_path": folder / "model",
        "data.train.local": folder / "shards",
        "data.train.source.run": files.train_run,
        "data.train.source.judgments": files.judgments,
        "data.train.source.queries": files.train_queries,
        "data.train.source.docs": files.docs,
    }
    overrides = [*(f"{key}={path}" for key, path in paths.items()), *overrides]
    recipe = load_recipe(recipe_path, overrides)

    report("2. Build shards, train a small Mistral from random weights, and export it as a Hugging Face folder.")
    with doing("writing the model before training"):
        untrained = export_untrained(recipe, folder / "untrained")
    _train(recipe_path, overrides)
    trained = max(Path(str(recipe.export_folder)).iterdir(), key=lambda path: path.stat().st_mtime)

    report("3. Rank held-out queries by first-token decoding with the untrained and the trained model.")
    before = _rerank(untrained, files, folder / "untrained.trec").comparison
    after = _rerank(trained, files, folder / "trained.trec")
    result = after.comparison
    rows = {
        "first stage": (before.first_mean, "the candidates in random order"),
        "untrained": (before.second_mean, "the model before training"),
        "trained": (result.second_mean, "the model after training"),
        "oracle": (1.0, "the best possible order"),
    }
    lines = [f"\n{MEASURE} on {len(after.reranked)} held-out queries, first-token decoding"]
    lines += [f"    {name:<12} {value:.3f}   {meaning}" for name, (value, meaning) in rows.items()]
    counts = f"{result.wins} queries better, {result.ties} the same, {result.losses} worse"
    report("\n".join([*lines, f"    trained against first stage: {counts}"]))
    report(f"\nSee its curves: {shell_line('rankllm-composer', 'report', folder)}")
    return {name: value for name, (value, _) in rows.items()}


def _train(recipe_path: Path, overrides: Sequence[str]) -> None:
    """Run the command that a cluster runs, with one process."""
    command = [sys.executable, "-m", "rankllm_composer", "train", str(recipe_path), *overrides, "-n", "1"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(NUM_THREADS)}, check=False)
    if done.returncode != 0:
        raise RunError(f"training failed with exit code {done.returncode}. Its messages are above.")


def export_untrained(recipe: Recipe, folder: Path) -> Path:
    """Export the model that training starts from, with letters; fresh weights are drawn from the recipe's seed."""
    from composer.utils import reproducibility

    from rankllm_composer.export.model_folder import ServedModel, write_model_folder
    from rankllm_composer.model.loading import load_causal_lm, load_tokenizer
    from rankllm_composer.prompts.contract import decoding_contract

    tokenizer = load_tokenizer(recipe.model)
    contract = decoding_contract(
        tokenizer,
        recipe.objective.name,
        context_size_tokens=recipe.data.max_length_tokens,
        client_version=recipe.data.client_version,
    )
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
    return rerank_files(model, job, options, measures=[MEASURE]).comparisons[0]
