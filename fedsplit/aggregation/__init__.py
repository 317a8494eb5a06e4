"""How the clients' states become the next global state: the rules, and which part of the model gets which.

Names are loaded when they are first used, so that reading the flags (`fedsplit.aggregation.spec`) does not
import torch::

    specs = parse_rules(["head.*=local", "body.*=median", "fedavg"])
    split = Split.resolve(specs, state)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsplit.aggregation.averaging import fedavg as fedavg
    from fedsplit.aggregation.averaging import frozen as frozen
    from fedsplit.aggregation.averaging import maximum_of_all as maximum_of_all
    from fedsplit.aggregation.base import AggregationContext as AggregationContext
    from fedsplit.aggregation.base import Update as Update
    from fedsplit.aggregation.loading import check_rules as check_rules
    from fedsplit.aggregation.privacy import privacy_spent as privacy_spent
    from fedsplit.aggregation.robust import geometric_median as geometric_median
    from fedsplit.aggregation.robust import krum as krum
    from fedsplit.aggregation.robust import median as median
    from fedsplit.aggregation.robust import multi_krum as multi_krum
    from fedsplit.aggregation.robust import trimmed_mean as trimmed_mean
    from fedsplit.aggregation.spec import RuleSpec as RuleSpec
    from fedsplit.aggregation.spec import parse_rules as parse_rules
    from fedsplit.aggregation.split import RoundMerger as RoundMerger
    from fedsplit.aggregation.split import Split as Split
    from fedsplit.aggregation.validation import check_update as check_update
    from fedsplit.states.state_dict import StateDict as StateDict

_HOMES = {
    "AggregationContext": "base",
    "RoundMerger": "split",
    "RuleSpec": "spec",
    "Split": "split",
    "StateDict": "base",
    "Update": "base",
    "check_rules": "loading",
    "check_update": "validation",
    "fedavg": "averaging",
    "frozen": "averaging",
    "geometric_median": "robust",
    "krum": "robust",
    "maximum_of_all": "averaging",
    "median": "robust",
    "multi_krum": "robust",
    "parse_rules": "spec",
    "privacy_spent": "privacy",
    "trimmed_mean": "robust",
}

__all__ = [
    "AggregationContext",
    "RoundMerger",
    "RuleSpec",
    "Split",
    "StateDict",
    "Update",
    "check_rules",
    "check_update",
    "fedavg",
    "frozen",
    "geometric_median",
    "krum",
    "maximum_of_all",
    "median",
    "multi_krum",
    "parse_rules",
    "privacy_spent",
    "trimmed_mean",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
