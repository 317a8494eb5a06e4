"""Ditto: every rank also has a model of its own, which learns from its own digits and stays near the global one.

Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", 2021 (arXiv:2012.04221), Algorithm 1:

    python -m fedsplit run --ranks 4 --rounds 20 --workload examples.algorithms.ditto:Ditto \\
        --workload-option lambda=0.1 --workload-option partition=dirichlet --workload-option alpha=0.1

The personal model is in the local state and never travels. The server's half is FedAvg; any robust rule will do, as
``--aggregate median``. `accuracy` is the global model's, `own_accuracy` the personal one's.
"""

from __future__ import annotations

import copy
from typing import Any

from examples.algorithms.digits import Digits, snapshot
from fedsplit import TrainResult, WorkloadContext


class Ditto(Digits):
    """The trainer's half."""

    def __init__(self, context: WorkloadContext) -> None:
        super().__init__(context, **{"lambda": 0.1})
        self.own_model = copy.deepcopy(self.model)

    def train(self, task: Any) -> TrainResult:
        start, strength = snapshot(self.model), self.options["lambda"]
        steps = self.descend(task, self.model)
        self.descend(task, self.own_model, lambda name, v: strength * (v - start[name]))
        return self.result(steps)

    def local_state(self) -> dict[str, Any]:
        return {**super().local_state(), "own_model": copy.deepcopy(self.own_model.state_dict())}

    def load_local_state(self, state: dict[str, Any]) -> None:
        super().load_local_state(state)
        self.own_model.load_state_dict(state["own_model"])
