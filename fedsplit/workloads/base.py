"""What a workload is: the context it is made with, and what it returns.

A workload owns the model, the data and the optimizer of one rank. A factory makes it: a function from a
`WorkloadContext` to an object with `model`, `train(task)` and `evaluate(task)`, where the task is a
`fedsplit.trainer.trainer.Task`. Nothing here imports torch or Flower: what a process loads is up to the factory.

Not promised: that `train` is only ever called with the state of the round before. A trainer that was restarted does
its unanswered task again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from fedsplit.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class WorkloadContext:
    """What a factory is called with.

    Attributes
    ----------
    rank : int
        Which of the partitions is this trainer's, counted from 1.
    num_partitions : int
        Into how many parts the data is divided; the same for every trainer of a run.
    seed : int
        The same for every trainer of a run: it gives the same initial model and the same partitioning.
    device : torch.device or str
        Where the model lives.
    data_dir : Path or None
        Where data sets are looked for; None leaves the place to the workload.
    options : Mapping[str, str]
        From ``--workload-option key=value``; `OptionReader` reads them.
    """

    rank: int
    num_partitions: int = 2
    seed: int = 0
    device: torch.device | str = "cpu"
    data_dir: Path | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("num_partitions", 1), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise UsageError(f"{name}: expected a whole number of at least {least}, found {value}")
        if self.rank > self.num_partitions:
            raise UsageError(
                f"rank {self.rank} has no data: it is divided into {self.num_partitions} partitions, for the ranks 1 "
                f"to {self.num_partitions}; start every trainer with --num-partitions {self.rank} or more"
            )


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes
    ----------
    num_examples : int
        How many different examples this rank trained on: its weight in an average. With 0 the server leaves the update
        out.
    metrics : Mapping[str, float]
        Such as ``{"loss": 0.31}``; names are free.
    """

    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluateResult:
    """What `evaluate` returns.

    Attributes
    ----------
    loss : float
        The mean over the examples of this rank.
    num_examples : int
        How many examples the loss and the metrics are means of: their weight.
    metrics : Mapping[str, float]
        Such as ``{"accuracy": 0.93}``.
    """

    loss: float
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Workload(Protocol):
    """What a factory returns. The global state is in `model` before `train` or `evaluate` is called."""

    model: torch.nn.Module

    def train(self, task: Any, /) -> TrainResult:
        """Train `model` in place."""

    def evaluate(self, task: Any, /) -> EvaluateResult:
        """Judge `model` without changing it."""


@runtime_checkable
class StatefulWorkload(Protocol):
    """The optional half: what must outlive the process, kept in the trainer's checkpoint."""

    def local_state(self) -> dict[str, Any]:
        """Return a snapshot that later training does not change: dicts, lists, numbers, str and tensors."""

    def load_local_state(self, state: dict[str, Any], /) -> None:
        """Go on from a snapshot."""
