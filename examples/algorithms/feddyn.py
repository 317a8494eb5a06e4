"""FedDyn: every rank's loss is tilted anew in each round, so that the ranks' optima meet where the common one is.

Acar et al., "Federated Learning Based on Dynamic Regularization", 2021 (arXiv:2111.04263), Algorithm 1:

    python -m fedsplit run --ranks 4 --rounds 20 --workload examples.algorithms.feddyn:FedDyn \\
        --aggregate examples.algorithms.feddyn:merge --workload-option strength=0.1 \\
        --workload-option partition=dirichlet --workload-option alpha=0.1

``strength`` is the paper's alpha. The trainer keeps its gradient in its local state, the server h in its memory; only
the model travels, and the strength as a metric, so that both halves have the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from examples.algorithms.digits import Digits, snapshot
from fedsplit import AggregationContext, TrainResult, Update, WorkloadContext


class FedDyn(Digits):
    """The trainer's half; `gradient` is that of the rank's loss where it ended last."""

    def __init__(self, context: WorkloadContext) -> None:
        super().__init__(context, strength=0.1)
        self._gradient = {name: torch.zeros_like(w) for name, w in snapshot(self.model).items()}

    def train(self, task: Any) -> TrainResult:
        start, gradient, alpha = snapshot(self.model), self._gradient, self.options["strength"]
        steps = self.descend(task, self.model, lambda name, w: alpha * (w - start[name]) - gradient[name])
        end = snapshot(self.model)
        self._gradient = {name: gradient[name] - alpha * (end[name] - start[name]) for name in end}
        return self.result(steps, strength=alpha)

    def local_state(self) -> dict[str, Any]:
        return {**super().local_state(), "gradient": self._gradient}

    def load_local_state(self, state: dict[str, Any]) -> None:
        super().load_local_state(state)
        self._gradient = state["gradient"]


def merge(updates: Sequence[Update], context: AggregationContext) -> dict[str, torch.Tensor]:
    """The server's half: the mean of those who took part, minus h / alpha."""
    alpha = updates[0].metrics["strength"]
    h, merged = context.memory.setdefault("h", {}), {}
    for name, start in context.previous.items():
        moved = sum(update.state_dict[name] - start for update in updates)
        h[name] = h.get(name, torch.zeros_like(start)) - alpha * moved / context.num_ranks
        merged[name] = start + moved / len(updates) - h[name] / alpha
    return merged
