"""CIFAR-10, MNIST and Fashion-MNIST by torchvision's own data set classes.

Files are looked for in ``--data-dir`` (`data` if there is none), where torchvision keeps them, and downloaded if they
are not there; the archives as they are published may be put there as well. Both happen under a lock: trainers that
start together and share the directory download once, and none reads a file that another is still unpacking.

Not promised: that MNIST's files are the official ones. torchvision has checksums of its archives only, so what is
checked here is that images and labels fit each other. CIFAR-10's files are checked against their checksums.
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
from fedsplit.workloads.base import WorkloadContext
from fedsplit.workloads.image import ImageData, ImageWorkload
from fedsplit.workloads.models import cifar_resnet18, small_conv_net
from fedsplit.workloads.options import OptionReader
from fedsplit.workloads.training import TrainingSettings

log = logging.getLogger("fedsplit")

DEFAULT_DATA_DIR = Path("data")

# Of a silent connection, not of the download: without it, urllib waits for ever.
NETWORK_TIMEOUT_S = 30.0

# All that torchvision's parsers are seen to raise on damaged files: plain assertions, and CIFAR's files are pickles.
_READ_ERRORS = (
    OSError, RuntimeError, ValueError, TypeError, LookupError, AssertionError, EOFError, UnpicklingError,
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A data set of torchvision.

    Attributes
    ----------
    name : str
        The workload's name, for messages.
    class_name : str
        Its class in `torchvision.datasets`.
    shape : tuple of int
        Channels, height and width of an image.
    mean, std : tuple of float
        Of the training images' channels, white being 1.
    """

    name: str
    class_name: str
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


MNIST = Source("mnist", "MNIST", (1, 28, 28), (0.1307,), (0.3081,))
FASHION_MNIST = Source("fashion-mnist", "FashionMNIST", (1, 28, 28), (0.2860,), (0.3530,))
CIFAR10 = Source("cifar10", "CIFAR10", (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

_GREY_MODEL = functools.partial(small_conv_net, image_size=28)


def mnist(context: WorkloadContext) -> ImageWorkload:
    """Make the workload; options are those of `TrainingSettings` and of `read_alpha`, and ``limit=N``."""
    return _make(MNIST, context, OptionReader(context.options), _GREY_MODEL)


def fashion_mnist(context: WorkloadContext) -> ImageWorkload:
    """Make the workload; its options are those of `mnist`."""
    return _make(FASHION_MNIST, context, OptionReader(context.options), _GREY_MODEL)


def cifar10(context: WorkloadContext) -> ImageWorkload:
    """Make the workload; its options are those of `mnist`, and ``norm=batch`` or ``norm=group``."""
    reader = OptionReader(context.options)
    norm = reader.choice("norm", default="batch", choices=("batch", "group"))
    return _make(CIFAR10, context, reader, functools.partial(cifar_resnet18, norm), weight_decay=5e-4)


def load_data(source: Source, data_dir: Path, limit: int | None = None) -> ImageData:
    """Return a data set, downloaded if it is not there: the first `limit` training images, and all test images.

    Raises
    ------
    MissingPackageError
        If torchvision is not installed.
    WorkloadError
        If the files cannot be downloaded or are damaged.
    """
    # Late: torchvision takes 2 s to import, and a wrong option should not have to wait for it.
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


def _make(
    source: Source,
    context: WorkloadContext,
    reader: OptionReader,
    build_model: Callable[[], nn.Module],
    weight_decay: float = 0.0,
) -> ImageWorkload:
    limit = reader.integer("limit", default=0) or None
    data_dir = (context.data_dir or DEFAULT_DATA_DIR).expanduser()
    defaults = TrainingSettings(epochs=1, batch_size=64, lr=0.05, momentum=0.9, weight_decay=weight_decay)
    return ImageWorkload(
        context, reader, functools.partial(load_data, source, data_dir, limit), build_model, defaults
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
    reason = _download(dataset_class, data_dir)
    if missing := [path for path in files if not path.is_file()]:
        raise WorkloadError(
            f"{source.name}: expected {', '.join(path.name for path in missing)} in {missing[0].parent}; "
            f"they are not there and downloading them failed ({reason}); copy them there, or use --workload "
            f"digits, which needs no download"
        )


def _download(dataset_class: Any, data_dir: Path) -> str:
    """Let torchvision download and unpack what is not there; return what went wrong, on one line."""
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT_S)
    try:
        dataset_class(str(data_dir), download=True)
    except (*_READ_ERRORS, http.client.HTTPException) as exc:
        return " ".join(f"{type(exc).__name__}: {exc}".split())
    finally:
        socket.setdefaulttimeout(timeout_before)
    return "it left files out"


def _read(source: Source, dataset_class: Any, data_dir: Path, *, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        dataset = dataset_class(str(data_dir), train=train)
        images = torch.as_tensor(np.asarray(dataset.data))
        labels = torch.as_tensor(dataset.targets, dtype=torch.int64)
        images = images.permute(0, 3, 1, 2).contiguous() if images.dim() == 4 else images.unsqueeze(1)
        _check(source, images, labels)
    except _READ_ERRORS as exc:
        raise _damaged(source, dataset_class, data_dir, train, exc) from exc
    return images, labels


def _check(source: Source, images: torch.Tensor, labels: torch.Tensor) -> None:
    """MNIST's files have no checksum: see that images and labels fit each other."""
    if tuple(images.shape[1:]) != source.shape:
        raise ValueError(f"expected images of shape {source.shape}, found {tuple(images.shape[1:])}")
    if not 0 < len(images) == len(labels):
        raise ValueError(f"expected a label for each image, found {len(images)} images, {len(labels)} labels")
    if not 0 <= int(labels.min()) <= int(labels.max()) <= 9:
        raise ValueError(f"expected labels 0 to 9, found {int(labels.min())} to {int(labels.max())}")


def _damaged(source: Source, dataset_class: Any, data_dir: Path, train: bool, exc: BaseException) -> WorkloadError:
    from torchvision.datasets.utils import check_integrity

    files = _expected_files(dataset_class, data_dir)
    wrong = [path.name for path, md5 in files.items() if md5 and not check_integrity(str(path), md5)]
    which = f"wrong checksum of {', '.join(wrong)}" if wrong else f"{'training' if train else 'test'} split"
    return WorkloadError(
        f"{source.name}: damaged files in {next(iter(files)).parent} ({which}; {type(exc).__name__}: {exc}); "
        f"remove them so that they are downloaded again, or copy good ones there"
    )
