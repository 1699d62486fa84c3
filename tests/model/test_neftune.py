"""NEFTune: the noise against its formula, the algorithm event by event, and under Composer's Trainer."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from composer import Evaluator
from composer.core import Engine, Event, State
from composer.devices import DeviceCPU
from composer.loggers import Logger
from peft import LoraConfig
from support.noised_training import ALPHA, SEED, data_spec, new_lists, new_model, new_trainer, record_outputs
from torch.utils.checkpoint import checkpoint

from rankllm_composer.data.packing import split_batch
from rankllm_composer.model.neftune import NEFTune, neftune_noise, noise_seed

WORKER = Path(__file__).parents[1] / "workers" / "noised_embeddings.py"
PINNED_SEEDS = [7175886545736262506, 1056961454609136558, 9169699564768075551]

# --- the function -----------------------------------------------------------------------------------------------------


def test_noise_is_uniform_with_one_bound_per_sequence():
    lengths, hidden = [7, 60, 400], 64
    noise = neftune_noise(torch.zeros(1, 467, hidden), lengths, ALPHA, seeds=[1, 2, 3])
    for part, length in zip(noise[0].split(lengths), lengths):
        bound = ALPHA / math.sqrt(length * hidden)
        num = length * hidden
        assert part.abs().max() <= bound
        assert part.max() > 0.98 * bound
        assert part.min() < -0.98 * bound
        # Mean and variance of a uniform variable within 4 standard errors; the fourth moment of one in [-1, 1] is 1/5.
        assert abs(part.mean()) < 4 * bound / math.sqrt(3 * num)
        variance = ALPHA**2 / (length * hidden) / 3
        assert abs(part.square().mean() / variance - 1) < 4 * 3 * math.sqrt((1 / 5 - 1 / 9) / num)
        shares = torch.histc(part / bound, bins=10, min=-1, max=1) / num
        assert (shares - 0.1).abs().max() < 4 * math.sqrt(0.1 * 0.9 / num)
        # The expected norm of a sequence's noise does not depend on its length.
        assert part.norm().item() == pytest.approx(ALPHA / math.sqrt(3), rel=0.1)


def test_noise_of_a_sequence_does_not_depend_on_its_pack():
    embeddings = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    first, second, third = embeddings.split([3, 4, 5])
    alone = [neftune_noise(part, [len(part)], ALPHA, [seed]) for part, seed in ((first, 1), (second, 2), (third, 3))]
    torch.testing.assert_close(
        neftune_noise(embeddings[None], [3, 4, 5], ALPHA, [1, 2, 3]), torch.cat(alone)[None], rtol=0, atol=0
    )
    other_pack = neftune_noise(torch.cat([third, first]), [5, 3], ALPHA, [3, 1])
    torch.testing.assert_close(other_pack, torch.cat([alone[2], alone[0]]), rtol=0, atol=0)


def test_gradient_passes_unchanged():
    embeddings = torch.randn(1, 6, 4, requires_grad=True)
    upstream = torch.randn(1, 6, 4)
    neftune_noise(embeddings, [2, 4], ALPHA, [1, 2]).backward(upstream)
    torch.testing.assert_close(embeddings.grad, upstream, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_noise_is_drawn_in_float32_and_the_sum_rounded_once(dtype):
    embeddings = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    noise = neftune_noise(torch.zeros(1, 40, 16), [40], ALPHA, [1])
    noised = neftune_noise(embeddings, [40], ALPHA, [1])
    assert noised.dtype == dtype
    torch.testing.assert_close(noised, (embeddings.double() + noise.double()).to(dtype), rtol=0, atol=0)


def test_global_random_state_is_neither_used_nor_changed():
    state = torch.get_rng_state()
    noise = neftune_noise(torch.zeros(5, 3), [5], ALPHA, [1])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert torch.equal(neftune_noise(torch.zeros(5, 3), [5], ALPHA, [1]), noise)


def test_seeds_are_fixed_and_distinct():
    # A run resumed by a later version must replay the same noise.
    assert [noise_seed(42, 0, 7), noise_seed(42, 1, 7), noise_seed(0, 0, 0)] == PINNED_SEEDS
    seeds = [noise_seed(*key) for key in itertools.product(range(5), range(20), range(100))]
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == len(seeds)  # the CPU generator reads the low 32 bits
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_adjacent_seeds_give_unrelated_noise():
    zeros, size = torch.zeros(100, 100), 10_000
    noise = partial(neftune_noise, zeros, [100], ALPHA)
    here = noise([noise_seed(SEED, 3, 8)])
    for other in ((SEED + 1, 3, 8), (SEED, 4, 8), (SEED, 3, 9)):
        correlation = torch.corrcoef(torch.stack([here.flatten(), noise([noise_seed(*other)]).flatten()]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(size)


@pytest.mark.parametrize(
    ("shape", "lengths", "seeds", "message"),
    [
        ((2, 5, 4), [5], [1], r"embeddings have shape \(2, 5, 4\); expected \(1, T, D\) or \(T, D\)"),
        ((5,), [5], [1], r"embeddings have shape \(5,\)"),
        ((1, 5, 4), [2, 2], [1, 2], r"lengths \[2, 2\] sum to 4; .* the 5 tokens of the pack"),
        ((1, 5, 4), [5, 0], [1, 2], r"lengths \[5, 0\] .* expected positive lengths"),
        ((1, 5, 4), [2, 3], [1], "there are 1 seeds for 2 sequences"),
    ],
)
def test_wrong_arguments_are_errors(shape, lengths, seeds, message):
    with pytest.raises(ValueError, match=f"^neftune_noise: {message}"):
        neftune_noise(torch.zeros(shape), lengths, ALPHA, seeds)


@pytest.mark.parametrize("alpha", [0, -1.0, math.nan, math.inf])
def test_an_alpha_without_noise_is_an_error(alpha):
    with pytest.raises(ValueError, match=r"^neftune.alpha is .*above 0\. Remove neftune to train without noise"):
        NEFTune(alpha, SEED)


# --- a small model and lists ------------------------------------------------------------------------------------------


def expected(weight: torch.Tensor, batch: dict, num_batches: int) -> torch.Tensor:
    """Return the expected layer inputs of a microbatch in training."""
    seeds = [noise_seed(SEED, num_batches, key) for key in batch["record_keys"]]
    return neftune_noise(weight[batch["input_ids"]], batch["lengths"], ALPHA, seeds)


def plain(weight: torch.Tensor, batch: dict) -> torch.Tensor:
    return weight[batch["input_ids"]]


# --- event by event ---------------------------------------------------------------------------------------------------


class Loop:
    """Composer's state and engine with one microbatch of three lists, without a trainer."""

    def __init__(self, **options) -> None:
        self.model = new_model(**options)
        self.embedding = self.model.model.get_input_embeddings()
        self.weight = self.embedding.weight.detach().clone()
        (self.batch,) = split_batch({"sequences": new_lists(3)}, max_lists=3)
        self.state = State(
            self.model,
            rank_zero_seed=0,
            run_name="loop",
            device=DeviceCPU(),
            max_duration="9ba",
            algorithms=NEFTune(ALPHA, SEED),
        )
        self.state.set_dataloader([None], "train", dataloader_len=1)
        self.engine = Engine(self.state, Logger(self.state))

    def run(self, *events: Event) -> None:
        for event in events:
            self.state.batch = self.batch
            self.engine.run_event(event)

    def output(self) -> torch.Tensor:
        return self.embedding(self.batch["input_ids"])


