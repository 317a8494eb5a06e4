"""The rank's side of a cut model: it runs its batches through the lower part, and lets the rest be done beyond.

It is a workload like any other, `fedsplit.workloads.runner` runs it. What goes out with each batch are the activations
at the cut, and the targets; where there is a tail the targets stay, and the rank finds the loss itself.

With a window of several batches their activations go out together, all of one and the same lower part: delayed
gradients, as where pipelined training lets weights be stale (Harlap et al., "PipeDream", 2018).
"""

import copy
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from fedsplit.run.history import weighted_mean
from fedsplit.split_learning.cut import Parts
from fedsplit.split_learning.noise import CutNoise
from fedsplit.split_learning.workload import SplitWorkload, measured
from fedsplit.trainer.remote import remote_window
from fedsplit.trainer.task import Task
from fedsplit.workloads import EvaluateResult, StatefulWorkload, TrainResult, WorkloadContext


class LowerPart:
    """Trains and evaluates a rank's part, batch by batch, with the trainer of the upper part."""

    def __init__(
        self, workload: SplitWorkload, parts: Parts, context: WorkloadContext, dtype: torch.dtype | None = None,
        noise: CutNoise | None = None, window: int = 1,
    ) -> None:  # fmt: skip
        self.model = parts.at_rank()
        # How many batches go out at once.
        self._window = window
        # In which activations and gradients travel, if not in their own, and what is added to activations.
        self._dtype, self._noise = dtype, noise
        self._workload, self._parts = workload, parts
        self._stateful = workload if isinstance(workload, StatefulWorkload) else None
        self._optimizer = workload.optimizer(self.model)
        self._draws = bool(getattr(workload, "draws", False)) or parts.draws
        if self._draws:
            seed = np.random.SeedSequence([context.seed, context.rank]).generate_state(1, np.uint64)[0]
            torch.manual_seed(int(seed >> 1))

    def train(self, task: Task) -> TrainResult:
        """Train on this rank's batches, as the whole model would be trained."""
        self.model.train()
        if self._noise:
            self._noise.begin(task)
        measurements: list[tuple[int, dict[str, float]]] = []
        batches = iter(self._workload.batches(task))
        while window := list(islice(batches, self._window)):
            if task.should_stop():
                break
            found = [self._step(task, *window[0])] if len(window) == 1 else self._steps(task, window)
            measurements += [(len(targets), each) for (_, targets), each in zip(window, found, strict=True)]
        examples = sum(each for each, _ in measurements)
        different = getattr(self._workload, "num_examples", examples)
        return TrainResult(min(examples, different), weighted_mean(measurements))

    @torch.no_grad()
    def evaluate(self, task: Task) -> EvaluateResult:
        """Evaluate on this rank's batches."""
        self.model.eval()
        if self._noise:
            self._noise.begin(task)
        measurements: list[tuple[int, dict[str, float]]] = []
        for inputs, targets in self._workload.batches(task):
            if task.should_stop():
                break
            _, numbers = self._forward(task, inputs, targets)
            measurements.append((len(targets), numbers))
        found = weighted_mean(measurements)
        return EvaluateResult(found.pop("loss", 0.0), sum(each for each, _ in measurements), found)

    def local_state(self) -> dict[str, Any]:
        """Return copies of the optimizer's state, the workload's, and that of the generator if one is drawn from."""
        state: dict[str, Any] = {"optimizer": copy.deepcopy(self._optimizer.state_dict())}
        if self._stateful:
            state["workload"] = self._stateful.local_state()
        if self._draws:
            state["generator"] = torch.get_rng_state()
        return state

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Go on from `local_state`."""
        self._optimizer.load_state_dict(state["optimizer"])
        if self._stateful:
            self._stateful.load_local_state(state["workload"])
        if self._draws:
            torch.set_rng_state(state["generator"])

    def _step(self, task: Task, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        """Do a step with a batch; returns what is to be noted of it."""
        self._optimizer.zero_grad()
        loss, numbers = self._forward(task, inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return numbers

    def _steps(self, task: Task, window: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[dict[str, float]]:
        """Do a step with each batch of a window, whose activations and gradients are all those of its beginning."""
        given = [(self._lower(inputs), targets) for inputs, targets in window]
        found = remote_window(task, given, generator=self._draws, dtype=self._dtype)
        weights = list(self.model.parameters())
        gradients = []
        # All of them before the first step: a backward pass needs the weights of its forward pass.
        for (activations, _), (gradient, _) in zip(given, found, strict=True):
            self._optimizer.zero_grad()
            if activations.requires_grad:
                activations.backward(gradient)  # type: ignore[no-untyped-call]
            gradients.append([weight.grad for weight in weights])
        for each in gradients:
            for weight, own in zip(weights, each, strict=True):
                weight.grad = own
            self._optimizer.step()
        return [{name: float(value) for name, value in numbers.items()} for _, numbers in found]

    def _lower(self, inputs: torch.Tensor) -> torch.Tensor:
        activations: torch.Tensor = self._parts.lower(inputs)
        return self._noise(activations) if self._noise else activations

    def _forward(
        self, task: Task, inputs: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss of a batch, and what is to be noted of it."""
        activations, tail = self._lower(inputs), self._parts.tail
        generator = self._draws and torch.is_grad_enabled()
        if tail is None:
            loss = task.remote(activations, targets, generator=generator, dtype=self._dtype)
            return loss, {name: float(value) for name, value in task.numbers.items()}
        output = tail(task.remote(activations, generator=generator, dtype=self._dtype))
        loss = self._workload.loss(output, targets)
        return loss, {"loss": loss.item(), **measured(self._workload, output.detach(), targets)}
