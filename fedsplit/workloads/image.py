"""Image classification in plain PyTorch: what the built-in workloads have in common.

The generator that orders the examples, seeded with (seed, rank), and the optimizer with its momentum live on across
rounds and are in `local_state`: a trainer that was killed goes on to the same bits, on a CPU with the same number of
threads. In several processes (torchrun) every batch is divided among them: the model is that of one process up to
rounding.

Not promised: the same bits on a GPU, or for a model with dropout, whose generator is not saved.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from fedsplit.errors import UsageError, WorkloadError
from fedsplit.exchange.work import steps_to_do
from fedsplit.trainer.task import Task
from fedsplit.workloads import EvaluateResult, OptionReader, TrainResult, WorkloadContext
from fedsplit.workloads.device import leave_compiler_out, step
from fedsplit.workloads.partition import partition, read_alpha

_EVALUATION_BATCH_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A data set in memory: uint8 images of shape (N, channels, height, width), int64 labels of shape (N,) from 0.

    `mean` and `std` are those of the training images' channels, after division by `maximum`, the value of white.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    maximum: int = 255


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a round is trained, by SGD; an option has the field's name in kebab case.

    `epochs` are passes over this rank's partition in one round; `proximal` is mu of FedProx, 0 for plain FedAvg.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float = 0.0
    proximal: float = 0.0

    def read(self, reader: OptionReader) -> TrainingSettings:
        """Return the settings that the options ask for; what they do not name stays as it is here."""
        settings = self.read_round(reader)
        momentum = reader.number("momentum", default=self.momentum, below=1.0)
        weight_decay = reader.number("weight-decay", default=self.weight_decay)
        return replace(settings, momentum=momentum, weight_decay=weight_decay)

    def read_round(self, reader: OptionReader) -> TrainingSettings:
        """Read what a server may change for one round: epochs, batch-size, lr and proximal."""
        epochs = reader.integer("epochs", default=self.epochs)
        batch_size = reader.integer("batch-size", default=self.batch_size)
        lr = reader.number("lr", default=self.lr, above=0.0)
        proximal = reader.number("proximal", default=self.proximal)
        return replace(self, epochs=epochs, batch_size=batch_size, lr=lr, proximal=proximal)


class ImageWorkload:
    """Trains on this rank's partition, evaluates on this rank's share of the held-out test images.

    The shares are disjoint and together the whole test set: a mean over all ranks, weighted by `num_examples`, is the
    accuracy over the whole of it. `load_data` is called once the options are known to be good, and `build_model` with
    the CPU's generator seeded from `context.seed`, so that every rank starts from the same model. `defaults` hold
    unless the options say otherwise. `on_batch`, if it is set, is called after every batch of a task with the batches
    done, the batches in all, the loss of this one, and the task's epochs.
    """

    def __init__(
        self, context: WorkloadContext, reader: OptionReader, load_data: Callable[[], ImageData],
        build_model: Callable[[], nn.Module], defaults: TrainingSettings,
    ) -> None:  # fmt: skip
        self._settings, alpha = defaults.read(reader), read_alpha(reader)
        reader.finish()
        self.on_batch: Callable[[int, int, float, int], None] | None = None
        self._device = torch.device(context.device)
        self._data = data = load_data()
        self._mean = torch.tensor(data.mean, device=self._device).view(-1, 1, 1)
        self._std = torch.tensor(data.std, device=self._device).view(-1, 1, 1)
        self._train_indices, self._test_indices = rank_indices(data, context, alpha)
        # The generator of the process is left as it was: a workload does not change what others draw.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(context.seed)
            self.model = build_model().to(self._device)
        in_group = distributed.is_available() and distributed.is_initialized()
        self._process, self._processes = (distributed.get_rank(), distributed.get_world_size()) if in_group else (0, 1)
        self._forward = self.model if self._processes == 1 else DistributedDataParallel(self.model)
        leave_compiler_out()
        # Each round sets its own lr, momentum and weight decay.
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=self._settings.lr)
        rank_seed = np.random.SeedSequence([context.seed, context.rank]).generate_state(1, np.uint64)[0]
        self._generator = torch.Generator().manual_seed(int(rank_seed >> 1))

    def train(self, task: Task) -> TrainResult:
        """Train for the settings' epochs, or the share of them that ``--balance`` asks for; less if the task stops.

        `task.config` may change epochs, batch-size, lr and proximal for this round. `num_examples` counts the different
        examples that were trained on, the metrics are means over every example seen: the cross entropy before each
        step, without the proximal term, and the accuracy. In several processes both are about this one's share.
        """
        settings = self._settings.read_round(OptionReader(task.config, source="--train-config"))
        anchor = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        for group in self._optimizer.param_groups:
            group.update(lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
        self.model.train()
        batches = torch.split(self._train_indices, settings.batch_size)
        steps = steps_to_do(task.config, len(batches) * settings.epochs)
        tally = _Tally(steps, settings.epochs, self.on_batch)
        for batch in islice(self._epochs(settings), steps):
            if task.should_stop():
                break
            self._step(batch, settings.proximal, anchor, tally)
        return TrainResult(min(tally.examples, sum(len(self._share(batch)) for batch in batches)), tally.means())

    @torch.no_grad()
    def evaluate(self, task: Task) -> EvaluateResult:
        """Return the mean loss and the accuracy on this rank's test images, up to the batch where the task stops."""
        self.model.eval()
        batches = torch.split(self._test_indices, _EVALUATION_BATCH_SIZE)
        tally = _Tally(len(batches), 1, self.on_batch)
        for batch in batches:
            images, labels = self._load(self._data.test_images, self._data.test_labels, batch)
            if len(labels):
                logits = self.model(images)
                tally.add(functional.cross_entropy(logits, labels), logits, labels)
            if task.should_stop():
                break
        means = tally.means()
        return EvaluateResult(means.pop("loss", 0.0), tally.examples, means)

    # -- for a model that is cut ---------------------------------------------------------------------------------------

    @property
    def num_examples(self) -> int:
        """How many different images this rank trains on."""
        return len(self._train_indices)

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy of logits."""
        return functional.cross_entropy(output, target)

    def metrics(self, output: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
        """Return the accuracy of logits."""
        return {"accuracy": int((output.argmax(dim=1) == target).sum()) / len(target)}

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """Return the SGD of the workload's options."""
        lr, momentum, weight_decay = self._settings.lr, self._settings.momentum, self._settings.weight_decay
        return torch.optim.SGD(module.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)

    def batches(self, task: Task) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield images and labels, as `train` and `evaluate` see them."""
        data = self._data
        if task.kind == "evaluate":
            for batch in torch.split(self._test_indices, _EVALUATION_BATCH_SIZE):
                yield self._load(data.test_images, data.test_labels, batch)
            return
        settings = self._settings.read_round(OptionReader(task.config, source="--train-config"))
        if settings != replace(self._settings, epochs=settings.epochs, batch_size=settings.batch_size):
            raise UsageError("--train-config: of a model that is cut, only epochs and batch-size change by round")
        if settings.proximal:
            raise UsageError("a model that is cut is trained without proximal")
        for batch in self._epochs(settings):
            yield self._load(data.train_images, data.train_labels, batch)

    def local_state(self) -> dict[str, Any]:
        """Return copies of the optimizer's and the generator's state."""
        return {"optimizer": copy.deepcopy(self._optimizer.state_dict()), "generator": self._generator.get_state()}

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Go on from `local_state`; raises WorkloadError if the state is that of another model or program."""
        try:
            # Momentum of another shape: PyTorch would take it, and fail in the middle of a step.
            parameters = list(self.model.parameters())
            for index, entry in state["optimizer"]["state"].items():
                buffer = entry.get("momentum_buffer")
                if buffer is not None and (index >= len(parameters) or buffer.shape != parameters[index].shape):
                    raise ValueError(f"momentum of parameter {index} has shape {tuple(buffer.shape)}")
            self._optimizer.load_state_dict(state["optimizer"])
            self._generator.set_state(state["generator"])
        except (KeyError, TypeError, ValueError, RuntimeError) as exc:
            raise WorkloadError(
                f"the saved local state is not of this workload: {exc}; start with --state reset, or with "
                "the workload and options that it was saved with"
            ) from exc

    def _epochs(self, settings: TrainingSettings) -> Iterator[torch.Tensor]:
        for _ in range(settings.epochs):
            order = torch.randperm(len(self._train_indices), generator=self._generator)
            yield from torch.split(self._train_indices[order], settings.batch_size)

    def _step(self, batch: torch.Tensor, proximal: float, anchor: Mapping[str, torch.Tensor], tally: _Tally) -> None:
        images, labels = self._load(self._data.train_images, self._data.train_labels, batch)
        logits = self._forward(images)
        loss = functional.cross_entropy(logits, labels, reduction="mean" if len(labels) else "sum")
        # The processes' gradients are averaged: together they are the gradient of the whole batch's mean.
        objective = loss if self._processes == 1 else loss * (len(labels) * self._processes / len(batch))
        if proximal:
            objective = objective + proximal * proximal_term(self.model, anchor)
        self._optimizer.zero_grad()
        objective.backward()  # type: ignore[no-untyped-call]
        step(self._optimizer)
        if len(labels):
            tally.add(loss, logits, labels)

    def _share(self, batch: torch.Tensor) -> torch.Tensor:
        """Return this process's part of a batch."""
        return batch[self._process :: self._processes]

    def _load(self, images: torch.Tensor, labels: torch.Tensor, batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        share = self._share(batch)
        pixels = images[share].to(self._device).float() / self._data.maximum
        return (pixels - self._mean) / self._std, labels[share].to(self._device)


class _Tally:
    """Adds up the losses and hits of a task's batches, and tells `on_batch`."""

    def __init__(self, total: int, epochs: int, on_batch: Callable[[int, int, float, int], None] | None) -> None:
        self._total, self._epochs, self._on_batch = total, epochs, on_batch
        self._done = self.examples = self._hits = 0
        self._loss = 0.0

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: its mean loss, logits of shape (N, classes), labels of shape (N,)."""
        mean_loss = loss.item()
        self.examples += len(labels)
        self._loss += mean_loss * len(labels)
        self._hits += int((logits.argmax(dim=1) == labels).sum())
        self._done += 1
        if self._on_batch:
            self._on_batch(self._done, self._total, mean_loss, self._epochs)

    def means(self) -> dict[str, float]:
        """Return the mean loss and the accuracy; nothing without an example."""
        return {"loss": self._loss / self.examples, "accuracy": self._hits / self.examples} if self.examples else {}


def rank_indices(data: ImageData, context: WorkloadContext, alpha: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which training and which test images are this rank's; of the latter every `num_partitions`-th one."""
    parts = partition(data.train_labels.numpy(), context.num_partitions, context.seed, alpha)
    rank, partitions, images = context.rank, context.num_partitions, len(data.test_labels)
    if partitions > images:
        raise UsageError(f"cannot divide {images} test images among {partitions} partitions; lower --num-partitions")
    return torch.from_numpy(parts[rank - 1]), torch.arange(rank - 1, images, partitions)


def proximal_term(model: nn.Module, anchor: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return 1/2 * ||w - w_global||^2 over the trainable parameters, to be added to a loss times mu.

    `anchor` is w_global: the parameters by name, on the model's device, without a gradient. Li et al., "Federated
    Optimization in Heterogeneous Networks", 2020 (arXiv:1812.06127).
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    distances = [(parameter - anchor[name]).square().sum() for name, parameter in trainable]
    return sum(distances, torch.zeros((), device=distances[0].device)) / 2


def small_conv_net(image_size: int) -> nn.Module:
    """Return two convolutions and two linear layers for ten classes of grey images, `image_size` a multiple of 4."""
    features = nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    )  # fmt: skip
    hidden = nn.Linear(32 * (image_size // 4) ** 2, 64)
    classifier = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(OrderedDict(features=features, classifier=classifier))
