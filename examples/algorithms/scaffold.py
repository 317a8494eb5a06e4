"""SCAFFOLD: every rank corrects its steps by how its gradient differs from everybody's, so that none drifts away.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", 2020 (arXiv:1910.06378),
Algorithm 1 with option II:

    python -m fedsplit run --ranks 4 --rounds 20 --workload examples.algorithms.scaffold:Scaffold \\
        --aggregate "examples.algorithms.scaffold:merge(server_lr=1.0)" \\
        --workload-option partition=dirichlet --workload-option alpha=0.1

The trainer keeps c_i in its local state, the server has c among the extra tensors; both are 0 at first. Up travel the
model and c_i's change, down the model and c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from examples.algorithms.digits import Digits, snapshot
from fedsplit import AggregationContext, TrainResult, Update, WorkloadContext

CONTROL = "control:"


class Scaffold(Digits):
    """The trainer's half; `own` is c_i."""

    def __init__(self, context: WorkloadContext) -> None:
        super().__init__(context)
        self._own = {name: torch.zeros_like(w) for name, w in snapshot(self.model).items()}

    def train(self, task: Any) -> TrainResult:
        x, own = snapshot(self.model), self._own
        c = {name: task.extra.get(CONTROL + name, torch.zeros_like(w)) for name, w in x.items()}
        steps = self.descend(task, self.model, lambda name, y: c[name] - own[name])
        scale = 1 / (max(1, steps) * self.options["lr"])
        self._own = {name: own[name] - c[name] + scale * (x[name] - y) for name, y in snapshot(self.model).items()}
        return self.result(steps, extra={CONTROL + name: self._own[name] - own[name] for name in own})

    def local_state(self) -> dict[str, Any]:
        return {**super().local_state(), "own": self._own}

    def load_local_state(self, state: dict[str, Any]) -> None:
        super().load_local_state(state)
        self._own = state["own"]


def merge(updates: Sequence[Update], context: AggregationContext, *, server_lr: float = 1.0) -> dict[str, torch.Tensor]:
    """The server's half: x moves by the mean change of those who took part, c by their share of all ranks' mean."""
    merged = {}
    for name, x in context.previous.items():
        moved = sum(update.state_dict[name] - x for update in updates) / len(updates)
        merged[name] = x + server_lr * moved
        change = sum(update.extra[CONTROL + name] for update in updates) / context.num_ranks
        context.extra[CONTROL + name] = context.extra.get(CONTROL + name, torch.zeros_like(x)) + change
    return merged