def test_noise_is_active_from_before_forward_to_after_backward():
    loop = Loop()
    clean, noised = plain(loop.weight, loop.batch), expected(loop.weight, loop.batch, 0)
    assert not torch.equal(clean, noised)
    assert torch.equal(loop.output(), clean)  # not hooked yet
    loop.run(Event.INIT)
    assert torch.equal(loop.output(), clean)  # hooked, but outside a microbatch
    loop.run(Event.BEFORE_TRAIN_BATCH, Event.BEFORE_FORWARD)
    assert torch.equal(loop.output(), noised)
    loop.run(Event.AFTER_FORWARD, Event.BEFORE_LOSS, Event.AFTER_LOSS, Event.BEFORE_BACKWARD)
    assert torch.equal(loop.output(), noised)  # a recomputation in the backward pass
    loop.run(Event.AFTER_BACKWARD)
    assert torch.equal(loop.output(), clean)


def test_only_three_events_matter():
    algorithm, state = NEFTune(ALPHA, SEED), Loop().state
    matched = {event for event in Event if algorithm.match(event, state)}
    assert matched == {Event.INIT, Event.BEFORE_FORWARD, Event.AFTER_BACKWARD}


def test_evaluation_mode_and_no_grad_have_no_noise():
    loop = Loop()
    loop.run(Event.INIT, Event.BEFORE_FORWARD)
    clean = plain(loop.weight, loop.batch)
    with torch.no_grad():
        assert torch.equal(loop.output(), clean)
    loop.model.eval()
    assert torch.equal(loop.output(), clean)
    loop.model.train()
    assert not torch.equal(loop.output(), clean)


