"""Does a model compute the same for a list in a pack as for the list alone? Tried on a tiny copy before training.

A pack is exact only if nothing but our attention mixes tokens. Layers that choose their own attention, recurrent and
convolution layers, attention arguments that ours lacks, and positions that depend on the longest list would train
wrong weights without a word; so every model is tried on short lists before the first step, on the CPU.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rankllm_composer.errors import ModelError, counted, first_line
from rankllm_composer.model.attention import OWN_ATTENTION, PACKED_SDPA, choose_attention, watch_attention
from rankllm_composer.model.forward import head_rows, list_logits, num_layers
from rankllm_composer.model.tiny_copy import tiny_config, tiny_model

LENGTHS = (11, 17, 24)
"""Tokens of the lists; some are below and some above `tiny_copy.SHORT`."""
TOLERANCE = 1e-3
"""Largest difference of two logits, as a fraction of their standard deviation, that rounding may cause."""


MAX_WEIGHTS = 1_000_000_000
"""Weights of a copy that keeps the widths of a model; a larger one is not tried."""
HEAD_TOKENS = torch.tensor([7, 50, 8])


@dataclass(frozen=True)
class Trial:
    """Outcome of trying a tiny copy of a model; a problem is a reason, None = there is none.

    Attributes:
        problem: why it cannot be trained.
        head_problem: why logits cannot be computed for a few tokens only, as the objective `ranking` does.
        attention: the attention that was tried.
    """

    problem: str | None
    head_problem: str | None
    attention: str


class _UnfitError(Exception):
    """The reason why a model is refused."""


def check_model(
    config: PretrainedConfig,
    *,
    packing: bool = True,
    ranking_alone: bool = False,
    max_length_tokens: int,
    trust_remote_code: bool = False,
) -> str:
    """Check, before a model is loaded, that it can be trained exactly.

    Args:
        packing: whether several lists share a forward pass.
        ranking_alone: whether the objective is `ranking`.
        max_length_tokens: tokens of the longest list.
        trust_remote_code: whether the code that comes with the model may run.
    Returns:
        The attention that was found exact: packed_sdpa, or without packing the model's own.
    Raises:
        ModelError: it cannot; the message gives the reason, and the way out where there is one.
    """
    keyed, name = _Keyed(config), f"model.name_or_path: {config._name_or_path or 'the model'} ({config.model_type})"
    trial = (_try_packed if packing else _try_alone)(keyed, max_length_tokens, trust_remote_code)
    if packing and trial.problem is not None:
        alone = _try_alone(keyed, max_length_tokens, trust_remote_code)
        if alone.problem is None:
            raise ModelError(
                f"{name} cannot be trained with several lists in one forward pass: {trial.problem}. Set "
                "batch.packing=false to train one list per forward pass."
            )
        trial = alone
    if trial.problem is not None:
        raise ModelError(f"{name} cannot be trained: {trial.problem}. Use another model.")
    if ranking_alone and trial.head_problem is not None:
        raise ModelError(
            f"{name} cannot be trained by ranking alone: {trial.head_problem}. Set objective.name=combined."
        )
    return trial.attention


def attention_for_inference(config: PretrainedConfig, longest: int, packed: str, cached: bool) -> str:
    """The attention under which a loaded model is exact.

    Args:
        longest: tokens of the longest prompt.
        packed: attention over packs, which is returned if the model can be packed.
        cached: whether it is for padded prompts with a key-value cache instead of packs.
    """
    keyed, limit = _Keyed(config), 1 << max(0, longest - 1).bit_length()  # few limits, as each takes a trial
    if not cached and _try_packed(keyed, limit, False).problem is None:
        return packed
    alone = _try_alone(keyed, limit, False)
    return alone.attention if alone.problem is None else "sdpa"


class _Keyed:
    """A configuration that equals every other one with the same values."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.key = json.dumps(config.to_dict(), default=str, sort_keys=True)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keyed) and self.key == other.key


