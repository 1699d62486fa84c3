"""Names and options of the ranking losses, readable without torch.

`losses.py` holds a function `NAME_loss` for each of them and checks at import that both modules agree.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field, WrapValidator

from rankllm_composer.errors import ModelError, first_line

OWN_LOSS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

RANKING_LOSSES: dict[str, dict[str, tuple[Any, ...] | type]] = {
    "ranknet": {"weighted": bool},
    "lambdarank": {"target": ("ranks", "self_sorted"), "detach_target": bool},
    "listnet": {"target": ("ranks", "self_sorted"), "detach_target": bool},
    "listmle": {},
    "adr_mse": {},
    "kl_divergence": {"temperature": float},
    "margin_mse": {},
    "ndcg_loss2pp": {"mu": float},
    "approx_ndcg": {"temperature": float},
    "p_listmle": {},
    "info_nce": {"temperature": float},
}
"""Name in a recipe → options of the loss, each with its type or the values it may have; numbers are above 0."""

RELEVANCE = ("grades", "teacher_scores")
"""What may be known of the candidates beside their ranks: arguments of the losses that use it, (B, N), NaN = none."""

NEED_SCORES = ("kl_divergence", "margin_mse")
"""Losses that need a teacher's scores."""

WEIGHTS = {
    "ranknet": 10.0,
    "lambdarank": 15.0,
    "listnet": 0.25,
    "listmle": 0.03,
    "adr_mse": 0.04,
    "kl_divergence": 0.35,
    "margin_mse": 0.1,
    "ndcg_loss2pp": 1.5,
    "approx_ndcg": 1.5,
    "p_listmle": 0.2,
    "info_nce": 0.1,
}
"""Weights with which all losses have the gradient of weighted RankNet's, 10 (benchmarks/loss_scales.py)."""

_WEIGHT_OF_PLAIN_RANKNET = 0.75


def default_weight(loss: str, options: Mapping[str, Any]) -> float:
    """Weight of a ranking loss beside language modeling; 1 for one without a default."""
    if loss == "ranknet" and options.get("weighted") is False:
        return _WEIGHT_OF_PLAIN_RANKNET
    return WEIGHTS.get(loss, 1.0)


def import_loss(name: str, options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """Import a ranking loss of the user's own.

    Args:
        name: `package.module:function`.
        options: arguments that it has to take beside those of every loss; None = not checked.
    Raises:
        ModelError: there is no such function, or it cannot be called so.
    """
    module, _, function = name.partition(":")
    where = f"objective.ranking_loss is {name!r}"
    if not function:
        expected = f"one of {', '.join(RANKING_LOSSES)}, or package.module:function"
        raise ModelError(f"{where}; expected {expected}. Correct it.")
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except Exception as error:  # a module of the user's own may raise anything
        remedy = "Install its package, or name its folder in PYTHONPATH."
        if not isinstance(error, ImportError | AttributeError):
            remedy = f"Correct {module}."
        raise ModelError(f"{where}, which cannot be imported: {first_line(error)}. {remedy}") from error
    if not callable(found):
        raise ModelError(f"{where}; expected a function. Name one of {module}.")
    if options is not None:
        try:
            signature = inspect.signature(found)
            known = dict.fromkeys([name for name in RELEVANCE if name in signature.parameters])
            signature.bind(None, None, mask=None, reduction="none", **known, **options)
        except TypeError as error:
            given = ", ".join(["scores", "ranks", "mask=", "reduction=", *(f"{option}=" for option in options)])
            raise ModelError(
                f"{where}, which cannot be called with ({given}): {error}. Correct the function, or "
                "objective.ranking_loss_options."
            ) from error
    return found


def _accept_own(value: Any, check: Callable[[Any], Any]) -> Any:
    """Accept a name of the table, or a function of the user's own as `package.module:function`."""
    return value if isinstance(value, str) and OWN_LOSS.fullmatch(value) else check(value)


if TYPE_CHECKING:
    RankingLoss: TypeAlias = str
else:
    RankingLoss = Annotated[
        Literal[tuple(RANKING_LOSSES)],
        WrapValidator(
            _accept_own,
            json_schema_input_type=Literal[tuple(RANKING_LOSSES)]
            | Annotated[str, Field(pattern=f"^{OWN_LOSS.pattern}$")],
        ),
    ]
