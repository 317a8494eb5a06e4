"""FedProx: a rank pays for its distance from the global model, so that it does not drift too far in a round.

Li et al., "Federated Optimization in Heterogeneous Networks", 2020 (arXiv:1812.06127), Algorithm 2:

    python -m fedsplit run --ranks 4 --rounds 20 --workload examples.algorithms.fedprox:FedProx \\
        --workload-option mu=0.1 --workload-option partition=dirichlet --workload-option alpha=0.1

The server's half is FedAvg. The shipped workloads have it as an option, without this file:

    python -m fedsplit run --ranks 4 --rounds 20 --workload digits --workload-option proximal=0.1
"""

from __future__ import annotations

from typing import Any

from examples.algorithms.digits import Digits, snapshot
from fedsplit import TrainResult, WorkloadContext


class FedProx(Digits):
    """The trainer's half: the loss has mu / 2 * ||w - w_global||^2 more, and this is its gradient."""

    def __init__(self, context: WorkloadContext) -> None:
        super().__init__(context, mu=0.1)

    def train(self, task: Any) -> TrainResult:
        start, mu = snapshot(self.model), self.options["mu"]
        return self.result(self.descend(task, self.model, lambda name, w: mu * (w - start[name])))
