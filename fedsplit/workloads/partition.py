"""Division of a training set among the ranks: seeded, disjoint, complete, and never an empty part.

Every rank computes the whole division from the same labels, seed and number of parts, and takes its own part. Trainers
that were started with different seeds or numbers of parts would overlap; nothing here can see that.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from fedsplit.errors import UsageError
from fedsplit.workloads import OptionReader

Indices = npt.NDArray[np.int64]


def read_alpha(reader: OptionReader) -> float | None:
    """Read the options ``partition=iid`` (None) and ``partition=dirichlet`` with ``alpha``."""
    scheme = reader.choice("partition", default="iid", choices=("iid", "dirichlet"))
    alpha = reader.number("alpha", default=0.5, above=0.0)
    return alpha if scheme == "dirichlet" else None


def partition(labels: npt.ArrayLike, num_partitions: int, seed: int, alpha: float | None = None) -> list[Indices]:
    """Divide the examples, of which `labels` are the classes, into parts whose sizes differ by one at most.

    Returns the indices of each part, ascending; raises UsageError if a part would be empty. Without `alpha` every part
    is a random sample. With a number above 0 every part has its own mix of the classes, drawn from Dir(alpha * p),
    where p are the shares of the classes in the whole set: Hsu, Qi and Brown, 2019 (arXiv:1909.06335). A large alpha
    makes every part look like the whole, a small one gives a part a single class while there are examples of it.
    Flower's DirichletPartitioner and others give each class the concentration alpha: with C balanced classes that is
    alpha * C here.
    """
    classes = np.asarray(labels)
    if not 1 <= num_partitions <= len(classes):
        raise UsageError(
            f"cannot divide {len(classes)} training examples into {num_partitions} partitions of at least "
            "one; lower --num-partitions"
        )
    rng = np.random.default_rng(seed)
    if alpha is None:
        parts = np.array_split(rng.permutation(len(classes)), num_partitions)
    else:
        parts = _dirichlet(classes, num_partitions, alpha, rng)
    return [np.sort(part).astype(np.int64) for part in parts]


def _dirichlet(classes: npt.NDArray[Any], num_partitions: int, alpha: float, rng: np.random.Generator) -> list[Indices]:
    """Fill one part after the other, in random order: the last ones get what the others left."""
    _, class_of = np.unique(classes, return_inverse=True)
    pools = [rng.permutation(np.flatnonzero(class_of == c)) for c in range(class_of.max() + 1)]
    taken = np.zeros(len(pools), dtype=np.int64)
    total = np.array([len(pool) for pool in pools], dtype=np.int64)
    parts: list[Indices] = [np.empty(0, dtype=np.int64)] * num_partitions
    for index in rng.permutation(num_partitions):
        size = len(classes) // num_partitions + (index < len(classes) % num_partitions)
        counts = _draw_counts(size, rng.dirichlet(alpha * total / total.sum()), total - taken, rng)
        slices = zip(pools, taken, counts, strict=True)
        parts[index] = np.concatenate([pool[start : start + count] for pool, start, count in slices])
        taken += counts
    return parts


def _draw_counts(size: int, mix: npt.NDArray[np.float64], left: Indices, rng: np.random.Generator) -> Indices:
    """Draw how many of each class: by `mix`, and where a class runs out, by the mix of those that remain."""
    counts = np.zeros_like(left)
    # Each pass fills the part or uses up a class.
    while counts.sum() < size:
        remaining = left - counts
        weights = np.where(remaining > 0, mix, 0.0)
        if not weights.sum() > 0.0:
            weights = remaining.astype(np.float64)
        counts += np.minimum(rng.multinomial(size - counts.sum(), weights / weights.sum()), remaining)
    return counts
