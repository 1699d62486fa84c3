"""Names and options of the ranking losses, readable without torch.

`losses.py` holds a function `NAME_loss` for each of them and checks at import that both modules agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

RANKING_LOSSES: dict[str, dict[str, tuple[Any, ...] | type]] = {
    "ranknet": {"weighted": bool},
    "lambdarank": {"target": ("ranks", "self_sorted"), "detach_target": bool},
    "listnet": {"target": ("ranks", "self_sorted"), "detach_target": bool},
    "listmle": {},
    "adr_mse": {},
}
"""Name in a recipe → options of the loss, each with its type or the values it may have."""

if TYPE_CHECKING:
    RankingLoss: TypeAlias = str
else:
    RankingLoss = Literal[tuple(RANKING_LOSSES)]
