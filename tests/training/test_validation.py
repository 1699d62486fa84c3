"""Evaluation on held-out windows during training: when it happens, what it logs, and that training is unaffected."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from composer import Trainer
from composer.core import Event, Timestamp
from composer.loggers import InMemoryLogger
from composer.models import HuggingFaceModel
from support.launching import REPOSITORY
from support.small_disk import fill, small_disk
from support.tiny_rerankers import FAMILIES, new_contract, new_tokenizer, record_of
from support.tiny_training import new_loader
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from rankllm_composer.errors import PromptError, RunError
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.reranker import ListwiseReranker
from rankllm_composer.prompts.lists import list_kind
from rankllm_composer.ranking.evaluation import EvaluationOptions, evaluate_windows, summarize, window_ndcg
from rankllm_composer.recipe.load import load_recipe
from rankllm_composer.recipe.sections import Evaluation
from rankllm_composer.training import assembly
from rankllm_composer.training.run_files import PREFIX, read_details
from rankllm_composer.training.validation import Validation, measurable, training_precision

GRADED = [
    ([None, None], "generation/ndcg@10", True),
    ([(0, 0, 0, 0), None], "generation/ndcg@10", True),
    ([(0, 0, 0, 0), (1, 0)], "generation/ndcg@10", False),
    ([None, None], "generation/tau", False),
]
RECORDS = [record_of(values, record_id=f"r{values}") for values in ([0, 3, 1, 2], [1, 2], [0, 0, 0])]


def trained(duration="2ep", validation: Validation | None = None, dropout: float = 0.0, **options) -> Trainer:
    """Train a model, by default for two epochs of four batches, and return its trainer."""
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES["mistral"])
    config.attention_dropout = dropout
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    trainer = Trainer(
        model=HuggingFaceModel(model, new_tokenizer()),
        train_dataloader=new_loader(),
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-3),
        max_duration=duration,
        device="cpu",
        progress_bar=False,
        seed=1,
        callbacks=[] if validation is None else [validation],
        **options,
    )
    trainer.fit()
    return trainer


def new_validation(interval="1ep", **options) -> Validation:
    tokenizer, details = new_tokenizer(), options.pop("details", None)
    best_by, patience = options.pop("best_by", None), options.pop("patience", None)
    return Validation(
        RECORDS,
        tokenizer=tokenizer,
        contract=new_contract(tokenizer),
        interval=interval,
        options=EvaluationOptions(**options),
        best_by=best_by,
        patience=patience,
        details=details,
    )


class AttentionTypes(TorchDispatchMode):
    """Collects the types of the queries of every attention, as the kernel gets them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        if "scaled_dot_product" in str(operation):
            self.seen.append(arguments[0].dtype)
        return operation(*arguments, **(keywords or {}))


@pytest.mark.parametrize("half", [True, False])
def test_windows_are_ranked_in_the_precision_of_training(half):
    """The weights are float32; a kernel for half precision would refuse them."""
    tokenizer = new_tokenizer()
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["mistral"]), attn_implementation="sdpa")
    reranker = ListwiseReranker(model, tokenizer, Objective("combined"), bf16_on_cpu=half)
    state = SimpleNamespace(model=reranker, precision="fp32", precision_config=None, timestamp=Timestamp())
    for wrapped in (reranker, SimpleNamespace(module=reranker)):  # DDP has the model as its module
        with training_precision(SimpleNamespace(**vars(state) | {"model": wrapped})):
            assert torch.is_autocast_enabled("cpu") is half
    types = AttentionTypes()
    with types:
        new_validation().run_event(Event.FIT_START, state, None)  # ranks a window by both decodings
    assert set(types.seen) <= {torch.bfloat16 if half else torch.float32}
    assert not half or len(types.seen) >= model.config.num_hidden_layers  # in float32 torch may take it apart
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


