"""Pieces of a training loop: its settings, the proximal term of FedProx, and the sums behind the metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fedsplit.errors import StateMismatchError
from fedsplit.workloads.options import OptionReader


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a round is trained. `read` is their check; an option has the field's name in kebab case.

    Attributes
    ----------
    epochs : int
        Passes over this rank's partition in one round.
    batch_size : int
        Examples in a step; the last batch of an epoch may be smaller.
    lr, momentum, weight_decay : float
        Of SGD.
    proximal : float
        mu of FedProx (see `proximal_term`); 0 is plain FedAvg.
    """

    epochs: int = 1
    batch_size: int = 32
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    proximal: float = 0.0

    def read(self, reader: OptionReader) -> TrainingSettings:
        """Return the settings that the options ask for; what they do not name stays as it is here."""
        return dataclasses.replace(
            self.read_round(reader),
            momentum=reader.number("momentum", default=self.momentum, below=1.0),
            weight_decay=reader.number("weight-decay", default=self.weight_decay),
        )

    def read_round(self, reader: OptionReader) -> TrainingSettings:
        """Read what a server may change for one round: epochs, batch-size, lr and proximal."""
        return dataclasses.replace(
            self,
            epochs=reader.integer("epochs", default=self.epochs),
            batch_size=reader.integer("batch-size", default=self.batch_size),
            lr=reader.number("lr", default=self.lr, above=0.0),
            proximal=reader.number("proximal", default=self.proximal),
        )


def proximal_term(model: nn.Module, global_parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return 1/2 * ||w - w_global||^2 over the trainable parameters, to be added to a loss times mu.

    The term of FedProx: Li et al., "Federated Optimization in Heterogeneous Networks", 2020
    (arXiv:1812.06127).

    Parameters
    ----------
    model : Module
        The model in training, w.
    global_parameters : Mapping[str, Tensor]
        w_global by name, such as ``task.state_dict``; entries that are no trainable parameters are passed
        over.

    Returns
    -------
    Tensor, 0-d
        With a gradient for w and none for w_global.

    Raises
    ------
    StateMismatchError
        If a parameter is not there or has another shape.
    """
    total = torch.zeros(())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        anchor = global_parameters.get(name)
        if anchor is None or anchor.shape != parameter.shape:
            found = "none" if anchor is None else f"shape {tuple(anchor.shape)}"
            raise StateMismatchError(
                f"proximal term: expected a global parameter {name!r} of shape {tuple(parameter.shape)}, found {found}"
            )
        total = total.to(parameter.device) + (parameter - anchor.detach().to(parameter)).square().sum()
    return total / 2


class Tally:
    """Adds up the losses and hits of a task's batches."""

    def __init__(self, batches: int, on_batch: Callable[[int, int, float, int], None] | None, epochs: int = 1) -> None:
        self.examples = 0
        self._done, self._total, self._epochs, self._on_batch = 0, batches * epochs, epochs, on_batch
        self._loss, self._hits = 0.0, 0

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        mean_loss = loss.item()
        self.examples += len(labels)
        self._loss += mean_loss * len(labels)
        self._hits += int((logits.argmax(dim=1) == labels).sum())
        self._done += 1
        if self._on_batch is not None:
            self._on_batch(self._done, self._total, mean_loss, self._epochs)

    def means(self) -> dict[str, float]:
        if not self.examples:
            return {}
        return {"loss": self._loss / self.examples, "accuracy": self._hits / self.examples}