def test_noise_follows_the_batch_counter():
    loop = Loop()
    loop.run(Event.INIT)
    for num_batches in range(3):
        loop.run(Event.BEFORE_FORWARD)
        assert torch.equal(loop.output(), expected(loop.weight, loop.batch, num_batches))
        loop.run(Event.AFTER_BACKWARD)
        loop.state.timestamp = loop.state.timestamp.to_next_batch(samples=3)


def test_copies_and_state_dicts_have_no_noise():
    loop, untouched = Loop(), new_model()
    loop.run(Event.INIT, Event.BEFORE_FORWARD)
    assert not torch.equal(loop.output(), plain(loop.weight, loop.batch))
    states = loop.model.state_dict(), untouched.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for copied in (copy.deepcopy(loop.embedding), pickle.loads(pickle.dumps(loop.embedding))):
        assert copied.training
        assert torch.equal(copied(loop.batch["input_ids"]), plain(loop.weight, loop.batch))
    assert not NEFTune.required_on_load()
    assert loop.state.algorithms[0].state_dict() == {"repr": "NEFTune(alpha=5.0, seed=17)"}


def test_recomputed_embedding_has_the_same_noise():
    loop = Loop()
    loop.run(Event.INIT, Event.BEFORE_FORWARD)
    outputs = record_outputs(loop.model)

    def through_embedding(ids: torch.Tensor) -> torch.Tensor:
        return loop.embedding(ids).square()

    checkpoint(through_embedding, loop.batch["input_ids"], use_reentrant=False).sum().backward()
    assert len(outputs) == 2
    assert torch.equal(outputs[0], expected(loop.weight, loop.batch, 0))
    assert torch.equal(outputs[1], outputs[0])


@pytest.mark.parametrize("target_modules", [["q_proj"], ["q_proj", "embed_tokens"]], ids=["frozen", "adapted"])
def test_embedding_of_an_adapted_model_is_found(target_modules):
    lora = LoraConfig(r=2, target_modules=target_modules, task_type="CAUSAL_LM")
    loop = Loop(peft_config=lora)
    weight = dict(loop.model.named_parameters())
    (name,) = (name for name in weight if "embed_tokens" in name and "lora" not in name)
    loop.run(Event.INIT, Event.BEFORE_FORWARD)
    loop.model.train()
    # LoRA's second factor starts at zero, so an adapted embedding still returns the rows of its base.
    assert torch.equal(loop.output(), expected(weight[name].detach(), loop.batch, 0))
    loop.model.loss(loop.model(loop.batch), loop.batch)["total"].backward()


# --- under the Trainer ------------------------------------------------------------------------------------------------


def updated_weights(max_lists: int, noise: bool = True, **options) -> dict[str, torch.Tensor]:
    model = new_model(**options)
    trainer = new_trainer(model, data_spec(new_lists(8), 4, max_lists), "1ep", noise)
    trainer.fit()
    trainer.close()
    # Checkpointing wraps layers, but keeps the order of their weights.
    return dict(enumerate(parameter.detach() for parameter in model.parameters()))


