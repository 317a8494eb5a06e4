"""CIFAR-10, MNIST and Fashion-MNIST by torchvision's own data set classes.

Files are looked for in ``--data-dir`` (`data` if there is none), where torchvision keeps them, and downloaded if they
are not there; the published archives may be put there as well.

Not promised: that MNIST's files are the official ones, as torchvision has checksums of its archives only.
"""

import contextlib
import functools
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import nn

from fedsplit.errors import MissingPackageError, WorkloadError
from fedsplit.workloads import OptionReader, WorkloadContext
from fedsplit.workloads.image import ImageData, ImageWorkload, TrainingSettings, small_conv_net

log = logging.getLogger("fedsplit")

# Of a silent connection, not of the download: without it, urllib waits for ever.
_NETWORK_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Source:
    """A data set of torchvision. Of its images: channels, height and width, and the channels' mean and deviation."""

    name: str
    class_name: str
    folder: str
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


MNIST = Source("mnist", "MNIST", "MNIST/raw", (1, 28, 28), (0.1307,), (0.3081,))
FASHION_MNIST = Source("fashion-mnist", "FashionMNIST", "FashionMNIST/raw", (1, 28, 28), (0.2860,), (0.3530,))
CIFAR10 = Source(
    "cifar10", "CIFAR10", "cifar-10-batches-py", (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
)


def make(source: Source, context: WorkloadContext) -> ImageWorkload:
    """Make the workload of a data set.

    Its options are those of `TrainingSettings` and of `read_alpha`, ``limit=N``, and for CIFAR-10 ``norm=batch`` or
    ``norm=group``.
    """
    reader = OptionReader(context.options)
    build_model, weight_decay = functools.partial(small_conv_net, 28), 0.0
    if source is CIFAR10:
        norm = reader.choice("norm", default="batch", choices=("batch", "group"))
        build_model, weight_decay = functools.partial(cifar_resnet18, norm), 5e-4
    limit = reader.integer("limit", default=0) or None
    load = functools.partial(load_data, source, (context.data_dir or Path("data")).expanduser(), limit)
    defaults = TrainingSettings(epochs=1, batch_size=64, lr=0.05, momentum=0.9, weight_decay=weight_decay)
    return ImageWorkload(context, reader, load, build_model, defaults)


mnist = functools.partial(make, MNIST)
fashion_mnist = functools.partial(make, FASHION_MNIST)
cifar10 = functools.partial(make, CIFAR10)


def cifar_resnet18(norm: str = "batch") -> nn.Module:
    """Return torchvision's ResNet-18 for ten classes of 32x32 images: a 3x3 convolution first, and no pooling.

    So do He et al., 2016 (arXiv:1512.03385, section 4.2): the first layers for ImageNet would leave the first block 8x8
    pixels. With `norm` "batch" the server averages BatchNorm's running statistics, which fit nobody where the ranks
    have different classes. There "group", GroupNorm, is the remedy of Hsieh et al., 2020 (arXiv:1910.00189).
    """
    # Late: torchvision takes 2 s to import, and a wrong option should not have to wait for it.
    from torchvision.models import resnet18

    layers = {"batch": nn.BatchNorm2d, "group": lambda channels: nn.GroupNorm(channels // 2, channels)}
    model: nn.Module = resnet18(weights=None, num_classes=10, norm_layer=layers[norm])
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def load_data(source: Source, data_dir: Path, limit: int | None = None) -> ImageData:
    """Return a data set, downloaded if it is not there: the first `limit` training images, and all test images.

    Raises WorkloadError if the files cannot be downloaded or are damaged, MissingPackageError without torchvision.
    """
    try:
        import torchvision.datasets
    except ModuleNotFoundError as exc:
        raise MissingPackageError(f"the workload {source.name}", "torchvision", "vision") from exc

    dataset_class = getattr(torchvision.datasets, source.class_name)
    folder, split, timeout_before = data_dir / source.folder, "training", socket.getdefaulttimeout()
    with _exclusive(data_dir):
        if not folder.is_dir():
            log.info("%s is not in %s: downloading it", source.name, data_dir)
        socket.setdefaulttimeout(_NETWORK_TIMEOUT_S)
        try:
            images, labels = _check(source, dataset_class(str(data_dir), train=True, download=True))
            split = "test"
            test_images, test_labels = _check(source, dataset_class(str(data_dir), train=False))
        except Exception as exc:  # torchvision lets through whatever its downloads and its parsers raise
            reason = " ".join(f"{type(exc).__name__}: {exc}".split())
            raise WorkloadError(
                f"{source.name}: missing or damaged files in {folder} ({split} split: {reason}); copy good ones there, "
                "or remove damaged ones so that they are downloaded again; --workload digits needs no download"
            ) from exc
        finally:
            socket.setdefaulttimeout(timeout_before)
    return ImageData(
        train_images=images[:limit], train_labels=labels[:limit], test_images=test_images, test_labels=test_labels,
        mean=source.mean, std=source.std,
    )  # fmt: skip


@contextlib.contextmanager
def _exclusive(data_dir: Path) -> Iterator[None]:
    """Make trainers that share a directory download once, and none read a file that another is still unpacking."""
    lock = filelock.FileLock(data_dir / ".fedsplit.lock")
    # A directory that cannot be written to cannot be downloaded to either: there is nothing to guard.
    with contextlib.suppress(OSError):
        data_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            log.info("waiting for another process that reads or downloads the data in %s", data_dir)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check(source: Source, dataset: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels; raises ValueError if they do not fit each other: MNIST's files have no checksum."""
    images, labels = torch.as_tensor(np.asarray(dataset.data)), torch.as_tensor(dataset.targets, dtype=torch.int64)
    images = images.permute(0, 3, 1, 2).contiguous() if images.dim() == 4 else images.unsqueeze(1)
    if tuple(images.shape[1:]) != source.shape:
        raise ValueError(f"expected images of shape {source.shape}, found {tuple(images.shape[1:])}")
    if not 0 < len(images) == len(labels):
        raise ValueError(f"expected a label for each image, found {len(images)} images, {len(labels)} labels")
    if not 0 <= int(labels.min()) <= int(labels.max()) <= 9:
        raise ValueError(f"expected labels 0 to 9, found {int(labels.min())} to {int(labels.max())}")
    return images, labels
