"""Workloads for a model that is cut: one whose activations have a given size, and pictures of the shape of CIFAR-10.

python model_main.py --rank 1 --cut lower --workload benchmarks.split_work:cut_of --workload-option bytes=100000
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsplit.workloads import OptionReader, WorkloadContext
from fedsplit.workloads.image import ImageData, ImageWorkload, TrainingSettings

BATCH, CLASSES = 32, 10


class Scale(nn.Module):
    """The least that a part can be: each input times a weight; it may also sleep, in place of heavier layers."""

    def __init__(self, width: int, sleep_s: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self._sleep_s = sleep_s

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        time.sleep(self._sleep_s)
        return given * self.weight


class CutOf:
    """A chain ``lower``, ``upper`` with activations of ``bytes`` for a batch of 32; ``batches`` a round.

    It writes the seconds from each batch to the next, all but the first, to ``periods-<rank>.json`` in ``stamps``.
    """

    def __init__(self, context: WorkloadContext) -> None:
        options = context.options
        width = int(options["bytes"]) // (4 * BATCH)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            self.model = nn.Sequential(OrderedDict(
                lower=Scale(width, float(options.get("sleep", 0))), upper=nn.Linear(width, CLASSES),
            ))  # fmt: skip
            if sleep_s := float(options.get("upper-sleep", 0)):
                self.model.add_module("slow", Scale(CLASSES, sleep_s))
            self._inputs = torch.randn(BATCH, width)
        self._targets = torch.arange(BATCH) % CLASSES
        self._count = int(options["batches"])
        self._path = Path(options["stamps"]) / f"periods-{context.rank}.json"

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy."""
        return nn.functional.cross_entropy(output, target)

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(module.parameters(), lr=1e-3)

    def batches(self, task: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield one and the same batch again and again, and note when."""
        stamps = []
        for _ in range(self._count):
            stamps.append(time.perf_counter())
            yield self._inputs, self._targets
        stamps.append(time.perf_counter())
        self._path.write_text(json.dumps([after - before for before, after in itertools.pairwise(stamps[1:])]))


def cut_of(context: WorkloadContext) -> CutOf:
    """Make the workload; options: ``bytes``, ``batches``, ``stamps``, ``sleep`` and ``upper-sleep`` (seconds)."""
    return CutOf(context)


def plain(bytes_: int, batches: int, directory: Path) -> None:
    """Train the same model, cut in the same place, in one process: what a step costs with no way between the halves."""
    options = {"bytes": str(bytes_), "batches": str(batches), "stamps": str(directory)}
    workload = CutOf(WorkloadContext(rank=1, options=options))
    optimizers = [workload.optimizer(each) for each in workload.model]
    for inputs, targets in workload.batches(None):
        for each in optimizers:
            each.zero_grad()
        activations = workload.model[0](inputs)
        at_cut = activations.detach().requires_grad_()
        workload.loss(workload.model[1](at_cut), targets).backward()  # type: ignore[no-untyped-call]
        activations.backward(at_cut.grad)
        for each in optimizers:
            each.step()


def pictures(context: WorkloadContext) -> ImageWorkload:
    """Make a small convolutional net for `picture_data`; its options are those of `TrainingSettings`."""
    defaults = TrainingSettings(epochs=1, batch_size=32, lr=0.01, momentum=0.9)
    return ImageWorkload(context, OptionReader(context.options), picture_data, conv_net, defaults)


def conv_net() -> nn.Module:
    """Return three convolutions and a linear layer for ten classes of 3 x 32 x 32 pixels, as one chain."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, CLASSES))


@functools.cache
def picture_data(train: int = 1280, test: int = 512, seed: int = 10) -> ImageData:
    """Return generated pictures: each class is a coarse pattern of colours, which a picture has moved, under noise."""
    draw = torch.Generator().manual_seed(seed)
    patterns = torch.rand(CLASSES, 3, 4, 4, generator=draw)
    patterns = nn.functional.interpolate(patterns, size=(32, 32), mode="bilinear")
    labels = torch.arange(train + test) % CLASSES
    moves = torch.randint(-4, 5, (train + test, 2), generator=draw).tolist()
    moved = torch.stack([patterns[label].roll(move, dims=(1, 2)) for label, move in zip(labels, moves, strict=True)])
    noisy = moved + 0.35 * torch.randn(moved.shape, generator=draw)
    images = (255 * noisy.clamp(0, 1)).to(torch.uint8)
    return ImageData(
        train_images=images[:train], train_labels=labels[:train],
        test_images=images[train:], test_labels=labels[train:], mean=(0.5, 0.5, 0.5), std=(0.3, 0.3, 0.3),
    )  # fmt: skip
