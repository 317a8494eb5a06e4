"""The torchvision data sets, on files in the real on-disk format; only official checksums are replaced."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import socket
import struct
import sys
import tarfile
import threading
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from urllib.error import URLError

import filelock
import numpy as np
import numpy.typing as npt
import pytest
import torch
import torchvision.datasets

from fedsplit.errors import MissingPackageError, UsageError, WorkloadError
from fedsplit.workloads import WorkloadContext, create_workload
from fedsplit.workloads.image import ImageWorkload
from fedsplit.workloads.vision import CIFAR10, FASHION_MNIST, MNIST, Source, cifar_resnet18, load_data
from tests.bounds import BOUND_S

Bytes = npt.NDArray[np.uint8]
TASK = SimpleNamespace(config={}, should_stop=lambda: False)
GREY = [(MNIST, "MNIST"), (FASHION_MNIST, "FashionMNIST")]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No test reaches a mirror; what was asked for is in the list."""
    asked: list[str] = []

    def refuse(request: Any, *args: Any, **kwargs: Any) -> NoReturn:
        asked.append(request.full_url)
        raise URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return asked


def idx(array: Bytes) -> bytes:
    """Return the array as IDX: zero, zero, type 8 (uint8), dimensions, sizes big-endian, values."""
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def grey_files(train: int = 40, test: int = 20) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    files = {}
    for prefix, count in (("train", train), ("t10k", test)):
        files[f"{prefix}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        files[f"{prefix}-labels-idx1-ubyte"] = idx((np.arange(count) % 10).astype(np.uint8))
    return files


def write_all(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def cifar_batch(first: int, count: int) -> tuple[dict[str, Any], Bytes]:
    """Return a batch as the archive has it (rows of 1024 red, green, blue values) and its images, CHW."""
    rows = np.random.default_rng(first).integers(0, 256, (count, 3072), dtype=np.uint8)
    names = [f"image_{first + i}.png" for i in range(count)]
    batch = {
        "batch_label": "a batch",
        "labels": [i % 10 for i in range(count)],
        "data": rows,
        "filenames": names,
    }
    return batch, rows.reshape(-1, 3, 32, 32)


def cifar_files() -> dict[str, bytes]:
    files = {f"data_batch_{n}": pickle.dumps(cifar_batch(n, 4)[0], protocol=2) for n in range(1, 6)}
    files["test_batch"] = pickle.dumps(cifar_batch(6, 5)[0], protocol=2)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    files["batches.meta"] = pickle.dumps({"num_cases_per_batch": 4, "label_names": names, "num_vis": 3072}, protocol=2)
    return files


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Return the files of a small CIFAR-10, with their checksums put in the class."""
    files = cifar_files()
    dataset = torchvision.datasets.CIFAR10
    batches = [[name, md5(content)] for name, content in files.items()]
    monkeypatch.setattr(dataset, "train_list", batches[:5])
    monkeypatch.setattr(dataset, "test_list", batches[5:6])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": batches[6][1]})
    return files


def make(name: str, data_dir: Path, **options: object) -> ImageWorkload:
    texts = {key.replace("_", "-"): str(value) for key, value in options.items()}
    workload = create_workload(name, WorkloadContext(rank=1, data_dir=data_dir, options=texts))
    assert isinstance(workload, ImageWorkload)
    return workload


# --- MNIST and Fashion-MNIST


@pytest.mark.parametrize(("source", "folder"), GREY)
def test_unpacked_files_are_read_as_they_are(
    source: Source, folder: str, tmp_path: Path, no_network: list[str]
) -> None:
    files = grey_files()
    write_all(tmp_path / folder / "raw", files)
    data = load_data(source, tmp_path)
    assert data.train_images.shape == (40, 1, 28, 28)
    assert data.train_images.numpy().tobytes() == files["train-images-idx3-ubyte"][16:]
    assert data.test_images.numpy().tobytes() == files["t10k-images-idx3-ubyte"][16:]
    assert data.test_labels.tolist() == [n % 10 for n in range(20)]
    assert not no_network


@pytest.mark.parametrize(("source", "folder"), GREY)
def test_the_published_archives_may_be_put_there_and_are_unpacked(
    source: Source, folder: str, tmp_path: Path, no_network: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    archives = {f"{name}.gz": gzip.compress(content) for name, content in grey_files().items()}
    write_all(tmp_path / folder / "raw", archives)
    resources = [(name, md5(content)) for name, content in archives.items()]
    monkeypatch.setattr(getattr(torchvision.datasets, source.class_name), "resources", resources)
    assert len(load_data(source, tmp_path).train_labels) == 40
    assert not no_network


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_a_grey_workload_trains_and_evaluates(name: str, tmp_path: Path) -> None:
    folder = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name]
    write_all(tmp_path / folder / "raw", grey_files())
    workload = make(name, tmp_path, batch_size=10)
    assert workload.train(TASK).num_examples == 20
    assert workload.evaluate(TASK).num_examples == 10


def test_limit_uses_the_first_training_images_and_all_test_images(tmp_path: Path) -> None:
    write_all(tmp_path / "MNIST" / "raw", grey_files())
    workload = make("mnist", tmp_path, limit=6)
    assert workload.train(TASK).num_examples == 3
    assert workload.evaluate(TASK).num_examples == 10
    with pytest.raises(UsageError, match="limit"):
        make("mnist", tmp_path, limit=0)


DAMAGE = {
    "cut short": ("train-images-idx3-ubyte", lambda content: content[:1000], "training split"),
    "empty": ("t10k-labels-idx1-ubyte", lambda content: b"", "test split"),
    "not IDX at all": ("train-labels-idx1-ubyte", lambda content: b"<html>404</html>", "training split"),
    "images of another size": (
        "train-images-idx3-ubyte",
        lambda content: idx(np.zeros((40, 8, 8), np.uint8)),
        r"expected images of shape \(1, 28, 28\), found \(1, 8, 8\)",
    ),
    "fewer labels than images": (
        "train-labels-idx1-ubyte",
        lambda content: idx(np.zeros(39, np.uint8)),
        "found 40 images, 39 labels",
    ),
    "labels out of range": (
        "t10k-labels-idx1-ubyte",
        lambda content: idx(np.full(20, 10, np.uint8)),
        "expected labels 0 to 9, found 10 to 10",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_grey_files_are_named_on_one_line(damage: str, tmp_path: Path) -> None:
    name, spoil, expected = DAMAGE[damage]
    files = grey_files()
    folder = tmp_path / "MNIST" / "raw"
    write_all(folder, {**files, name: spoil(files[name])})
    with pytest.raises(
        WorkloadError, match=f"mnist: missing or damaged files in .*{expected}.*remove damaged ones"
    ) as caught:
        make("mnist", tmp_path)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


# --- CIFAR-10


def test_cifar_batches_are_read_in_order_with_channels_first(
    cifar: dict[str, bytes], tmp_path: Path, no_network: list[str]
) -> None:
    write_all(tmp_path / "cifar-10-batches-py", cifar)
    data = load_data(CIFAR10, tmp_path)
    expected = np.concatenate([cifar_batch(n, 4)[1] for n in range(1, 6)])
    np.testing.assert_array_equal(data.train_images.numpy(), expected)
    np.testing.assert_array_equal(data.test_images.numpy(), cifar_batch(6, 5)[1])
    assert data.train_labels.tolist() == [0, 1, 2, 3] * 5
    assert not no_network


def test_cifars_published_archive_may_be_put_there(
    cifar: dict[str, bytes], tmp_path: Path, no_network: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all(tmp_path / "elsewhere" / "cifar-10-batches-py", cifar)
    archive = tmp_path / "data" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "elsewhere" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", md5(archive.read_bytes()))
    assert len(load_data(CIFAR10, tmp_path / "data").train_labels) == 20
    assert not no_network


@pytest.mark.parametrize("norm", ["batch", pytest.param("group", marks=pytest.mark.slow)])
def test_the_cifar_workload_trains_a_resnet_for_small_images(
    norm: str, cifar: dict[str, bytes], tmp_path: Path
) -> None:
    write_all(tmp_path / "cifar-10-batches-py", cifar)
    workload = make("cifar10", tmp_path, norm=norm, batch_size=5)
    assert workload.train(TASK).num_examples == 10
    result = workload.evaluate(TASK)
    assert result.num_examples == 3
    assert np.isfinite(result.loss)
    counters = [v.item() for k, v in workload.model.state_dict().items() if k.endswith("num_batches_tracked")]
    assert counters == ([2] * 20 if norm == "batch" else [])


def test_the_resnet_looks_at_small_images_in_full_resolution() -> None:
    model = cifar_resnet18().eval()
    sizes: list[torch.Size] = []
    model.layer1.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape))
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [torch.Size([2, 64, 32, 32])]


def test_a_damaged_cifar_batch_is_not_unpickled_and_downloaded_again(
    cifar: dict[str, bytes], tmp_path: Path, no_network: list[str]
) -> None:
    # The class itself refuses a wrong checksum before it unpickles: this would create the file.
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    write_all(tmp_path / "cifar-10-batches-py", {**cifar, "data_batch_3": pickle.dumps(Bomb())})
    with pytest.raises(WorkloadError, match=r"cifar10: missing or damaged files in .*no network in tests"):
        make("cifar10", tmp_path)
    assert not (tmp_path / "exploded").exists()
    assert no_network


# --- data that are not there


@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"), ("cifar10", "cifar-10-batches-py")],
)
def test_missing_data_without_network_say_what_where_why_and_what_to_do(
    name: str, folder: str, tmp_path: Path, no_network: list[str]
) -> None:
    before = socket.getdefaulttimeout()
    with pytest.raises(WorkloadError) as caught:
        make(name, tmp_path)
    message = str(caught.value)
    for part in (name, str(tmp_path / folder), "no network in tests", "copy good ones there", "digits"):
        assert part in message
    assert "\n" not in message
    assert no_network
    assert socket.getdefaulttimeout() == before


def test_a_single_missing_file_is_enough(tmp_path: Path, no_network: list[str]) -> None:
    files = grey_files()
    del files["t10k-images-idx3-ubyte"]
    write_all(tmp_path / "MNIST" / "raw", files)
    with pytest.raises(WorkloadError, match=r"missing or damaged files in .*no network in tests"):
        make("mnist", tmp_path)
    assert no_network


def test_unpacking_archives_beside_a_damaged_file_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Here torchvision meets the damaged file while it is asked to download, not to read.
    files = grey_files()
    archives = {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    resources = [(name, md5(content)) for name, content in archives.items()]
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    archives["train-labels-idx1-ubyte.gz"] = gzip.compress(b"<html>404</html>")
    resources[1] = ("train-labels-idx1-ubyte.gz", md5(archives["train-labels-idx1-ubyte.gz"]))
    write_all(tmp_path / "MNIST" / "raw", archives)
    with pytest.raises(WorkloadError, match="mnist: missing or damaged files in"):
        make("mnist", tmp_path)


def test_a_data_dir_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text("")
    with pytest.raises(WorkloadError, match=r"mnist: .*(FileExistsError|NotADirectoryError)"):
        make("mnist", path)


def test_a_trainer_waits_while_another_one_is_still_unpacking(tmp_path: Path) -> None:
    done = threading.Event()

    def load() -> None:
        load_data(MNIST, tmp_path)
        done.set()

    lock = filelock.FileLock(tmp_path / ".fedsplit.lock")
    with lock:
        thread = threading.Thread(target=load, daemon=True)
        thread.start()
        assert not done.wait(0.3)
        write_all(tmp_path / "MNIST" / "raw", grey_files())
    assert done.wait(BOUND_S)
    thread.join()


def test_without_torchvision_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(
        MissingPackageError, match=r"workload mnist needs torchvision.*pip install 'fedsplit\[vision\]'"
    ):
        load_data(MNIST, tmp_path)
