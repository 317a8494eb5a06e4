"""What a workload of a model that is cut has, and how it is made.

Optional are ``metrics(output, target)``, means over a batch by name; ``num_examples``, how many different examples this
rank trains on; ``draws``, whether a part draws random numbers in training, where `Parts.draws` does not see it; and
`local_state` and `load_local_state`, for what the order of the batches comes from.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from fedsplit.errors import WorkloadError
from fedsplit.split_learning.cut import Parts, parts_of
from fedsplit.workloads import WorkloadContext, load_workload

_REQUIRED = ("loss(output, target)", "batches(task)", "optimizer(module)")


class SplitWorkload(Protocol):
    """What a factory returns, besides the parts or the model to cut (`fedsplit.split_learning.cut`)."""

    def loss(self, output: torch.Tensor, target: torch.Tensor, /) -> torch.Tensor:
        """Return the mean loss of a batch."""

    def batches(self, task: Any, /) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield inputs and targets of this rank for a task, in the same order when the task is begun anew."""

    def optimizer(self, module: torch.nn.Module, /) -> torch.optim.Optimizer:
        """Return a new optimizer of a part."""


def create_split_workload(
    name: str, context: WorkloadContext, *, cut: str | None, tail: str | None
) -> tuple[SplitWorkload, Parts]:
    """Make a workload and cut its model; raises WorkloadError naming all that it lacks, and UsageError for the cut."""
    workload: Any = load_workload(name)(context)
    if lacking := [each for each in _REQUIRED if not callable(getattr(workload, each.partition("(")[0], None))]:
        raise WorkloadError(
            f"workload {name!r}: its factory returned a {type(workload).__name__} that lacks {', '.join(lacking)}; see "
            "docs/split-learning.md"
        )
    return workload, parts_of(workload, cut, tail)


def measured(workload: SplitWorkload, output: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """Return what a workload measures of a batch besides its loss."""
    metrics = getattr(workload, "metrics", None)
    return {} if metrics is None else {name: float(value) for name, value in metrics(output, target).items()}
