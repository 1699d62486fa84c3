"""Composer time strings: each unit that a recipe may use is accepted where it is used, and no other one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from composer.core import Callback, Event, State, Time
from composer.utils import create_interval_scheduler
from support.exporting import new_exporter
from support.recipes import problems
from support.tiny_training import new_hf_model, new_trainer

from rankllm_composer.cli import main
from rankllm_composer.recipe.checks import warmup_warning
from rankllm_composer.recipe.keys import describe_keys
from rankllm_composer.recipe.load import load_recipe
from rankllm_composer.recipe.sections import Recipe
from rankllm_composer.recipe.times import EXAMPLES, UNITS, explain_warmup, updates_in
from rankllm_composer.training.export_callback import ExportFolder

TIMES = [(key, unit) for key in UNITS for unit in EXAMPLES]
SECTIONS = ["data.eval={local: held_out}", "evaluation={best_by: null}", "run.max_duration=9ep", "schedule.warmup=0ba"]


def test_every_key_of_a_time_is_in_the_table() -> None:
    assert {row.name for row in describe_keys(Recipe) if row.unit == "Composer time"} == set(UNITS)


@pytest.mark.parametrize("key, unit", TIMES)
def test_check_accepts_the_units_of_the_table(minimal_recipe: Path, key: str, unit: str) -> None:
    found = problems(minimal_recipe, *SECTIONS, f"{key}={EXAMPLES[unit]}")
    assert (key not in found) is (unit in UNITS[key])
    if key in found:
        assert all(EXAMPLES[allowed] in found[key].expected for allowed in UNITS[key])


@pytest.mark.parametrize("key, unit", [(key, unit) for key, unit in TIMES if unit in UNITS[key]])
def test_a_run_accepts_the_units_of_the_table(tmp_path: Path, key: str, unit: str) -> None:
    time = EXAMPLES[unit]
    if key == "checkpoint.export.interval":
        assert isinstance(new_exporter(tmp_path, interval=time), ExportFolder)
    elif key.endswith("interval"):
        assert callable(create_interval_scheduler(time, checkpoint_events=key.startswith("checkpoint")))
    else:
        updates = updates_in(time, lists_per_update=8, updates_per_epoch=40, num_updates=100)
        assert updates == {"ep": 120, "ba": 50, "sp": 500, "dur": 10}[unit]


@pytest.mark.parametrize("duration", ["2ep", "8ba", "16sp"])
def test_composer_counts_every_unit_of_an_interval(duration: str) -> None:
    """Four updates of two rows of eight tokens per epoch, and when each interval of half the run is due."""
    due: dict[str, list[int]] = {time: [] for time in ("1ep", "4ba", "8sp", "64tok", "0.5dur")}
    schedulers = {time: create_interval_scheduler(time) for time in due}

    class Look(Callback):
        def run_event(self, event: Event, state: State, logger: object) -> None:
            if event in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT):
                for time, is_due in schedulers.items():
                    if is_due(state, event) and state.timestamp.batch.value not in due[time]:
                        due[time].append(state.timestamp.batch.value)

    trainer = new_trainer(new_hf_model(), duration, callbacks=[Look()])
    trainer.fit()
    trainer.close()
    assert due["1ep"] == due["4ba"] == due["8sp"] == due["0.5dur"] == [4, 8]
    assert Time.from_timestring("64tok").value == 64 and due["64tok"][-1] == 8


@pytest.mark.parametrize(
    "warmup, duration, per_epoch, expected",
    [
        ("50ba", "3ep", 3, "50 updates, but the run has 9"),
        ("9ba", "3ep", 3, "9 updates, but the run has 9"),
        ("8ba", "3ep", 3, None),
        ("400sp", "3ep", 3, "50 updates, but the run has 9"),
        ("3ep", "20ba", 10, "30 updates, but the run has 20"),
        ("1dur", "3ep", 3, "9 updates, but the run has 9"),
        ("50ba", "400sp", None, "50 updates, but the run has 50"),
        ("50ba", "3ep", None, None),
        ("0ba", "1ba", None, None),
    ],
)
def test_a_warmup_as_long_as_the_run_is_explained_in_updates(
    warmup: str, duration: str, per_epoch: int | None, expected: str | None
) -> None:
    text = explain_warmup(warmup, duration, lists_per_update=8, updates_per_epoch=per_epoch)
    assert (text is None) if expected is None else (text is not None and expected in text)
    if text is not None:
        assert "50 updates, but the run has 9" not in text or "ends at 16% of optimizer.lr. Set schedule" in text
        advice = text.partition("schedule.warmup=")[2].partition(",")[0]  # followed as it stands
        assert explain_warmup(advice, duration, lists_per_update=8, updates_per_epoch=per_epoch) is None


@pytest.mark.parametrize(
    "overrides, is_refused",
    [
        (["run.max_duration=400sp"], True),
        (["run.max_duration=401sp"], False),
        (["run.max_duration=49ba"], True),
        (["run.max_duration=20ba", "schedule.warmup=160sp"], True),
        (["run.max_duration=2ep", "schedule.warmup=2ep"], True),
        (["run.max_duration=2ep", "schedule.warmup=0.99dur"], False),
        (["run.max_duration=10ba", "schedule.warmup=0.99dur"], True),
    ],
)
def test_check_refuses_what_the_recipe_alone_shows(
    minimal_recipe: Path, overrides: list[str], is_refused: bool
) -> None:
    assert ("schedule.warmup" in problems(minimal_recipe, *overrides)) is is_refused


@pytest.mark.parametrize("kind", ["index", "jsonl", "json"])
def test_check_counts_the_lists_on_this_machine(
    minimal_recipe: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """70 lists are 9 updates per epoch of 8 lists, 27 in all; the warmup of 50 is reported."""
    overrides = [f"data.train.local={tmp_path}"]
    if kind == "index":
        (tmp_path / "index.json").write_text(json.dumps({"shards": [{"samples": 60}, {"samples": 10}]}))
    else:
        rows = [json.dumps({"id": str(row)}) for row in range(70)]
        path = tmp_path / f"records.{kind}"
        path.write_text("\n".join(rows) + "\n" if kind == "jsonl" else f"[{','.join(rows)}]")
        overrides.append(f"data.train.source.input={path}")
    assert math.ceil(70 / 8) * 3 == 27
    sentence = "schedule.warmup is 50ba, 50 updates, but the run has 27 (run.max_duration 3ep)"
    assert sentence in str(warmup_warning(load_recipe(minimal_recipe, overrides)))
    with pytest.raises(SystemExit):
        main(["recipes", "check", str(minimal_recipe), *overrides])
    assert f"warning: {sentence}" in capsys.readouterr().err
    assert warmup_warning(load_recipe(minimal_recipe, [*overrides, "schedule.warmup=26ba"])) is None