@pytest.mark.parametrize(
    "interval, duration, expected",
    [
        ("1ep", "2ep", [4, 8]),
        ("1ep", "8ba", [4, 8]),  # the last batch and the epoch end together: once
        ("2ep", "3ep", [8, 12]),
        ("3ba", "2ep", [3, 6, 8]),
        ("2ba", "4ba", [2, 4]),
        ("5ba", "6ba", [5, 6]),
        ("0.5dur", "8ba", [4, 8]),
    ],
)
def test_when_windows_are_ranked(interval, duration, expected, tmp_path):
    path = tmp_path / "evaluations.jsonl"
    trained(duration, new_validation(interval, decodings=["first_token"], details=path))
    assert [json.loads(line)["batch"] for line in path.read_text().splitlines()] == expected


def test_logged_figures_equal_an_evaluation_of_the_model(tmp_path):
    """The metrics that are logged, kept for the export, and written per window all belong to the same weights."""
    memory, path = InMemoryLogger(), tmp_path / "evaluations.jsonl"
    validation = new_validation("1ep", num_shuffles=3, seed=7, details=path)
    trainer = trained("1ep", validation, loggers=[memory])
    tokenizer = new_tokenizer()
    model = trainer.state.model.model
    results = evaluate_windows(
        model, tokenizer, RECORDS, new_contract(tokenizer), EvaluationOptions(num_shuffles=3, seed=7)
    )
    expected = {PREFIX + name: value for name, value in summarize(results).items()}
    assert validation.figures == validation.figures_after(4) == expected
    assert validation.figures_after(3) == {}  # other weights
    assert {name: memory.data[name][-1][1] for name in expected} == expected
    for decoding in ("first_token", "generation"):
        assert {f"eval/{decoding}/{figure}" for figure in ("ndcg@10", "mrr@10", "tau")} <= expected.keys()
    beside = {"eval/presented/ndcg@10", "eval/oracle/ndcg@10", "eval/chance/ndcg@10", "eval/agreement/tau"}
    beside |= {f"eval/generation/{share}" for share in ("malformed", "repeated", "incomplete")}
    beside |= {"eval/first_token/shuffled/ndcg@10_deviation", "eval/first_token/reversed/tau"}
    assert beside <= expected.keys()
    (details,) = read_details(path)
    assert details["ndcg@10"] == {result.id: window_ndcg(result) for result in results}
    assert sum(map(sum, details["positions"]["first_token"])) == 3 * (4 + 2 + 3)


