"""The default workload: scikit-learn's bundled 1,797 handwritten digits, 8x8 pixels. Needs no download.

The data are the test set of the Optical Recognition of Handwritten Digits of the UCI repository (Alpaydin and Kaynak,
1998). A fifth of each class is held out for evaluation: the same images for every seed and every rank, so that runs
can be compared and no trainer ever sees them.
"""

import functools
import gzip
import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedsplit.errors import MissingPackageError
from fedsplit.workloads import OptionReader, WorkloadContext
from fedsplit.workloads.image import ImageData, ImageWorkload, TrainingSettings, small_conv_net

_DEFAULTS = TrainingSettings(epochs=3, batch_size=32, lr=0.05, momentum=0.9)
_HELD_OUT, _SPLIT_SEED = 0.2, 1797


def digits(context: WorkloadContext) -> ImageWorkload:
    """Make the workload; its options are those of `TrainingSettings` and of `read_alpha`."""
    build_model = functools.partial(small_conv_net, image_size=8)
    return ImageWorkload(context, OptionReader(context.options), load_data, build_model, _DEFAULTS)


def load_data() -> ImageData:
    """Return the digits, about 80 % of each class for training and 20 % held out."""
    table = read_table()
    labels = table[:, -1]
    rng = np.random.default_rng(_SPLIT_SEED)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        is_test[members[: round(_HELD_OUT * len(members))]] = True
    images, targets = torch.from_numpy(table[:, :-1].astype(np.uint8)).view(-1, 1, 8, 8), torch.from_numpy(labels)
    return ImageData(
        train_images=images[~is_test], train_labels=targets[~is_test], test_images=images[is_test],
        test_labels=targets[is_test], mean=(0.305,), std=(0.376,), maximum=16,
    )  # fmt: skip


def read_table() -> npt.NDArray[np.int64]:
    """Return the file's 1,797 rows of 64 pixels and a label; raises MissingPackageError without scikit-learn."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise MissingPackageError("the workload digits", "scikit-learn", "digits")
    # Importing scikit-learn would add seconds to every trainer's start.
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not path.is_file():
        from sklearn.datasets import load_digits

        return np.column_stack(load_digits(return_X_y=True)).astype(np.int64)
    with gzip.open(path, "rt") as lines:
        return np.loadtxt(lines, delimiter=",").astype(np.int64)
