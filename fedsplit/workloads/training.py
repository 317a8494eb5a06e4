"""Pieces of a training loop: its settings, the proximal term of FedProx, and the sums behind the metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from fedsplit.workloads.options import OptionReader


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a round is trained; an option has the field's name in kebab case.

    Attributes
    ----------
    epochs : int
        Passes over this rank's partition in one round.
    batch_size : int
        Examples in a step; the last batch of an epoch may be smaller.
    lr, momentum, weight_decay : float
        Of SGD.
    proximal : float
        mu of FedProx; 0 is plain FedAvg.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float = 0.0
    proximal: float = 0.0

    def read(self, reader: OptionReader) -> TrainingSettings:
        """Return the settings that the options ask for; what they do not name stays as it is here."""
        return replace(
            self.read_round(reader),
            momentum=reader.number("momentum", default=self.momentum, below=1.0),
            weight_decay=reader.number("weight-decay", default=self.weight_decay),
        )

    def read_round(self, reader: OptionReader) -> TrainingSettings:
        """Read what a server may change for one round: epochs, batch-size, lr and proximal."""
        return replace(
            self,
            epochs=reader.integer("epochs", default=self.epochs),
            batch_size=reader.integer("batch-size", default=self.batch_size),
            lr=reader.number("lr", default=self.lr, above=0.0),
            proximal=reader.number("proximal", default=self.proximal),
        )


def proximal_term(model: nn.Module, anchor: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return 1/2 * ||w - w_global||^2 over the trainable parameters, to be added to a loss times mu.

    Li et al., "Federated Optimization in Heterogeneous Networks", 2020 (arXiv:1812.06127).

    Parameters
    ----------
    model : Module
        The model in training, w.
    anchor : Mapping[str, Tensor]
        w_global: the parameters by name, on the model's device, without a gradient.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    distances = [(parameter - anchor[name]).square().sum() for name, parameter in trainable]
    return sum(distances, torch.zeros((), device=distances[0].device)) / 2


class Tally:
    """Adds up the losses and hits of a task's batches.

    Parameters
    ----------
    total
        How many batches the task has.
    on_batch
        See `fedsplit.workloads.image.ImageWorkload`.
    """

    def __init__(self, total: int, on_batch: Callable[[int, int, float, int], None] | None, epochs: int = 1) -> None:
        self.examples = 0
        self._done, self._total, self._epochs, self._on_batch = 0, total, epochs, on_batch
        self._loss, self._hits = 0.0, 0

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: its mean loss, logits of shape (N, classes), labels of shape (N,)."""
        mean_loss = loss.item()
        self.examples += len(labels)
        self._loss += mean_loss * len(labels)
        self._hits += int((logits.argmax(dim=1) == labels).sum())
        self._done += 1
        if self._on_batch is not None:
            self._on_batch(self._done, self._total, mean_loss, self._epochs)

    def means(self) -> dict[str, float]:
        """Return the mean loss and the accuracy; nothing without an example."""
        if not self.examples:
            return {}
        return {"loss": self._loss / self.examples, "accuracy": self._hits / self.examples}
