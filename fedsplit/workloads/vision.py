"""CIFAR-10, MNIST and Fashion-MNIST by torchvision's own data set classes.

Files are looked for in ``--data-dir`` (`data` if there is none), where torchvision keeps them, and downloaded if they
are not there; the published archives may be put there as well. A lock makes trainers that share the directory download
once, and none reads a file that another is still unpacking.

Not promised: that MNIST's files are the official ones, as torchvision has checksums of its archives only.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import logging
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
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
NETWORK_TIMEOUT_S = 30.0

# All that torchvision's parsers are seen to raise on damaged files: plain assertions, and CIFAR's files are pickles.
_READ_ERRORS = (OSError, RuntimeError, ValueError, TypeError, LookupError, AssertionError, EOFError, UnpicklingError)


@dataclass(frozen=True)
class Source:
    """A data set of torchvision. Of its images: channels, height and width, and the channels' mean and deviation."""

    name: str
    class_name: str
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


MNIST = Source("mnist", "MNIST", (1, 28, 28), (0.1307,), (0.3081,))
FASHION_MNIST = Source("fashion-mnist", "FashionMNIST", (1, 28, 28), (0.2860,), (0.3530,))
CIFAR10 = Source("cifar10", "CIFAR10", (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def mnist(context: WorkloadContext) -> ImageWorkload:
    """Make the workload; options are those of `TrainingSettings` and of `read_alpha`, and ``limit=N``."""
    return _make(MNIST, context)


def fashion_mnist(context: WorkloadContext) -> ImageWorkload:
    """Make the workload; its options are those of `mnist`."""
    return _make(FASHION_MNIST, context)


def cifar10(context: WorkloadContext) -> ImageWorkload:
    """Make the workload; its options are those of `mnist`, and ``norm=batch`` or ``norm=group``."""
    return _make(CIFAR10, context)


def _make(source: Source, context: WorkloadContext) -> ImageWorkload:
    reader = OptionReader(context.options)
    build_model: Callable[[], nn.Module]
    if source is CIFAR10:
        norm = reader.choice("norm", default="batch", choices=("batch", "group"))
        build_model = functools.partial(cifar_resnet18, norm)
    else:
        build_model = functools.partial(small_conv_net, image_size=28)
    limit = reader.integer("limit", default=0) or None
    load = functools.partial(load_data, source, (context.data_dir or Path("data")).expanduser(), limit)
    weight_decay = 5e-4 if source is CIFAR10 else 0.0
    defaults = TrainingSettings(epochs=1, batch_size=64, lr=0.05, momentum=0.9, weight_decay=weight_decay)
    return ImageWorkload(context, reader, load, build_model, defaults)


def cifar_resnet18(norm: str = "batch") -> nn.Module:
    """Return torchvision's ResNet-18 for ten classes of 32x32 images: a 3x3 convolution first, and no pooling.

    So do He et al., 2016 (arXiv:1512.03385, section 4.2): the first layers for ImageNet would leave the first block 8x8
    pixels. With `norm` "batch" the server averages BatchNorm's running statistics, which fit nobody where the ranks
    have different classes. There "group", GroupNorm, is the remedy of Hsieh et al., 2020 (arXiv:1910.00189).
    """
    # Late: torchvision takes 2 s to import, and a wrong option should not have to wait for it.
    from torchvision.models import resnet18

    layer: Callable[[int], nn.Module] = _group_norm if norm == "group" else nn.BatchNorm2d
    model: nn.Module = resnet18(weights=None, num_classes=10, norm_layer=layer)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 2, channels)


def load_data(source: Source, data_dir: Path, limit: int | None = None) -> ImageData:
    """Return a data set, downloaded if it is not there: the first `limit` training images, and all test images.

    Raises WorkloadError if the files cannot be downloaded or are damaged, MissingPackageError without torchvision.
    """
    try:
        import torchvision.datasets
    except ModuleNotFoundError as exc:
        raise MissingPackageError(f"the workload {source.name}", "torchvision", "vision") from exc

    dataset_class = getattr(torchvision.datasets, source.class_name)
    with _exclusive(data_dir):
        _ensure_present(source, dataset_class, data_dir)
        images, labels = _read(source, dataset_class, data_dir, train=True)
        test_images, test_labels = _read(source, dataset_class, data_dir, train=False)
    return ImageData(
        train_images=images[:limit], train_labels=labels[:limit], test_images=test_images, test_labels=test_labels,
        mean=source.mean, std=source.std,
    )  # fmt: skip


@contextlib.contextmanager
def _exclusive(data_dir: Path) -> Iterator[None]:
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


def _expected_files(dataset_class: Any, data_dir: Path) -> dict[Path, str | None]:
    """Return the files that torchvision reads, with their checksums where it has them."""
    if hasattr(dataset_class, "base_folder"):
        folder = data_dir / dataset_class.base_folder
        files = dict(dataset_class.train_list + dataset_class.test_list)
        files[dataset_class.meta["filename"]] = dataset_class.meta["md5"]
        return {folder / name: md5 for name, md5 in files.items()}
    folder = data_dir / dataset_class.__name__ / "raw"
    return {folder / Path(archive).stem: None for archive, _ in dataset_class.resources}


def _ensure_present(source: Source, dataset_class: Any, data_dir: Path) -> None:
    files = _expected_files(dataset_class, data_dir)
    if all(path.is_file() for path in files):
        return
    log.info("%s is not in %s: downloading it", source.name, data_dir)
    reason, timeout_before = "it left files out", socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT_S)
    try:
        dataset_class(str(data_dir), download=True)
    except (*_READ_ERRORS, http.client.HTTPException) as exc:
        reason = " ".join(f"{type(exc).__name__}: {exc}".split())
    finally:
        socket.setdefaulttimeout(timeout_before)
    if missing := [path for path in files if not path.is_file()]:
        raise WorkloadError(
            f"{source.name}: expected {', '.join(path.name for path in missing)} in {missing[0].parent}; "
            f"they are not there and downloading them failed ({reason}); copy them there, or use --workload "
            "digits, which needs no download"
        )


def _read(source: Source, dataset_class: Any, data_dir: Path, *, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    from torchvision.datasets.utils import check_integrity

    try:
        dataset = dataset_class(str(data_dir), train=train)
        images = torch.as_tensor(np.asarray(dataset.data))
        labels = torch.as_tensor(dataset.targets, dtype=torch.int64)
        images = images.permute(0, 3, 1, 2).contiguous() if images.dim() == 4 else images.unsqueeze(1)
        # MNIST's files have no checksum: see that images and labels fit each other.
        if tuple(images.shape[1:]) != source.shape:
            raise ValueError(f"expected images of shape {source.shape}, found {tuple(images.shape[1:])}")
        if not 0 < len(images) == len(labels):
            raise ValueError(f"expected a label for each image, found {len(images)} images, {len(labels)} labels")
        if not 0 <= int(labels.min()) <= int(labels.max()) <= 9:
            raise ValueError(f"expected labels 0 to 9, found {int(labels.min())} to {int(labels.max())}")
    except _READ_ERRORS as exc:
        files = _expected_files(dataset_class, data_dir)
        wrong = [path.name for path, md5 in files.items() if md5 and not check_integrity(str(path), md5)]
        which = f"wrong checksum of {', '.join(wrong)}" if wrong else f"{'training' if train else 'test'} split"
        raise WorkloadError(
            f"{source.name}: damaged files in {next(iter(files)).parent} ({which}; {type(exc).__name__}: {exc}); "
            "remove them so that they are downloaded again, or copy good ones there"
        ) from exc
    return images, labels
