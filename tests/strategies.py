"""Flower strategies of the tests' own, as a user's package would have them: ``--strategy tests.strategies:NAME``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from flwr.common import FitIns, Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAvg

from fedsplit import TrainResult, WorkloadContext
from tests.unchanged import Counting, note


class Choosing(FedAvg):
    """Tells every client something else, leaves rank 1 out of even rounds, and remembers what it did.

    It writes what it saw into ``strategy.json``.
    """

    def __init__(self, step: float = 1.0, remember: str = "") -> None:
        super().__init__(min_available_clients=2, evaluate_fn=self._measure)
        self.step = step
        self.asked: dict[str, list[int]] = {}
        self.failed: list[str] = []
        self.losses: list[float] = []

    def _measure(self, server_round: int, arrays: list[Any], config: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        return float(np.abs(arrays[0]).sum()), {"round": server_round}

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: Any) -> list[Any]:
        clients = client_manager.all()
        chosen = [cid for cid in sorted(clients) if server_round % 2 or cid != "1"]
        for cid in chosen:
            self.asked.setdefault(cid, []).append(server_round)
        return [(clients[cid], FitIns(parameters, {"lr": self.step * int(cid)})) for cid in chosen]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> tuple[Any, dict[str, Any]]:
        self.failed += [f"{client.cid}: {result.status.message}" for client, result in failures]
        Path("strategy.json").write_text(json.dumps([self.asked, self.failed, self.losses]))
        if not results:
            return None, {"merged": 0}
        # The highest rank's update counts, and nothing else.
        client, result = max(results, key=lambda each: int(each[0].cid))
        assert client.properties == {"rank": int(client.cid)}
        return result.parameters, {"merged": len(results), "note": "a text is no metric"}

    def aggregate_evaluate(self, server_round: int, results: Any, failures: Any) -> tuple[Any, dict[str, Any]]:
        loss, _ = super().aggregate_evaluate(server_round, results, failures)
        self.losses.append(loss)
        return loss, {"evaluations": len(self.losses)}


class Personal(FedAvg):
    """Gives every rank parameters of its own: ten times its rank."""

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: Any) -> list[Any]:
        own = [np.zeros_like(array) for array in parameters_to_ndarrays(parameters)]
        return [
            (client, FitIns(ndarrays_to_parameters([array + 10 * int(cid) for array in own]), {}))
            for cid, client in client_manager.all().items()
        ]


class Noting(Counting):
    """Counts, and notes its configuration and what it was given; rank 3 fails."""

    def train(self, task: Any) -> TrainResult:
        note(f"rank {self._rank} round {task.server_round} {json.dumps(dict(task.config), sort_keys=True)} "
             f"from {self.model.count[0].item():g}")  # fmt: skip
        if self._rank == 3:
            raise ArithmeticError("rank 3 never can")
        return super().train(task)


def noting(context: WorkloadContext) -> Noting:
    return Noting(context)
