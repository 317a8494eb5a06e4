"""How the clients' states become the next global state: the rules, and which part of the model gets which.

Names are loaded when they are first used: reading the flags (`fedsplit.aggregation.spec`) does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsplit.aggregation.base import AggregationContext, Update
    from fedsplit.aggregation.privacy import privacy_spent
    from fedsplit.aggregation.rules import fedavg, frozen, geometric_median, krum, median, multi_krum, trimmed_mean
    from fedsplit.aggregation.spec import parse_rules
    from fedsplit.aggregation.split import Split
    from fedsplit.aggregation.validation import check_update
    from fedsplit.states.state_dict import StateDict

__all__ = [
    "AggregationContext", "Split", "StateDict", "Update", "check_update", "fedavg", "frozen", "geometric_median",
    "krum", "median", "multi_krum", "parse_rules", "privacy_spent", "trimmed_mean",
]  # fmt: skip

_HOMES = {
    **dict.fromkeys(__all__, "rules"),
    **dict.fromkeys(("AggregationContext", "StateDict", "Update"), "base"),
    "parse_rules": "spec", "Split": "split", "check_update": "validation", "privacy_spent": "privacy",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
