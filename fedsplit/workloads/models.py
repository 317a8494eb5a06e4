"""The models of the built-in workloads. None has dropout, whose generator would be state that nobody saves."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import nn


def small_conv_net(image_size: int) -> nn.Module:
    """Return two convolutions and two linear layers for ten classes of small grey images.

    Parameters
    ----------
    image_size : int
        Height and width of the images in pixels; a multiple of 4.
    """
    features = nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    classifier = nn.Sequential(
        nn.Flatten(), nn.Linear(32 * (image_size // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, 10)
    )  # fmt: skip
    return nn.Sequential(OrderedDict(features=features, classifier=classifier))


def cifar_resnet18(norm: str = "batch") -> nn.Module:
    """Return torchvision's ResNet-18 for ten classes of 32x32 images: a 3x3 convolution first, and no pooling.

    He et al., 2016 (arXiv:1512.03385, section 4.2) treat CIFAR-10 so; the first layers for ImageNet would leave the
    first block 8x8 pixels.

    Parameters
    ----------
    norm : {"batch", "group"}
        BatchNorm learns fastest where the parts look alike; the server averages its running statistics. Where the parts
        have different classes, these statistics fit nobody. GroupNorm, here with two channels a group, is the remedy of
        Hsieh et al., 2020 (arXiv:1910.00189).
    """
    # Late: torchvision takes 2 s to import, and the other models do without.
    from torchvision.models import resnet18

    norm_layer: Callable[[int], nn.Module] = _group_norm if norm == "group" else nn.BatchNorm2d
    model: nn.Module = resnet18(weights=None, num_classes=10, norm_layer=norm_layer)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def _group_norm(num_channels: int) -> nn.Module:
    return nn.GroupNorm(num_channels // 2, num_channels)
