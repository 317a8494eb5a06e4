"""What a workload is: the context it is made with, what it returns, and what it may ask of a task.

A workload owns the model, the data and the optimizer of one rank. It is made by a factory, a plain function
from a `WorkloadContext` to an object with `model`, `train(task)` and `evaluate(task)`. Nothing here imports
torch or Flower, so that a factory's module decides alone what its process loads.

Not promised: that `train` is only ever called with the state of the round before. A trainer that was
restarted does its unanswered task again.
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
        The same for every trainer of a run: from it come the same initial model and the same partitioning.
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
        if self.rank < 1:
            raise UsageError(f"rank: expected a whole number of at least 1, found {self.rank}")
        if self.num_partitions < 1:
            raise UsageError(f"num_partitions: expected at least 1, found {self.num_partitions}")
        if self.rank > self.num_partitions:
            raise UsageError(
                f"rank {self.rank} has no data: it is divided into {self.num_partitions} partitions, for the "
                f"ranks 1 to {self.num_partitions}; start every trainer with --num-partitions {self.rank} or "
                f"more"
            )
        if self.seed < 0:
            raise UsageError(f"seed: expected a whole number of at least 0, found {self.seed}")


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes
    ----------
    num_examples : int
        How many different examples this rank trained on: its weight in an average. With 0 the server leaves
        the update out.
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


class Task(Protocol):
    """What a workload may use of the task it is given; `fedsplit.trainer.trainer.Task` is one."""

    @property
    def kind(self) -> str:
        """``"train"`` or ``"evaluate"``."""

    @property
    def server_round(self) -> int:
        """The round, counted from 1."""

    @property
    def total_rounds(self) -> int:
        """How many rounds the run has."""

    @property
    def config(self) -> Mapping[str, Any]:
        """What the server sent along: bool, int, float and str values."""

    @property
    def state_dict(self) -> Mapping[str, torch.Tensor]:
        """The global state. `model_main.py` has loaded it into `Workload.model` already."""

    def should_stop(self) -> bool:
        """Whether nobody waits for the answer any more; cheap enough for every batch."""

    def load_into(self, model: torch.nn.Module) -> object:
        """Load the global state into another model than `Workload.model`."""


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
