"""Two networks, two optimizers: a GAN that draws digits. The generator is shared, each discriminator stays at home.

    python server_main.py --rounds 12 --aggregate "discriminator.*=local" --aggregate fedavg
    python client_main.py --rank 1
    python client_main.py --rank 2
    python model_main.py --rank 1 --workload examples.gan_digits:gan
    python model_main.py --rank 2 --workload examples.gan_digits:gan

Neither Flower nor the server knows that this is a GAN: it is a module with two parts, and the split keeps one of them
where it is. The generator is asked for a digit and draws it; `accuracy` is how often a classifier that has seen only
real digits reads the one that was asked for. Twelve rounds reach over 0.7; chance is 0.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fedsplit import EvaluateResult, TrainResult, WorkloadContext
from fedsplit.workloads.digits import load_data

NOISE, CLASSES, DRAWN = 16, 10, 50


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(NOISE + CLASSES, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid()
        )
        self.discriminator = nn.Sequential(
            nn.Linear(64 + CLASSES, 128), nn.LeakyReLU(0.2), nn.Linear(128, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)
        )

    def draw(self, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Map labels, shape (N,), to images, shape (N, 64), of pixels between 0 and 1."""
        noise = torch.randn(len(labels), NOISE, generator=generator)
        return self.generator(torch.cat([noise, functional.one_hot(labels, CLASSES)], dim=1))

    def judge(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """How real each image looks for its label: logits, shape (N,)."""
        return self.discriminator(torch.cat([images, functional.one_hot(labels, CLASSES)], dim=1)).squeeze(1)


class GanWorkload:
    def __init__(self, context: WorkloadContext) -> None:
        data = load_data()
        mine = slice(context.rank - 1, None, context.num_partitions)
        self._images = data.train_images[mine].flatten(1) / 16
        self._labels = data.train_labels[mine]
        self._reader = fit_reader(data.test_images.flatten(1) / 16, data.test_labels)
        self._epochs = int(context.options.get("epochs", 10))
        torch.manual_seed(context.seed)
        self.model = Gan()
        self._optimizers = {
            "generator": torch.optim.Adam(self.model.generator.parameters(), lr=1e-3, betas=(0.5, 0.999)),
            "discriminator": torch.optim.Adam(self.model.discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999)),
        }
        self._random = torch.Generator().manual_seed(1000 * context.seed + context.rank)

    def train(self, task: Any) -> TrainResult:
        sums, steps = {"generator_loss": 0.0, "discriminator_loss": 0.0}, 0
        for _ in range(self._epochs):
            for batch in torch.randperm(len(self._images), generator=self._random).split(64):
                if task.should_stop():
                    break
                for name, loss in self._step(self._images[batch], self._labels[batch]).items():
                    sums[name] += loss
                steps += 1
        return TrainResult(len(self._images), {name: total / max(1, steps) for name, total in sums.items()})

    def evaluate(self, task: Any) -> EvaluateResult:
        labels = torch.arange(CLASSES).repeat(DRAWN)
        with torch.no_grad():
            images = self.model.draw(labels, torch.Generator().manual_seed(0))
            believed = self.model.judge(images, labels)
            fooled = functional.binary_cross_entropy_with_logits(believed, torch.ones_like(believed))
        read = (torch.cat([images, torch.ones(len(images), 1)], dim=1) @ self._reader).argmax(dim=1)
        return EvaluateResult(fooled.item(), len(labels), {"accuracy": (read == labels).float().mean().item()})

    def local_state(self) -> dict[str, Any]:
        optimizers = {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}
        return {"optimizers": optimizers, "random": self._random.get_state()}

    def load_local_state(self, state: dict[str, Any]) -> None:
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self._random.set_state(state["random"])

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        drawn = self.model.draw(labels, self._random)
        real, false = self.model.judge(images, labels), self.model.judge(drawn.detach(), labels)
        bce = functional.binary_cross_entropy_with_logits
        discriminator_loss = bce(real, torch.full_like(real, 0.9)) + bce(false, torch.zeros_like(false))
        self._update("discriminator", discriminator_loss)
        believed = self.model.judge(drawn, labels)
        generator_loss = bce(believed, torch.ones_like(believed))
        self._update("generator", generator_loss)
        return {"generator_loss": generator_loss.item(), "discriminator_loss": discriminator_loss.item()}

    def _update(self, name: str, loss: torch.Tensor) -> None:
        self.model.zero_grad()
        loss.backward()
        self._optimizers[name].step()


def fit_reader(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A linear classifier by least squares, from real images that no GAN is trained on; shape (65, 10)."""
    inputs = torch.cat([images, torch.ones(len(images), 1)], dim=1).double()
    targets = functional.one_hot(labels, CLASSES).double()
    return torch.linalg.solve(inputs.T @ inputs + torch.eye(inputs.shape[1]), inputs.T @ targets).float()


def gan(context: WorkloadContext) -> GanWorkload:
    """The factory for ``model_main.py --workload examples.gan_digits:gan``."""
    return GanWorkload(context)
