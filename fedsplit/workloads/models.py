"""The models of the built-in workloads. None has dropout: a round depends on no hidden generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class SmallConvNet(nn.Module):
    """Two convolutions and two linear layers for small grey images.

    Parameters
    ----------
    image_size : int
        Height and width of the images in pixels; a multiple of 4.
    num_classes : int
        How many classes.
    """

    def __init__(self, image_size: int, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(32 * (image_size // 4) ** 2, 64),
            nn.ReLU(),
            nn.Linear(64, num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map (N, 1, size, size) images to (N, num_classes) logits."""
        logits: torch.Tensor = self.classifier(self.features(images))
        return logits


def cifar_resnet18(norm: str = "batch", num_classes: int = 10) -> nn.Module:
    """Return torchvision's ResNet-18 with the stem for 32x32 images: a 3x3 convolution and no pooling.

    This is how He et al., 2016 (arXiv:1512.03385, section 4.2) treat CIFAR-10; ImageNet's stem would leave
    the first block 8x8 pixels.

    Parameters
    ----------
    norm : {"batch", "group"}
        BatchNorm, the default, learns fastest on parts that look alike; the server averages its running
        statistics and takes the largest `num_batches_tracked`. On parts with different classes these
        statistics fit nobody: GroupNorm, here with two channels a group, is the remedy of Hsieh et al., 2020
        (arXiv:1910.00189).
    num_classes : int
        How many classes.
    """
    # Late: torchvision takes 2 s to import, and the other models do without.
    from torchvision.models import resnet18

    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d
    if norm == "group":
        norm_layer = _group_norm
    model: nn.Module = resnet18(weights=None, num_classes=num_classes, norm_layer=norm_layer)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def _group_norm(num_channels: int) -> nn.Module:
    return nn.GroupNorm(num_channels // 2, num_channels)
