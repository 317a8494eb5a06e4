"""What the algorithms beside this file share: a rank's digits, a small network, seeded batches, two accuracies.

`Digits` alone is FedAvg (McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
2017, arXiv:1602.05629); every other algorithm is a class that changes its `train`:

    python -m fedsplit run --ranks 4 --rounds 20 --workload examples.algorithms.digits:Digits \\
        --workload-option partition=dirichlet --workload-option alpha=0.1

Options of all: ``partition`` and ``alpha`` divide the digits among the ranks; ``lr``, ``epochs`` and ``batch-size`` are
those of a round. With ``work=uneven`` a rank trains 1 to 2 * epochs - 1 epochs, drawn anew for each round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsplit import EvaluateResult, TrainResult, WorkloadContext
from fedsplit.workloads import OptionReader
from fedsplit.workloads.digits import load_data
from fedsplit.workloads.image import rank_indices, small_conv_net
from fedsplit.workloads.partition import read_alpha

Correction = Callable[[str, Tensor], Tensor | float]


class Digits:
    """The digits of a rank, on the CPU; `numbers` are further options, with their defaults, for `self.options`.

    A fifth of the rank's own examples is held out: its `own_accuracy` is that of `own_model`, which is the model unless
    an algorithm has a personal one. `accuracy` is that of the model on the rank's share of the common test set.
    """

    def __init__(
        self, context: WorkloadContext, build_model: Callable[[], nn.Module] | None = None, **numbers: float
    ) -> None:
        reader = OptionReader(context.options)
        alpha, defaults = read_alpha(reader), {"lr": 0.1, **numbers}
        self.options = {name: reader.number(name, default=default) for name, default in defaults.items()}
        self._epochs, self._batch_size = reader.integer("epochs", default=2), reader.integer("batch-size", default=32)
        self._is_uneven = reader.choice("work", default="even", choices=("even", "uneven")) == "uneven"
        reader.finish()
        self._generator = torch.Generator().manual_seed(1000 * context.seed + context.rank)

        data = load_data()
        mean, std = data.mean[0], data.std[0]
        images, test_images = ((each / data.maximum - mean) / std for each in (data.train_images, data.test_images))
        mine, test = rank_indices(data, context, alpha)
        mine = mine[torch.randperm(len(mine), generator=self._generator)]
        own_test, mine = mine[: len(mine) // 5], mine[len(mine) // 5 :]
        self.examples = images[mine], data.train_labels[mine]
        self._own_test = images[own_test], data.train_labels[own_test]
        self._test = test_images[test], data.test_labels[test]

        torch.manual_seed(context.seed)
        self.model = self.own_model = build_model() if build_model else small_conv_net(image_size=8)

    def train(self, task: Any) -> TrainResult:
        return self.result(self.descend(task, self.model))

    def result(self, steps: int, extra: dict[str, Tensor] | None = None, **metrics: float) -> TrainResult:
        """Say how many examples and steps there were, and what else the server's rule needs."""
        return TrainResult(len(self.examples[1]), {"steps": steps, **metrics}, extra or {})

    def descend(self, task: Any, model: nn.Module, correction: Correction = lambda name, w: 0.0) -> int:
        """Train a model, w -= lr * (gradient + correction(name, w)), for a round's batches; returns their number."""
        model.train()
        named = [(name, w) for name, w in model.named_parameters() if w.requires_grad]
        steps = 0
        for images, labels in self.batches():
            if task.should_stop():
                break
            loss = functional.cross_entropy(model(images), labels)
            gradients = torch.autograd.grad(loss, [w for _, w in named])
            with torch.no_grad():
                for (name, w), gradient in zip(named, gradients, strict=True):
                    w -= self.options["lr"] * (gradient + correction(name, w))
            steps += 1
        return steps

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through the rank's examples for the epochs of a round, each time in another order."""
        images, labels = self.examples
        epochs = self._epochs
        if self._is_uneven:
            epochs = int(torch.randint(1, 2 * epochs, (), generator=self._generator))
        for _ in range(epochs):
            for batch in torch.randperm(len(labels), generator=self._generator).split(self._batch_size):
                yield images[batch], labels[batch]

    @torch.no_grad()
    def evaluate(self, task: Any) -> EvaluateResult:
        _, own = measure(self.own_model, *self._own_test)
        loss, accuracy = measure(self.model, *self._test)
        return EvaluateResult(loss, len(self._test[1]), {"accuracy": accuracy, "own_accuracy": own})

    def local_state(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_local_state(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copy the parameters, by name: as they are at the start of a round they are the global state."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def measure(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    logits = model.eval()(images)
    hits = (logits.argmax(dim=1) == labels).sum().item()
    return functional.cross_entropy(logits, labels).item(), hits / len(labels)
