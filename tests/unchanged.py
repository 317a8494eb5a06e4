"""Workloads of the tests' own: as a user's package would have them, found by ``--workload tests.unchanged:NAME``."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import nn

from fedsplit import EvaluateResult, TrainResult, WorkloadContext
from tests.held import is_allowed


def entries() -> dict[str, torch.Tensor]:
    """One entry of every kind that travels."""
    generator = torch.Generator().manual_seed(7)
    return {
        "single": torch.randn(3, 5, generator=generator),
        "brain": torch.randn(7, generator=generator).bfloat16(),
        "half_": torch.randn(2, 3, generator=generator).half(),
        "double_": torch.randn(4, generator=generator, dtype=torch.float64),
        "counter": torch.tensor(2**53 + 1),
        "mask": torch.tensor([True, False, True]),
        "bytes_": torch.arange(5, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(0.1),
        "tiny": torch.tensor([1e-45, -0.0, 3.4e38]),
    }


class Holder(nn.Module):
    """A module whose state_dict is exactly the given entries."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


class Unchanged:
    """Trains nothing and says so."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def train(self, task: Any) -> TrainResult:
        return TrainResult(10 * task.server_round, {})

    def evaluate(self, task: Any) -> EvaluateResult:
        return EvaluateResult(0.5, 4, {})


def unchanged(context: WorkloadContext) -> Unchanged:
    return Unchanged(Holder(entries()))


def large(context: WorkloadContext) -> Unchanged:
    """20 MB: five pieces."""
    return Unchanged(Holder({"a": torch.arange(5_000_000, dtype=torch.float32)}))


class Slow(Unchanged):
    """Trains until it is told to stop."""

    def train(self, task: Any) -> TrainResult:
        while not task.should_stop():
            time.sleep(0.01)
        return TrainResult(1, {})


def slow(context: WorkloadContext) -> Slow:
    return Slow(Holder(entries()))


class Failing(Unchanged):
    def train(self, task: Any) -> TrainResult:
        raise ArithmeticError("the loss of rank 2 is not what it should be")


def failing_on_rank_2(context: WorkloadContext) -> Unchanged:
    return (Failing if context.rank == 2 else Unchanged)(Holder(entries()))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(2, width)


def wider_on_rank_2(context: WorkloadContext) -> Unchanged:
    return Unchanged(Layer(4 if context.rank == 2 else 3))


class Counting(Unchanged):
    """Adds one to its entry and notes every training in a file of the directory it was started in.

    Options: ``sleep`` seconds of training, ``hold`` each until the test allows it to end (`tests.held`), ``fork`` a
    child that outlives a kill, as a DataLoader's worker does. The child ends once a file ``over`` is there.
    """

    def __init__(self, context: WorkloadContext) -> None:
        own = {"own": torch.ones(3)} if context.options.get("own") == "yes" else {}
        super().__init__(Holder({"count": torch.zeros(8), **own}))
        self._rank = context.rank
        self._sleep_s = float(context.options.get("sleep", "0"))
        self._is_held = context.options.get("hold") == "yes"
        if context.options.get("fork") == "yes" and os.fork() == 0:
            while not os.path.exists("over"):  # noqa: PTH110
                time.sleep(0.05)
            os._exit(0)

    def train(self, task: Any) -> TrainResult:
        note(f"rank {self._rank} begins {task.server_round}")
        deadline = time.monotonic() + self._sleep_s
        while time.monotonic() < deadline or (self._is_held and not is_allowed(task.server_round)):
            if task.should_stop():
                note(f"rank {self._rank} stops {task.server_round}")
                break
            time.sleep(0.005)
        self.model.count += 1
        note(f"rank {self._rank} trained {task.server_round}")
        return TrainResult(1, {})


class Gated(Counting):
    """Trains two rounds, and more once a file ``opened`` is there."""

    def train(self, task: Any) -> TrainResult:
        while task.server_round > 2 and not os.path.exists("opened") and not task.should_stop():  # noqa: PTH110
            time.sleep(0.01)
        return super().train(task)


def gated(context: WorkloadContext) -> Gated:
    return Gated(context)


def note(text: str) -> None:
    with open("trained.log", "a") as file:  # noqa: PTH123
        file.write(text + "\n")


def counting(context: WorkloadContext) -> Counting:
    return Counting(context)


class Growing(Unchanged):
    """Six megabytes that differ from round to round, so that every checkpoint needs its own space."""

    def train(self, task: Any) -> TrainResult:
        self.model.a += 1
        return TrainResult(1, {})


def growing(context: WorkloadContext) -> Growing:
    return Growing(Holder({"a": torch.zeros(1_000_000)}))


# Names that a round's line has for something else.
TAKEN = {
    "stages": "none", "bytes": float("inf"), "num_examples": "many", "seconds": "long", "evaluate": 0.5, "central": 1,
    "refused": "no", "train": True,
}  # fmt: skip


class Named(Unchanged):
    """Calls its metrics as a round's line calls its own entries."""

    def train(self, task: Any) -> TrainResult:
        return TrainResult(1, TAKEN)  # type: ignore[arg-type]

    def evaluate(self, task: Any) -> EvaluateResult:
        return EvaluateResult(0.5, 4, TAKEN)  # type: ignore[arg-type]


def taken_names(context: WorkloadContext) -> Named:
    return Named(Holder(entries()))


def without_evaluate(context: WorkloadContext) -> Any:
    class Half:
        model = nn.Linear(1, 1)

        def train(self, task: Any) -> TrainResult:
            return TrainResult(1)

    return Half()
