"""Federated learning on Flower in which the training process is free.

``fedsplit.Trainer`` is what a training script uses, ``fedsplit.Strategy`` what a Flower server of one's own runs.
``server_main.py``, ``client_main.py`` and ``model_main.py`` are the programs. Importing this package loads neither
torch nor Flower: each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsplit.aggregation.base import AggregationContext, Update
    from fedsplit.errors import FedSplitError
    from fedsplit.server.strategy import Strategy
    from fedsplit.trainer.keep import keep
    from fedsplit.trainer.progress import Progress
    from fedsplit.trainer.task import Task
    from fedsplit.trainer.trainer import Trainer
    from fedsplit.workloads import EvaluateResult, TrainResult, WorkloadContext

__all__ = [
    "AggregationContext", "EvaluateResult", "FedSplitError", "Progress", "Strategy", "Task", "TrainResult", "Trainer",
    "Update", "WorkloadContext", "keep",
]  # fmt: skip

_HOMES = {
    "AggregationContext": "aggregation.base", "Update": "aggregation.base", "FedSplitError": "errors",
    "Strategy": "server.strategy", "Progress": "trainer.progress", "Task": "trainer.task",
    "Trainer": "trainer.trainer", "EvaluateResult": "workloads", "TrainResult": "workloads",
    "WorkloadContext": "workloads", "keep": "trainer.keep",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedsplit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