@functools.lru_cache(maxsize=64)
def _try_packed(keyed: _Keyed, max_length_tokens: int, trust_remote_code: bool) -> Trial:
    choose_attention("auto", "cpu")  # registers packed_sdpa
    return _trial(_reference(keyed, max_length_tokens, trust_remote_code), PACKED_SDPA, trust_remote_code)


@functools.lru_cache(maxsize=64)
def _try_alone(keyed: _Keyed, max_length_tokens: int, trust_remote_code: bool) -> Trial:
    reference = _reference(keyed, max_length_tokens, trust_remote_code)
    for attention in OWN_ATTENTION:
        trial = _trial(reference, attention, trust_remote_code)
        if trial.problem is None:
            break
    return trial


@dataclass(frozen=True)
class _Reference:
    """A tiny configuration with the logits (L, V) of each list alone in plain attention, or why there are none."""

    config: PretrainedConfig
    logits: Sequence[torch.Tensor]
    problem: str | None = None


def _trial(reference: _Reference, attention: str, trust_remote_code: bool) -> Trial:
    if reference.problem is not None:
        return Trial(reference.problem, None, attention)
    try:
        with torch.no_grad():
            return Trial(None, _try(reference.config, reference.logits, attention, trust_remote_code), attention)
    except _UnfitError as reason:
        return Trial(str(reason), None, attention)


@functools.lru_cache(maxsize=4)
def _reference(keyed: _Keyed, max_length_tokens: int, trust_remote_code: bool) -> _Reference:
    try:
        with torch.no_grad():
            return _Reference(*_plain(keyed.config, max_length_tokens, trust_remote_code))
    except _UnfitError as reason:
        return _Reference(keyed.config, (), str(reason))


def _lists() -> list[torch.Tensor]:
    """Token ids (L,) of each list."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 90, (length,), generator=generator) for length in LENGTHS]


def _plain(
    config: PretrainedConfig, max_length_tokens: int, trust_remote_code: bool
) -> tuple[PretrainedConfig, list[torch.Tensor]]:
    """A tiny configuration, and the logits (L, V) of each list alone in the model's plainest attention."""
    if config.is_encoder_decoder:
        raise _UnfitError("it is an encoder with a decoder; expected a decoder-only model")
    failure = ""
    for narrow in (True, False):
        tiny = tiny_config(config, max_length_tokens, narrow=narrow)
        try:
            if narrow or _num_weights(tiny, trust_remote_code) <= MAX_WEIGHTS:
                return tiny, _plain_logits(tiny_model(tiny, "eager", trust_remote_code))
        except _UnfitError:
            raise
        except Exception as error:  # whatever the code of a model raises
            failure = failure or f"{type(error).__name__}: {first_line(error)}"
    try:
        _plain_logits(tiny_model(tiny_config(config, 0), "eager", trust_remote_code))
    except Exception:
        raise _UnfitError(f"a small copy of it does not run on token ids alone ({failure})") from None
    raise _UnfitError(
        f"it has positions for fewer than data.max_length_tokens={max_length_tokens} tokens ({failure}); lower "
        "data.max_length_tokens, or"
    )


def _num_weights(config: PretrainedConfig, trust_remote_code: bool) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return sum(weight.numel() for weight in model.parameters())


def _plain_logits(model: PreTrainedModel) -> list[torch.Tensor]:
    """Logits (L, V) of each list alone.

    Raises:
        _UnfitError: they depend on later tokens, or on lists of earlier forward passes.
    """
    lists = _lists()
    expected = [model(input_ids=tokens[None]).logits[0] for tokens in lists]
    if any(len(logits) != len(tokens) or not logits.isfinite().all() for logits, tokens in zip(expected, lists)):
        raise _UnfitError("it does not return finite logits for every token")
    for tokens, logits in zip(reversed(lists), reversed(expected)):
        if _differ(model(input_ids=tokens[None]).logits[0], logits):
            raise _UnfitError(
                "its logits depend on the lists of earlier forward passes, as with dynamic RoPE beyond "
                "max_position_embeddings; lower data.max_length_tokens, or"
            )
    changed = lists[1].clone()
    changed[LENGTHS[0] :] = 3
    if _differ(model(input_ids=changed[None]).logits[0, : LENGTHS[0]], expected[1][: LENGTHS[0]]):
        raise _UnfitError("its tokens see the tokens after them; expected a causal language model")
    return expected