def test_training_is_unaffected():
    """With dropout drawing from torch's generator: the same weights, bit by bit, as without any evaluation."""
    plain = trained(dropout=0.2)
    watched = trained(validation=new_validation("1ba", num_shuffles=2), dropout=0.2)
    assert watched.state.model.model.training == plain.state.model.model.training
    for (name, one), (_, other) in zip(
        plain.state.model.named_parameters(), watched.state.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_training_ends_when_the_figure_no_longer_rises(tmp_path, capsys):
    """The number of windows never rises: patience 2 ends the run at the third evaluation, also of a resumed run."""
    saved = {"save_folder": str(tmp_path), "save_interval": "1ba", "save_filename": "ba{batch}.pt"}

    def run(patience: int | None, **options) -> Trainer:
        validation = new_validation("1ba", decodings=["first_token"], best_by="windows", patience=patience)
        return trained("6ba", validation, **options)

    whole = run(2, **saved)
    assert whole.state.timestamp.batch.value == 3
    told = "stopped early at batch 3: windows has not risen above 3.0000 (batch 1) in 2 evaluations"
    assert told in capsys.readouterr().out
    resumed = run(2, load_path=str(tmp_path / "ba2.pt"))
    assert resumed.state.timestamp.batch.value == 3
    for one, other in zip(whole.state.model.parameters(), resumed.state.model.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="max_duration"):  # it has ended: Composer has nothing to fit
        run(2, load_path=str(tmp_path / "ba3.pt"))
    assert run(4, load_path=str(tmp_path / "ba3.pt")).state.timestamp.batch.value == 5
    assert run(None).state.timestamp.batch.value == 6


@pytest.mark.parametrize("grades, best_by, stops", GRADED)
def test_best_by_needs_windows_with_a_relevant_candidate(monkeypatch, grades, best_by, stops):
    records = [replace(record, grades=own) for record, own in zip(RECORDS, grades)]
    windows = SimpleNamespace(num_samples=len(records), record=records.__getitem__)
    monkeypatch.setattr(assembly, "build_dataset", lambda *_: windows)
    keys = ["data.eval={local: windows}", f"evaluation={{best_by: {best_by}}}"]
    recipe = load_recipe(REPOSITORY / "yamls" / "first_mistral.yaml", keys)
    tokenizer = new_tokenizer()
    if stops:
        with pytest.raises(assembly.RunError, match=r"best_by is generation/ndcg@10, but no window .*/tau"):
            assembly.build_validation(recipe, new_contract(tokenizer), tokenizer)
    else:
        assert assembly.build_validation(recipe, new_contract(tokenizer), tokenizer) is not None


def test_an_evaluation_repeated_after_resuming_counts_once(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    lines = [{"batch": 4, "x": "lost"}, {"batch": 2, "x": "first"}, {"batch": 4, "x": "again"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"batch": 6, "ndc')
    assert [(found["batch"], found["x"]) for found in read_details(path)] == [(2, "first"), (4, "again")]


def test_an_evaluation_is_added_after_a_torn_line(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    path.write_text(json.dumps({"batch": 2}) + '\n{"batch": 3, "ndc')
    trained("4ba", new_validation("4ba", decodings=["first_token"], details=path))
    assert [found["batch"] for found in read_details(path)] == [2, 4]
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_one_readable_error(tmp_path):
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        path = disk / "evaluations.jsonl"
        path.write_text("{}\n" * 2000)
        fill(disk)
        with pytest.raises(RunError, match=r"after batch 4 could not be written \(No space left on device\); earlier"):
            trained("4ba", new_validation("4ba", decodings=["first_token"], details=path))
        assert path.read_text() == "{}\n" * 2000


def test_what_first_token_decoding_cannot_rank_is_ranked_by_generation():
    """Numbers beyond 9 are several tokens of this tokenizer, as of most."""
    tokenizer = new_tokenizer()
    contract = new_contract(tokenizer, "generation", "numbers")
    records = [record_of(range(size), style="numbers", record_id=f"n{size}") for size in (3, 11)]
    section = Evaluation(best_by="first_token/ndcg@10", num_shuffles=1, constrained=True)
    options, best_by, changes = measurable(section, 7, tokenizer, contract, Counter(map(list_kind, records)))
    assert (options.decodings, options.bias_decodings, options.constrained) == (["generation"], ("generation",), False)
    assert best_by == "generation/ndcg@10"
    assert [text.partition(":")[0] for text in changes] == [
        "evaluation.decodings",
        "evaluation.best_by",
        "evaluation.constrained",
    ]
    assert "cannot be ranked by first_token and is ranked by generation instead" in changes[0]
    memory = InMemoryLogger()
    validation = Validation(records, tokenizer=tokenizer, contract=contract, interval="1ep", options=options)
    trained("1ep", validation, loggers=[memory])
    assert {"eval/generation/ndcg@10", "eval/generation/shuffled/tau"} <= memory.data.keys()
    assert not any(name.startswith("eval/first_token") for name in memory.data)


def test_decodings_that_can_rank_the_windows_are_unchanged():
    tokenizer = new_tokenizer()
    section = Evaluation(best_by="first_token/ndcg@10", constrained=True)
    options, best_by, changes = measurable(section, 7, tokenizer, new_contract(tokenizer), {("letters", 20): 3})
    assert (list(options.decodings), options.constrained, best_by) == (
        ["first_token", "generation"],
        True,
        "first_token/ndcg@10",
    )
    assert changes == []
    with pytest.raises(RunError, match=r"evaluation: no decoding can rank the windows of data\.eval"):
        measurable(Evaluation(), 7, tokenizer, new_contract(tokenizer, "ranking"), {("numbers", 20): 3})


def test_a_window_that_cannot_be_presented_is_found_before_the_first_batch():
    memory = InMemoryLogger()
    tokenizer = new_tokenizer()
    validation = Validation(
        [RECORDS[0], replace(RECORDS[1], user="no list")],
        tokenizer=tokenizer,
        contract=new_contract(tokenizer),
        interval="2ep",
        options=EvaluationOptions(num_shuffles=1),
    )
    with pytest.raises(PromptError):
        trained("2ep", validation, loggers=[memory])
    assert "loss/train/total" not in memory.data
