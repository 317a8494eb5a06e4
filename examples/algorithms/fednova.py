"""FedNova: ranks may train for different numbers of steps, and none pulls the mean its way by taking more of them.

Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization", 2020
(arXiv:2007.07481), with plain SGD, for which the paper's ||a_i||_1 is the number of steps:

    python -m fedsplit run --ranks 4 --rounds 20 --workload examples.algorithms.fednova:FedNova \\
        --aggregate examples.algorithms.fednova:merge \\
        --workload-option work=uneven --workload-option partition=dirichlet --workload-option alpha=0.1

Nothing travels but the model and one number, so the number is a metric.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from examples.algorithms.digits import Digits
from fedsplit import AggregationContext, Update


class FedNova(Digits):
    """The trainer's half: FedAvg's, whose metric `steps` is tau_i."""


def merge(updates: Sequence[Update], context: AggregationContext) -> dict[str, Tensor]:
    """The server's half: the mean change of one step, times the mean number of steps."""
    examples = sum(update.num_examples for update in updates)
    share = {update.rank: update.num_examples / examples for update in updates}
    tau = {update.rank: max(1, update.metrics["steps"]) for update in updates}
    effective = sum(share[rank] * tau[rank] for rank in tau)
    merged = {}
    for name, x in context.previous.items():
        step = sum(share[each.rank] * (each.state_dict[name] - x) / tau[each.rank] for each in updates)
        merged[name] = x + effective * step
    return merged