def test_training_does_not_depend_on_the_split_or_on_recomputation():
    unsplit = updated_weights(4)
    torch.testing.assert_close(updated_weights(2), unsplit, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(updated_weights(1), unsplit, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(updated_weights(4, activation_checkpointing=1.0), unsplit, rtol=1e-4, atol=1e-6)
    without = updated_weights(4, noise=False)
    assert max((without[place] - unsplit[place]).abs().max() for place in unsplit) > 1e-2


def test_training_has_the_noise_of_the_formula_and_evaluation_none():
    model, lists = new_model(), new_lists(4)
    weight = model.model.get_input_embeddings().weight.detach().clone()
    evaluator = Evaluator(
        label="eval", dataloader=data_spec(lists, 4, 2), metric_names=[], device_eval_microbatch_size=4
    )
    trainer = new_trainer(model, data_spec(lists, 4, 2), "1ba", eval_dataloader=evaluator, eval_interval="1ba")
    outputs = record_outputs(model)
    trainer.eval()
    batches = split_batch({"sequences": lists}, max_lists=2)
    assert len(outputs) == len(batches) == 2
    for output, batch in zip(outputs, batches):
        assert torch.equal(output, plain(weight, batch))
    outputs.clear()
    trainer.fit()
    trained = model.model.get_input_embeddings().weight.detach()
    assert len(outputs) == 4
    for output, batch in zip(outputs, batches):  # training, from the weights before the update
        assert torch.equal(output, expected(weight, batch, 0))
    for output, batch in zip(outputs[2:], batches):  # evaluation within training, after it
        assert torch.equal(output, plain(trained, batch))
    trainer.close()


def test_training_resumed_mid_epoch_has_the_same_noise(tmp_path):
    lists = new_lists(12)
    straight = new_model()
    trainer = new_trainer(
        straight,
        data_spec(lists, 3, 2),
        "1ep",
        save_folder=str(tmp_path),
        save_interval="2ba",
        save_filename="ba{batch}",
    )
    outputs = record_outputs(straight)
    trainer.fit()
    trainer.close()
    resumed = new_model()
    trainer = new_trainer(resumed, data_spec(lists, 3, 2), "1ep", load_path=str(tmp_path / "ba2"))
    assert trainer.state.timestamp.batch == 2
    replayed = record_outputs(resumed)
    trainer.fit()
    trainer.close()
    assert len(outputs) == 8
    assert len(replayed) == 4
    assert all(torch.equal(one, other) for one, other in zip(outputs[4:], replayed))
    for one, other in zip(straight.parameters(), resumed.parameters()):
        assert torch.equal(one, other)


def test_a_checkpoint_loads_without_the_algorithm(tmp_path):
    lists = new_lists(4)
    trainer = new_trainer(new_model(), data_spec(lists, 4, 4), "1ba", save_folder=str(tmp_path), save_filename="end")
    trainer.fit()
    keys = list(trainer.state.state_dict()["model"])
    trainer.close()
    other = new_trainer(new_model(), data_spec(lists, 4, 4), "1ba", noise=False, load_path=str(tmp_path / "end"))
    assert other.state.algorithms == []
    assert list(other.state.state_dict()["model"]) == keys
    other.close()


# --- two ranks --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_sharded_ranks_have_the_noise_of_one(tmp_path):
    weights = {name: value.clone() for name, value in new_model().model.state_dict().items()}
    torch.save(weights, tmp_path / "initial.pt")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER)]
    run = subprocess.run([*launch, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    seen = [torch.load(tmp_path / f"rank_{rank}.pt") for rank in range(2)]
    lists = new_lists(8)
    for rank in range(2):
        for num_batches in range(2):
            rows = lists[rank::2][2 * num_batches : 2 * num_batches + 2]
            microbatches = split_batch({"sequences": rows}, max_lists=1)
            for microbatch, batch in enumerate(microbatches):
                output = seen[rank]["outputs"][2 * num_batches + microbatch]
                weight = (weights if num_batches == 0 else seen[rank]["after_one_batch"])["model.embed_tokens.weight"]
                assert torch.equal(output, expected(weight, batch, num_batches))
    # The same global batches in one process, as one microbatch each.
    model = new_model()
    trainer = new_trainer(model, data_spec(lists, 4, 4), "1ep")
    trainer.fit()
    trainer.close()
    alone = model.model.state_dict()
    assert set(seen[0]["final"]) == set(alone)
    for name, value in alone.items():
        torch.testing.assert_close(seen[0]["final"][name], value, rtol=1e-4, atol=1e-6)
