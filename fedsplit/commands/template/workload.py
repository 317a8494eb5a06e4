"""What each rank trains: two intertwined spirals, of which every rank has points of its own.

Replace the data and the model by yours; what is looked for are `make_workload`, `model`, `train` and `evaluate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedsplit import EvaluateResult, TrainResult, WorkloadContext

_TURNS = 1.25


class Net(nn.Module):
    """A small network, in two parts: what all ranks share, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.head = nn.Linear(32, 2)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        """Return the logits of both spirals."""
        logits: torch.Tensor = self.head(self.body(points))
        return logits


class Spirals:
    """The workload of one rank."""

    def __init__(self, context: WorkloadContext) -> None:
        # The same seed on every rank, so that all start from the same model.
        torch.manual_seed(context.seed)
        self.model = Net().to(context.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=float(context.options.get("lr", 0.01)))
        self.epochs = int(context.options.get("epochs", 20))
        # Set by a trainer on a terminal, to show batches done, batches in all, the loss, and in how many epochs.
        self.on_batch: Callable[[int, int, float, int], None] | None = None
        # Other points for every rank; the last of them are kept for evaluation.
        points, labels = make_spirals(400, seed=1000 * context.seed + context.rank)
        points, labels = points.to(context.device), labels.to(context.device)
        self.training, self.test = (points[:300], labels[:300]), (points[300:], labels[300:])

    def train(self, task: Any) -> TrainResult:
        """Train for some epochs; the global state is in the model already."""
        points, labels = self.training
        self.model.train()
        loss = torch.zeros(())
        for epoch in range(1, self.epochs + 1):
            if task.should_stop():
                break
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(points), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            if self.on_batch:
                self.on_batch(epoch, self.epochs, loss.item(), self.epochs)
        return TrainResult(num_examples=len(points), metrics={"loss": loss.item()})

    @torch.no_grad()
    def evaluate(self, task: Any) -> EvaluateResult:
        """Judge the global state on points that nobody trained on."""
        points, labels = self.test
        self.model.eval()
        logits = self.model(points)
        loss = nn.functional.cross_entropy(logits, labels).item()
        accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
        return EvaluateResult(loss=loss, num_examples=len(points), metrics={"accuracy": accuracy})

    def local_state(self) -> dict[str, Any]:
        """What must outlive this process: a trainer that is killed and started again goes on with it."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.optimizer.load_state_dict(state["optimizer"])


def make_workload(context: WorkloadContext) -> Spirals:
    """What `--workload` names."""
    return Spirals(context)


def make_spirals(number: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return points of both spirals, shape (number, 2), and which of the two each belongs to."""
    generator = torch.Generator().manual_seed(seed)
    along = torch.rand(number, generator=generator).sqrt()
    labels = torch.arange(number) % 2
    angle = along * _TURNS * 2 * math.pi + labels * math.pi
    points = torch.stack([along * angle.cos(), along * angle.sin()], dim=1)
    return points + 0.02 * torch.randn(points.shape, generator=generator), labels
