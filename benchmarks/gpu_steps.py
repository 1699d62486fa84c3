"""Cases of `gpu.py` within one process: attention, the packed step in bfloat16, host waits, and compiled layers."""

from __future__ import annotations

import contextlib
import functools
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import steps
import torch
import torch._dynamo.utils
from gpu_cases import Case, Setting, free_memory, relative_error, seconds_per_call, synchronize
from steps import microbatch, new_stepper
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from workload import SHAPES, list_lengths, new_lists, new_model

from rankllm_composer.model import attention as packed_attention
from rankllm_composer.model.objective import Objective
from rankllm_composer.model.reranker import ListwiseReranker

FORWARD_LIMIT, GRADIENT_LIMIT = 0.01, 0.02
"""Largest relative errors of attention in bfloat16. Rounding alone gives about a third of them; a key too many or too
few in a window of 512 gives 0.04."""

ROUNDING_LIMIT = 1.5
"""Largest error of the packed step, as a multiple of the error that bfloat16 gives each list alone."""

# name: query heads, key-value heads, size of a head, window
LAYOUTS: dict[str, tuple[int, int, int, int | None]] = {
    "heads of Mistral-7B": (32, 8, 128, None),
    "heads of Llama-3.2-1B": (32, 8, 64, None),
    "heads of SmolLM2-135M": (9, 3, 64, None),
    "window of 512": (32, 8, 128, 512),
}


def attentions(device: str) -> list[str]:
    """Return the values of `model.attention` that this machine can run."""
    found = []
    for name in packed_attention.ATTENTION_NAMES:
        with contextlib.suppress(ValueError):
            found.append(packed_attention.choose_attention(name, steps.recipe_device(device)))
    return list(dict.fromkeys(found))


# --- attention ---


def attention_cases(setting: Setting) -> Iterator[Case]:
    """Each attention against float64, forward and gradients, over lists of very different lengths."""
    lengths = [40, 1, 70, 13] if setting.reduced else [1500, 1, 2311, 284]
    for name in attentions(setting.device):
        for layout, sizes in LAYOUTS.items():
            if setting.reduced:
                sizes = (*sizes[:3], sizes[3] and 16)
            yield Case(
                f"{name}, {layout}", functools.partial(attention_errors, setting.device, name, lengths, sizes), 10
            )


