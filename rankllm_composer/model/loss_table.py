"""Names and options of the ranking losses, readable without torch.

`losses.py` holds a function `NAME_loss` for each of them and checks at import that both modules agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field, WrapValidator

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
