"""FedBN: the BatchNorm layers stay with the ranks, their weights as well as their running statistics.

Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", 2021 (arXiv:2102.07623):

    python -m fedsplit run --ranks 4 --rounds 20 --workload examples.algorithms.fedbn:FedBN \\
        --aggregate "<*BatchNorm*>=local" --aggregate fedavg \\
        --workload-option partition=dirichlet --workload-option alpha=0.1

Training is FedAvg's, and the server's half is a flag: the patterns name the layers. What is local never travels, and is
kept in the trainer's checkpoints.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from examples.algorithms.digits import Digits
from fedsplit import WorkloadContext


class FedBN(Digits):
    """The trainer's half: FedAvg's, with a network that has such layers."""

    def __init__(self, context: WorkloadContext) -> None:
        super().__init__(context, network)


def network() -> nn.Module:
    """Return the network of the others, with a BatchNorm after each convolution."""
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(1, 16, kernel_size=3, padding=1), norm1=nn.BatchNorm2d(16), relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(16, 32, kernel_size=3, padding=1), norm2=nn.BatchNorm2d(32), relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2), flatten=nn.Flatten(), hidden=nn.Linear(128, 64), relu3=nn.ReLU(),
        output=nn.Linear(64, 10),
    ))  # fmt: skip
