"""How the clients' states become the next global state: the rules, and which part of the model gets which.

Names are loaded when they are first used: reading the flags (`fedsplit.aggregation.spec`) does not import torch::

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
    name: module
    for module, names in {
        "averaging": ("fedavg", "frozen", "maximum_of_all"),
        "base": ("AggregationContext", "StateDict", "Update"),
        "loading": ("check_rules",),
        "privacy": ("privacy_spent",),
        "robust": ("geometric_median", "krum", "median", "multi_krum", "trimmed_mean"),
        "spec": ("RuleSpec", "parse_rules"),
        "split": ("RoundMerger", "Split"),
        "validation": ("check_update",),
    }.items()
    for name in names
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
