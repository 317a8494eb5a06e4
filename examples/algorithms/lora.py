"""LoRA only: everybody has the same pretrained network, and only small additions to its layers are trained and travel.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv:2106.09685), averaged as by Zhang et al.,
"Towards Building the Federated GPT: Federated Instruction Tuning", 2023 (arXiv:2305.05644):

    python -m fedsplit run --ranks 4 --rounds 20 --workload examples.algorithms.lora:Lora \\
        --aggregate "*lora_*=fedavg" --aggregate "*=local" \\
        --workload-option partition=dirichlet --workload-option alpha=0.1

A layer W x becomes W x + B A x: W is frozen, A begins as random numbers and B as 0. examples/lora_languages.py is the
same with Transformers and PEFT.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.algorithms.digits import Digits
from fedsplit import WorkloadContext
from fedsplit.workloads.digits import load_data

RANK = 4


class Lora(Digits):
    """The trainer's half: FedAvg's, which leaves what is frozen as it is."""

    def __init__(self, context: WorkloadContext) -> None:
        super().__init__(context, adapted)


class Adapted(nn.Module):
    """A frozen linear layer with an addition of rank `RANK`."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_a.T @ self.lora_b.T


def adapted() -> nn.Module:
    """Return a network that has learned to read digits in a mirror, for the want of a public model, and additions."""
    layers = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    network, data = nn.Sequential(nn.Flatten(), *layers), load_data()
    optimizer, images = torch.optim.Adam(network.parameters(), lr=1e-3), data.train_images.flip(-1) / data.maximum
    for _ in range(5):
        for batch in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            functional.cross_entropy(network(images[batch]), data.train_labels[batch]).backward()
            optimizer.step()
    return nn.Sequential(*(Adapted(each) if isinstance(each, nn.Linear) else each for each in network))