def attention_errors(
    device: str, name: str, lengths: list[int], sizes: tuple[int, int, int, int | None]
) -> dict[str, Any]:
    """Return the relative errors of an attention in bfloat16; raises ValueError above the limits."""
    heads, key_value_heads, head_dim, window = sizes
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1, count, sum(lengths), head_dim) for count in (heads, key_value_heads, key_value_heads)]
    inputs = [torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for shape in shapes]
    weights = torch.randn((1, sum(lengths), heads, head_dim), generator=generator, device=device, dtype=torch.bfloat16)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    module = torch.nn.Module()
    module.is_causal, module.layer_idx = True, 0  # type: ignore[assignment]
    module.config = SimpleNamespace(_attn_implementation=name)  # type: ignore[assignment]

    def packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        arguments = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        longest = {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        options = {"dropout": 0.0, "scaling": head_dim**-0.5, "sliding_window": window}
        return AttentionInterface()[name](module, query, key, value, None, **options, **arguments, **longest)[0]

    def gradients(function: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        output = function(*tensors)
        (output * weights.to(output.dtype)).sum().backward()
        return [output.detach(), *(tensor.grad for tensor in tensors)]

    found = gradients(packed, inputs)
    exact = functools.partial(attention_in_float64, lengths=lengths, window=window)
    expected = gradients(exact, [tensor.double() for tensor in inputs])
    names = ("output", "query gradient", "key gradient", "value gradient")
    errors = {name: relative_error(*pair) for name, pair in zip(names, zip(found, expected))}
    for number, (part, error) in enumerate(errors.items()):
        if not error <= (GRADIENT_LIMIT if number else FORWARD_LIMIT):
            raise ValueError(f"the relative error of the {part} is {error:.3g}; all errors: {errors}")
    return errors


def attention_in_float64(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, lengths: list[int], window: int | None
) -> torch.Tensor:
    """Causal attention within each list, by its definition; (1, H, T, d) → (1, T, H, d)."""
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for q, k, v in zip(*(tensor[0].split(lengths, dim=1) for tensor in (query, key, value))):
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        place = torch.arange(q.shape[1], device=q.device)
        distance = place[:, None] - place
        hidden = (distance < 0) | (distance >= (window or len(place)))
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v)
    return torch.cat(outputs, 1).transpose(0, 1)[None]


# --- the packed step ---


def step_cases(setting: Setting) -> Iterator[Case]:
    """The packed step in bfloat16: lists are independent, and its error is that of each list alone."""
    for name in attentions(setting.device):
        for objective in ("combined", "ranking"):
            yield Case(f"{name}, {objective}", functools.partial(step_errors, setting, name, objective), 12)


def new_reranker(model: Any, attention: str, objective: str) -> ListwiseReranker:
    device = steps.recipe_device(model.device)
    return ListwiseReranker(model, None, Objective(objective), attention=attention, device=device)


def step_errors(setting: Setting, attention: str, objective: str) -> dict[str, Any]:
    """Compare a pack with each list alone in float32; raises ValueError if lists or gradients do not agree."""
    device, shape = setting.device, "toy" if setting.reduced else "smollm2-4-layers"
    lists = new_lists([110, 90, 130] if setting.reduced else [900, 1400, 700], shape)
    model = new_model(shape, device)

    def gradients(attention: str, *, packed: bool, bf16: bool) -> torch.Tensor:
        reranker = new_reranker(model, attention, objective)
        reranker.zero_grad()
        packs = [lists] if packed else [[item] for item in lists]
        for pack in packs:
            batch = microbatch(pack, device)
            # Alone, each list has as many target tokens and lists as any other, so that means of means are equal.
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                loss = reranker.loss(reranker(batch), batch)["total"] / len(packs)
            loss.backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        exact = gradients(packed_attention.PACKED_SDPA, packed=False, bf16=False)
        alone = relative_error(gradients(packed_attention.PACKED_SDPA, packed=False, bf16=True), exact)
        packed = relative_error(gradients(attention, packed=True, bf16=True), exact)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    moved = change_of_other_lists(new_reranker(model, attention, objective), lists, device)
    if not packed <= ROUNDING_LIMIT * alone + 1e-4:
        raise ValueError(f"the relative error of the gradient is {packed:.3g} packed and {alone:.3g} alone")
    if moved != 0.0:
        raise ValueError(f"the logits of other lists changed by {moved:.3g} with the tokens of one list")
    return {"gradient error, packed": packed, "each alone": alone, "change of other lists": moved}


def change_of_other_lists(reranker: ListwiseReranker, lists: list[Any], device: str) -> float:
    """Return the largest change of the other lists' logits after all tokens of the second list change."""
    batch = microbatch(lists, device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        before = reranker(dict(batch))["logits"]
        tokens = batch["input_ids"].clone()
        start, stop = batch["cu_seqlens"][1:3].tolist()
        tokens[0, start:stop] = (tokens[0, start:stop] + 1) % reranker.config.vocab_size
        after = reranker({**batch, "input_ids": tokens})["logits"]
    positions = batch["logit_positions"]
    others = (positions < start) | (positions >= stop)
    return float((after[others].float() - before[others].float()).abs().max())


# --- host waits ---


def waits_cases(setting: Setting) -> Iterator[Case]:
    """How often the host waits for the device in one step: forward, backward and update."""
    for name in attentions(setting.device):
        for objective in ("combined", "ranking"):
            yield Case(f"{name}, {objective}", functools.partial(waits_of_step, setting, name, objective), 8)


def waits_of_step(setting: Setting, attention: str, objective: str) -> dict[str, Any]:
    """Count the waits of one step of a small model, by the line that causes them."""
    lists = new_lists([110, 90, 130], "toy")
    stepper = new_stepper("packed", new_model("toy", setting.device), attention=attention, bf16=True)
    stepper.model.objective = Objective(objective)  # type: ignore[assignment]
    for _ in range(2):
        stepper.run(lists)
    with counted_waits(setting.device) as places:
        stepper.run(lists)
    layers = SHAPES["toy"][1]["num_hidden_layers"]
    return {"waits per step": sum(places.values()), "layers": layers, "where": dict(places)}


@contextlib.contextmanager
def counted_waits(device: str) -> Iterator[Counter[str]]:
    """Count operations for which the host waits: as CUDA reports them; on a CPU those that would wait on CUDA."""
    places: Counter[str] = Counter()
    if device != "cuda":
        with _Reads(places), _DataDependent(places):
            yield places
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            places[f"{Path(warning.filename).name}:{warning.lineno}"] += 1


def _place() -> str:
    """Return the innermost line outside of torch and of this file."""
    skipped = (str(Path(torch.__file__).parent), __file__)
    frame = next(frame for frame in reversed(traceback.extract_stack()) if not frame.filename.startswith(skipped))
    return f"{Path(frame.filename).name}:{frame.lineno}"


class _DataDependent(TorchDispatchMode):
    """Count operations whose result, or its size, the host reads."""

    names = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal", "repeat_interleave")

    def __init__(self, places: Counter[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            mask is not None and mask.dtype == torch.bool for mask in args[1]
        )
        if name in self.names or by_mask:
            self.places[_place()] += 1
        return operation(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    """Count reads of whole tensors, which are no operations on a CPU."""

    def __init__(self, places: Counter[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in ("tolist", "numpy", "cpu"):
            self.places[_place()] += 1
        return function(*args, **(kwargs or {}))


# --- compiled layers ---


def compile_cases(setting: Setting) -> Iterator[Case]:
    """Compiled layers against layers that are not compiled, on lists whose lengths change from step to step."""
    names = attentions(setting.device)
    for name in names[:1] if setting.reduced else names:
        yield Case(name, functools.partial(compiled_against_plain, setting, name), 45)


def compiled_against_plain(setting: Setting, attention: str) -> dict[str, Any]:
    """Return graph breaks, the seconds to compile, and the speed without and with compiled layers."""
    shape, num_lists = ("toy", 2) if setting.reduced else ("mistral-7b-6-layers", 4)
    batches = [new_lists(list_lengths(num_lists, seed), shape) for seed in range(3)]
    if setting.reduced:
        batches = [new_lists([110 + 20 * seed, 90], shape) for seed in range(3)]
    tokens = sum(len(item.encoded.input_ids) for lists in batches for item in lists)
    rates, found = [], {}
    counters = torch._dynamo.utils.counters
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        with contextlib.ExitStack() as stack:
            if setting.reduced:  # traces, but needs no C++ compiler
                eager = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
                stack.enter_context(mock.patch.object(torch.nn.Module, "compile", eager))
            model = new_model(shape, setting.device)
            options = {"activation_checkpointing": 1.0, "attention": attention, "bf16": True}
            stepper = new_stepper("packed", model, compile_layers=compiled, **options)
        started = time.perf_counter()
        for lists in batches:
            stepper.run(lists)
        synchronize(setting.device)
        found = {
            "graphs": counters["stats"].get("unique_graphs", 0),
            "graph breaks": sum(counters["graph_break"].values()),
            "first 3 steps, s": time.perf_counter() - started,
        }

        def all_batches(stepper: Any = stepper) -> None:
            for lists in batches:
                stepper.run(lists)

        rates.append(tokens / seconds_per_call(setting.device, all_batches, 2, warm_up=1))
        del stepper, model, all_batches
        free_memory(setting.device)
    torch._dynamo.reset()
    return {**found, "tokens/s": rates[0], "tokens/s, compiled": rates[1], "speed-up": rates[1] / rates[0]}
