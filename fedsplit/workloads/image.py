"""Image classification in plain PyTorch: what all the built-in workloads have in common.

Images stay in memory as uint8 and are normalised batch by batch. The data order comes from a generator
seeded with (seed, rank); the optimizer with its momentum lives on across rounds. Both are in `local_state`,
so that a trainer that was killed goes on to the same bits as one that was not: on a CPU, with the same
number of threads.

In several processes (torchrun) every batch is divided among them: the steps, and so the model up to rounding, are those
of one process.

Not promised: the same bits on a GPU, or for a model with dropout (its generator is not kept here).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from fedsplit.errors import UsageError, WorkloadError
from fedsplit.workloads.base import EvaluateResult, Task, TrainResult, WorkloadContext
from fedsplit.workloads.device import processes
from fedsplit.workloads.options import OptionReader
from fedsplit.workloads.partition import Scheme, partition
from fedsplit.workloads.training import Tally, TrainingSettings, proximal_term

EVALUATION_BATCH_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A data set in memory.

    Attributes
    ----------
    train_images, test_images : uint8 tensors, shape (N, channels, height, width)
        No image is in both; nobody trains on the second.
    train_labels, test_labels : int64 tensors, shape (N,)
        The classes, from 0.
    mean, std : tuple of float
        Of each channel of the training images, after division by `maximum`.
    maximum : int
        The value of a white pixel.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    maximum: int = 255

    def first(self, limit: int) -> ImageData:
        """Return the data with the first `limit` training images only; all test images stay."""
        return dataclasses.replace(self, train_images=self.train_images[:limit], train_labels=self.train_labels[:limit])


class ImageWorkload:
    """Trains on this rank's partition, evaluates on this rank's share of the held-out test images.

    The shares are disjoint and together the whole test set: a mean weighted by `num_examples` over all
    ranks is the accuracy over the whole of it.

    Parameters
    ----------
    context : WorkloadContext
        Rank, number of partitions, seed, device.
    data : ImageData
        The same for every rank.
    build_model : function without arguments
        Called with the CPU's generator seeded from `context.seed`, so that every rank starts from the same
        model.
    settings : TrainingSettings
        How to train.
    scheme : Scheme
        How the training images are divided.

    Attributes
    ----------
    model : Module
        What is trained.
    on_batch : function of (done, total, loss, epochs) or None
        Called after every batch of a task: batches done, batches in all, the loss of this one, the task's epochs.
    """

    def __init__(
        self,
        context: WorkloadContext,
        *,
        data: ImageData,
        build_model: Callable[[], nn.Module],
        settings: TrainingSettings,
        scheme: Scheme,
    ) -> None:
        self.device = torch.device(context.device)
        self.settings = settings
        self.on_batch: Callable[[int, int, float, int], None] | None = None
        self._data = data
        self._mean = torch.tensor(data.mean, device=self.device).view(-1, 1, 1)
        self._std = torch.tensor(data.std, device=self.device).view(-1, 1, 1)
        self._train_indices = training_indices(data, context, scheme)
        self._test_indices = held_out_indices(data, context)
        self.model = _seeded(build_model, context.seed).to(self.device)
        self._process, self._processes = processes()
        self._forward = self.model if self._processes == 1 else DistributedDataParallel(self.model)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=settings.lr, momentum=settings.momentum)
        self._generator = torch.Generator()
        self._generator.manual_seed(_seed_of_rank(context))

    def train(self, task: Task) -> TrainResult:
        """Train for the settings' epochs, fewer if the task should stop.

        `task.config` may change epochs, batch-size, lr and proximal for this round. `num_examples` counts
        the different examples that were trained on: the whole partition, unless the task stopped in the
        first epoch. The metrics are means over every example seen: the cross entropy as it was before each
        step, without the proximal term, and the accuracy. Without a single batch there are none. In several
        processes both are about this one's share.
        """
        settings = self.settings.read_round(OptionReader(task.config, source="--train-config"))
        anchor = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        for group in self._optimizer.param_groups:
            group.update(lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
        self.model.train()
        tally = Tally(-(-len(self._train_indices) // settings.batch_size), self.on_batch, settings.epochs)
        for batch in self._epochs(settings):
            if task.should_stop():
                break
            self._step(batch, settings.proximal, anchor, tally)
        batches = torch.split(self._train_indices, settings.batch_size)
        return TrainResult(min(tally.examples, sum(len(self._share(batch)) for batch in batches)), tally.means())

    @torch.no_grad()
    def evaluate(self, task: Task) -> EvaluateResult:
        """Return the mean loss and the accuracy on this rank's share of the test images.

        A task that should stop ends after its current batch; the counts say how many images were looked at.
        """
        self.model.eval()
        batches = torch.split(self._test_indices, EVALUATION_BATCH_SIZE)
        tally = Tally(len(batches), self.on_batch)
        for batch in batches:
            images, labels = self._load(self._data.test_images, self._data.test_labels, self._share(batch))
            if len(labels):
                logits = self.model(images)
                tally.add(functional.cross_entropy(logits, labels), logits, labels)
            if task.should_stop():
                break
        means = tally.means()
        return EvaluateResult(means.pop("loss", 0.0), tally.examples, means)

    def local_state(self) -> dict[str, Any]:
        """Return copies of the optimizer's and the generator's state: dicts, lists, numbers and tensors."""
        return {
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "generator": self._generator.get_state(),
        }

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Go on from `local_state`.

        Raises
        ------
        WorkloadError
            If the state is that of another model or program.
        """
        try:
            _check_momentum(self._optimizer, state["optimizer"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._generator.set_state(state["generator"])
        except (KeyError, TypeError, ValueError, RuntimeError) as exc:
            raise WorkloadError(
                f"the saved local state is not of this workload: {exc}; start with --state reset, or with "
                f"the workload and options that it was saved with"
            ) from exc

    def _epochs(self, settings: TrainingSettings) -> Iterator[torch.Tensor]:
        for _ in range(settings.epochs):
            order = torch.randperm(len(self._train_indices), generator=self._generator)
            yield from torch.split(self._train_indices[order], settings.batch_size)

    def _step(self, batch: torch.Tensor, proximal: float, anchor: Mapping[str, torch.Tensor], tally: Tally) -> None:
        share = self._share(batch)
        images, labels = self._load(self._data.train_images, self._data.train_labels, share)
        logits = self._forward(images)
        loss = functional.cross_entropy(logits, labels, reduction="mean" if len(labels) else "sum")
        # The processes' gradients are averaged: together they are the gradient of the whole batch's mean.
        objective = loss if self._processes == 1 else loss * (len(labels) * self._processes / len(batch))
        if proximal:
            objective = objective + proximal * proximal_term(self.model, anchor)
        self._optimizer.zero_grad()
        objective.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        if len(labels):
            tally.add(loss, logits, labels)

    def _share(self, batch: torch.Tensor) -> torch.Tensor:
        """Return this process's part of a batch."""
        return batch if self._processes == 1 else batch[self._process :: self._processes]

    def _load(
        self, images: torch.Tensor, labels: torch.Tensor, batch: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = images[batch].to(self.device).float() / self._data.maximum
        return (pixels - self._mean) / self._std, labels[batch].to(self.device)


def training_indices(data: ImageData, context: WorkloadContext, scheme: Scheme) -> torch.Tensor:
    """Return which training images are this rank's."""
    parts = partition(data.train_labels.numpy(), context.num_partitions, scheme, context.seed)
    return torch.from_numpy(parts[context.rank - 1])


def held_out_indices(data: ImageData, context: WorkloadContext) -> torch.Tensor:
    """Return which test images are this rank's: every `num_partitions`-th one."""
    if context.num_partitions > len(data.test_labels):
        raise UsageError(
            f"cannot divide {len(data.test_labels)} test images among {context.num_partitions} partitions; "
            f"lower --num-partitions"
        )
    return torch.arange(context.rank - 1, len(data.test_labels), context.num_partitions)


def _seeded(build_model: Callable[[], nn.Module], seed: int) -> nn.Module:
    # Leaves the generator of the process as it found it, so that a workload does not change what others draw.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build_model()


def _seed_of_rank(context: WorkloadContext) -> int:
    return int(np.random.SeedSequence([context.seed, context.rank]).generate_state(1, np.uint64)[0] >> 1)


def _check_momentum(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """See that the momentum fits: PyTorch would take a wrong shape, and fail in the middle of a step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entry in saved["state"].items():
        buffer = entry.get("momentum_buffer")
        if buffer is not None and (index >= len(parameters) or buffer.shape != parameters[index].shape):
            raise ValueError(f"momentum of parameter {index} has shape {tuple(buffer.shape)}")
