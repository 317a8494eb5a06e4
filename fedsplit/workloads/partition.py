"""Division of a training set among the ranks: seeded, disjoint, complete, and never an empty part.

Every rank computes the whole division from the same labels, the same seed and the same number of parts, and
takes its own: nothing has to be agreed on over the network. Trainers that are started with different seeds
or different numbers of parts would overlap, and nothing here can see that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedsplit.errors import UsageError
from fedsplit.workloads.options import OptionReader

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Iid:
    """Every part is a random sample; sizes differ by one at most."""


@dataclass(frozen=True)
class Dirichlet:
    """Every part has its own mix of the classes; sizes differ by one at most.

    The mix of a part is drawn from Dir(alpha * p), p being the shares of the classes in the whole set: the
    definition of Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated
    Visual Classification", 2019 (arXiv:1909.06335). With alpha towards infinity every part looks like the
    whole, towards 0 it has one class as long as there are examples of it. Others, such as Flower's
    DirichletPartitioner, give each class the concentration alpha; with C balanced classes that compares to
    alpha * C here.

    Attributes
    ----------
    alpha : float
        The total concentration, more than 0.
    """

    alpha: float = 0.5


Scheme = Iid | Dirichlet


def parse_scheme(reader: OptionReader) -> Scheme:
    """Read the options ``partition=iid`` or ``partition=dirichlet``, and ``alpha`` for the second."""
    name = reader.choice("partition", default="iid", choices=("iid", "dirichlet"))
    alpha = reader.number("alpha", default=Dirichlet.alpha, above=0.0)
    return Iid() if name == "iid" else Dirichlet(alpha)


def partition(labels: npt.ArrayLike, num_partitions: int, scheme: Scheme, seed: int) -> list[Indices]:
    """Divide the examples among the parts.

    No part is empty: both schemes fix the sizes before they look at a label, and these differ by one at most.

    Parameters
    ----------
    labels : array of int, shape (N,)
        The class of every example.
    num_partitions : int
        How many parts.
    scheme : Iid or Dirichlet
        How to choose.
    seed : int
        The same seed gives the same parts.

    Returns
    -------
    list of int64 arrays
        The indices of each part, ascending; rank k has the k-th, counted from 1.

    Raises
    ------
    UsageError
        If there are fewer examples than parts.
    """
    classes = np.asarray(labels)
    if not 1 <= num_partitions <= len(classes):
        raise UsageError(
            f"cannot divide {len(classes)} training examples into {num_partitions} partitions of at least "
            f"one; lower --num-partitions"
        )
    rng = np.random.default_rng(seed)
    if isinstance(scheme, Iid):
        parts = np.array_split(rng.permutation(len(classes)), num_partitions)
    else:
        parts = _dirichlet(classes, num_partitions, scheme.alpha, rng)
    return [np.sort(part).astype(np.int64) for part in parts]


def _dirichlet(
    classes: npt.NDArray[np.generic], num_partitions: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
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


def _draw_counts(
    size: int, mix: npt.NDArray[np.float64], left: Indices, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw how many of each class: by `mix`, and where a class runs out, by the mix of those that remain."""
    counts = np.zeros_like(left)
    # Each turn fills the part or uses up a class.
    while counts.sum() < size:
        remaining = left - counts
        weights = np.where(remaining > 0, mix, 0.0)
        if not weights.sum() > 0.0:
            weights = remaining.astype(np.float64)
        drawn = rng.multinomial(size - counts.sum(), weights / weights.sum())
        counts += np.minimum(drawn, remaining)
    return counts