def _try(
    tiny: PretrainedConfig, expected: Sequence[torch.Tensor], attention: str, trust_remote_code: bool
) -> str | None:
    """Compare every second row of logits with those expected, lists packed or alone as the attention allows.

    Returns:
        The problem with logits of a few tokens only; None = there is none.
    Raises:
        _UnfitError: the logits differ, or cannot be computed.
    """
    packs = attention == PACKED_SDPA
    try:
        model = tiny_model(tiny, attention, trust_remote_code)
    except KeyError as error:
        raise _UnfitError(
            f"its layers choose an attention class of their own when they are built, and have none for {error}"
        ) from error
    except Exception as error:
        raise _UnfitError(f"{type(error).__name__}: {first_line(error)}") from error
    lists = _lists()
    groups = [list(range(len(lists)))] if packs else [[number] for number in range(len(lists))]
    try:
        with watch_attention() as calls:
            logits = [_rows(model, [lists[number] for number in group]) for group in groups]
    except Exception as error:  # of our attention, or whatever the code of a model raises
        ours = first_line(error).partition(". ")[0].rstrip(".")
        raise _UnfitError(ours if PACKED_SDPA in ours else "its forward pass does not take packed lists") from error
    if packs and calls.number != num_layers(model.config):
        called = counted(calls.number, "time")
        raise _UnfitError(f"packed attention is called {called} in a copy with {num_layers(model.config)} layers")
    wanted = [torch.cat([expected[number] for number in group])[1::2] for group in groups]
    if any(_differ(got, right) for got, right in zip(logits, wanted)):
        scaled = getattr(tiny, "rope_scaling", None) is not None
        reason = "; under its rope_scaling they depend on the longest list" if scaled else ""
        raise _UnfitError(f"its logits are not those of each list alone under plain attention{reason}")
    _try_training(model, [[lists[number] for number in group] for group in groups])
    try:
        with head_rows(model, HEAD_TOKENS):
            logits = [_rows(model, [lists[number] for number in group]) for group in groups]
    except Exception as error:
        return f"its output layer is not linear ({first_line(error)})"
    if any(_differ(got, right[:, HEAD_TOKENS]) for got, right in zip(logits, wanted)):
        return "its output layer is not linear"
    return None


def _try_training(model: PreTrainedModel, groups: Sequence[Sequence[torch.Tensor]]) -> None:
    """Compute gradients of two forward passes, in training mode, for what only training has."""
    model.train()
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            for lists in (*groups, *groups)[:2]:
                _rows(model, lists).sum().backward()
    except Exception as error:
        ours = first_line(error).partition(". ")[0].rstrip(".")
        if PACKED_SDPA not in ours:
            raise _UnfitError(
                f"the gradients of two lists one after the other fail ({type(error).__name__})"
            ) from error
        values = vars(model.config.get_text_config()).items()
        rates = [f"{name}={value}" for name, value in values if "drop" in name and isinstance(value, float) and value]
        raise _UnfitError(f"{ours} ({', '.join(rates)})") from error
    finally:
        model.eval()


def _rows(model: PreTrainedModel, lists: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logits at every second position of lists packed end to end."""
    lengths = [len(tokens) for tokens in lists]
    return list_logits(
        model,
        torch.cat(list(lists))[None],
        torch.cat([torch.arange(length) for length in lengths])[None],
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        torch.arange(1, sum(lengths), 2),
        max(lengths),
    )


def _differ(logits: torch.Tensor, expected: Any) -> bool:
    if logits.shape != expected.shape:
        return True
    return not bool((logits - expected).abs().max() <= TOLERANCE * expected.std())
