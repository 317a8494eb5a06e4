"""The built-in rules. Each function says how it merges, and how many bad clients it tolerates.

`fedavg`, `max` and `frozen` need one pass: each is its accumulator over all updates. The robust rules do not look at
`num_examples`, as a bad client may claim any number. What they tolerate holds for the floating entries; integer and
boolean ones take the maximum, except under the two Krums, which choose whole clients. The guarantees are those of the
papers, and assume that honest clients hold similar data.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsplit.aggregation.base import Accumulator, AggregationContext, Rule, RuleFunction, StateDict, Update
from fedsplit.aggregation.numeric import (
    RunningMean,
    by_coordinate,
    floating_keys,
    is_floating,
    maximum,
    mean_of,
    squared_distance,
    widened,
)
from fedsplit.errors import AggregationError

log = logging.getLogger(__name__)
_SETTLED = 1e-6


class MeanAccumulator:
    """Mean of the floating entries weighted by `num_examples`, maximum of the others."""

    def __init__(self, context: AggregationContext) -> None:
        self._means: dict[str, RunningMean] = {}
        self._largest: StateDict = {}

    def add(self, update: Update) -> None:
        for key, tensor in update.state_dict.items():
            if not is_floating(tensor):
                _take_largest(self._largest, key, tensor)
            elif key in self._means:
                self._means[key].add(tensor, update.num_examples)
            else:
                self._means[key] = RunningMean(tensor, update.num_examples)

    def result(self) -> StateDict:
        return {key: mean.result() for key, mean in self._means.items()} | self._largest


class MaxAccumulator:
    """Elementwise maximum of all entries."""

    def __init__(self, context: AggregationContext) -> None:
        self._largest: StateDict = {}

    def add(self, update: Update) -> None:
        for key, tensor in update.state_dict.items():
            if tensor.is_complex():
                raise AggregationError(f"max: complex numbers have no order, but {key!r} is {tensor.dtype}")
            _take_largest(self._largest, key, tensor)

    def result(self) -> StateDict:
        return self._largest


def _take_largest(largest: StateDict, key: str, tensor: Tensor) -> None:
    # The first is copied, as a view would keep the whole payload of that client alive.
    largest[key] = maximum(largest[key], tensor) if key in largest else tensor.clone()


class FrozenAccumulator:
    """The tensors that the round started from."""

    def __init__(self, context: AggregationContext) -> None:
        self._previous = context.previous

    def add(self, update: Update) -> None:
        pass

    def result(self) -> StateDict:
        return dict(self._previous)


def merge(accumulator: Accumulator, updates: Sequence[Update]) -> StateDict:
    """Return what an accumulator makes of all updates."""
    for update in updates:
        accumulator.add(update)
    return accumulator.result()


def fedavg(updates: Sequence[Update], context: AggregationContext) -> StateDict:
    """Mean of the clients' states weighted by their number of examples.

    Floating entries are added up in at least float32 and come back in their own type; integer and boolean entries take
    the maximum. Tolerates no bad client: one of them moves the mean anywhere.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
    https://arxiv.org/abs/1602.05629.
    """
    return merge(MeanAccumulator(context), updates)


def maximum_of_all(updates: Sequence[Update], context: AggregationContext) -> StateDict:
    """Elementwise maximum of all entries, floating ones too: for counters, masks and vocabularies that only grow.

    Tolerates no bad client. Complex entries are refused, as they have no order.
    """
    return merge(MaxAccumulator(context), updates)


def frozen(updates: Sequence[Update], context: AggregationContext) -> StateDict:
    """The global state as it was; what the clients send for this part is ignored.

    Tolerates any number of bad clients, as no update is used.
    """
    return merge(FrozenAccumulator(context), updates)


def median(updates: Sequence[Update], context: AggregationContext) -> StateDict:
    """Median of each coordinate; of an even number of clients, the mean of the two in the middle.

    Tolerates fewer than half of the clients: (n - 1) // 2 of n.

    Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
    https://arxiv.org/abs/1803.01498.
    """
    return _by_entry(updates, lambda tensors: by_coordinate(tensors, _middle))


def trimmed_mean(updates: Sequence[Update], context: AggregationContext, *, fraction: float = 0.1) -> StateDict:
    """Mean of each coordinate without its smallest and largest values.

    Tolerates int(fraction * n) of n clients, which is none of 9 at the default of 0.1; a warning says so.

    Parameters
    ----------
    fraction : float
        How much to cut off at either end, from 0 to below 0.5; the number of clients that are cut is rounded down.

    Yin et al., as for `median`.
    """
    if not 0 <= fraction < 0.5:
        raise AggregationError(f"fraction={fraction} trims everything: expected from 0 to below 0.5")
    count = len(updates)
    cut = int(fraction * count)
    if fraction and not cut and count > 1:
        log.warning(
            "part %r: trimmed-mean(fraction=%g) trims nothing from %d updates and tolerates no bad client; "
            "that takes %d updates%s",
            context.part, fraction, count, math.ceil(min(1 / fraction, 1e9)),
            f", or fraction={math.ceil(100 / count) / 100}" if count > 2 else "",
        )  # fmt: skip
    return _by_entry(updates, lambda tensors: by_coordinate(tensors, lambda rows: mean_of(rows[cut : count - cut])))


def krum(updates: Sequence[Update], context: AggregationContext, *, byzantine: int = 1) -> StateDict:
    """The state of the one client that is closest to its n - byzantine - 2 nearest neighbours.

    It is taken whole, with its integer entries: the result is a state that some client really had. Of equals, the one
    with the lowest rank.

    Parameters
    ----------
    byzantine : int
        How many bad clients to tolerate; takes at least 2 * byzantine + 3 updates. 0 works with any number.

    Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017,
    https://arxiv.org/abs/1703.02757.
    """
    return dict(_closest(updates, byzantine)[0].state_dict)


def _krum_needs(*, byzantine: int = 1) -> int:
    return 2 * byzantine + 3 if byzantine else 1


def multi_krum(
    updates: Sequence[Update], context: AggregationContext, *, byzantine: int = 1, selected: int | None = None
) -> StateDict:
    """Unweighted mean of the clients with the best Krum scores; their integer entries take the maximum.

    Parameters
    ----------
    byzantine : int
        As for `krum`.
    selected : int, optional
        How many to average, at most n - byzantine - 2 (n if byzantine is 0), which is the default.

    Blanchard et al., as for `krum`; the bound on `selected` is that of Damaskinos et al., "AggregaThor: Byzantine
    Machine Learning via Robust Gradient Aggregation", MLSys 2019.
    """
    best = _closest(updates, byzantine)
    most = len(updates) - byzantine - 2 if byzantine else len(updates)
    if selected is not None and not 1 <= selected <= most:
        raise AggregationError(
            f"selected={selected} is more than byzantine={byzantine} allows with {len(updates)} updates: at most {most}"
        )
    # In rank order again, as the order of a mean shows in its last bit.
    chosen = sorted(best[: most if selected is None else selected], key=lambda update: update.rank)
    return _by_entry(chosen, mean_of)


def _multi_krum_needs(*, byzantine: int = 1, selected: int | None = None) -> int:
    return max(_krum_needs(byzantine=byzantine), (selected or 1) + (byzantine + 2 if byzantine else 0))


def geometric_median(
    updates: Sequence[Update], context: AggregationContext, *, iterations: int = 32, smoothing: float = 1e-6
) -> StateDict:
    """The point with the smallest sum of distances to the clients, over all floating entries of the part together.

    Tolerates fewer than half of the clients: (n - 1) // 2 of n. Found by the smoothed Weiszfeld algorithm. It starts
    from the mean of the half nearest to the median of each coordinate, and all clients count the same.

    Parameters
    ----------
    iterations : int
        At most so many steps; fewer if the clients' weights have settled.
    smoothing : float
        Distances below this count as this.

    Pillutla et al., "Robust Aggregation for Federated Learning" (RFA), IEEE TSP 2022,
    https://arxiv.org/abs/1912.13445.
    """
    keys = floating_keys(updates[0].state_dict)

    def distances(state: StateDict) -> list[float]:
        return [squared_distance(update.state_dict, state, keys) for update in updates]

    def mean(chosen: Sequence[int], weights: Sequence[float] | None = None) -> StateDict:
        return {key: mean_of([widened(updates[i].state_dict[key]) for i in chosen], weights) for key in keys}

    start = median(updates, context)
    # Not from the median itself: it may be one of the clients, and the algorithm leaves those only slowly.
    apart = distances(start)
    nearest = sorted(range(len(updates)), key=lambda i: (apart[i], updates[i].rank))
    centre = mean(nearest[: len(updates) // 2 + 1])
    weights = [0.0] * len(updates)
    for _ in range(iterations):
        inverse = [1 / max(math.sqrt(distance), smoothing) for distance in distances(centre)]
        before, weights = weights, [value / sum(inverse) for value in inverse]
        # The heaviest first: a mean that began at a far outlier would overflow or lose the others' bits.
        order = sorted(range(len(updates)), key=lambda i: -weights[i])
        centre = mean(order, [weights[i] for i in order])
        if max(abs(new - old) for new, old in zip(weights, before, strict=True)) < _SETTLED:
            break
    return start | {key: centre[key].to(start[key].dtype) for key in keys}


def _by_entry(updates: Sequence[Update], merge: Callable[[list[Tensor]], Tensor]) -> StateDict:
    """Merge each floating entry by `merge`, the others by maximum."""
    result = {}
    for key, first in updates[0].state_dict.items():
        tensors = [update.state_dict[key] for update in updates]
        result[key] = merge(tensors) if is_floating(first) else reduce(maximum, tensors)
    return result


def _middle(rows: list[Tensor]) -> Tensor:
    low, high = rows[(len(rows) - 1) // 2], rows[len(rows) // 2]
    # (low + high) / 2 would overflow for large values, and halves alone would lose the last bit of the smallest.
    return torch.where(low == high, low, low / 2 + high / 2)


def _closest(updates: Sequence[Update], byzantine: int) -> list[Update]:
    """Return the updates by Krum score, best first, then by rank."""
    count, needed = len(updates), _krum_needs(byzantine=byzantine)
    if count < needed:
        raise AggregationError(
            f"byzantine={byzantine} takes at least {needed} updates (2 * byzantine + 3), found {count}; "
            f"with {count}, at most byzantine={max(0, (count - 3) // 2)} works"
        )
    keys = floating_keys(updates[0].state_dict)
    distances: list[list[float]] = [[] for _ in updates]
    for i, j in combinations(range(count), 2):
        distance = squared_distance(updates[i].state_dict, updates[j].state_dict, keys)
        distances[i].append(distance)
        distances[j].append(distance)
    scores = [sum(sorted(row)[: max(1, count - byzantine - 2)]) for row in distances]
    return [updates[i] for i in sorted(range(count), key=lambda i: (scores[i], updates[i].rank))]


class Builtin(NamedTuple):
    """A rule of ours: its function, its accumulator if one pass is enough, and how many updates it needs."""

    function: RuleFunction
    accumulator: Callable[[AggregationContext], Accumulator] | None = None
    min_updates: Callable[..., int] = lambda **_: 1

    def bind(self, name: str, **params: Any) -> Rule:
        """Return the rule with these parameters; `name` is how messages call it."""
        if self.accumulator is not None:
            return Rule(name=name, accumulator=self.accumulator, one_pass=True)
        return Rule.of_function(name, partial(self.function, **params), min_updates=self.min_updates(**params))


# Their parameters are in `fedsplit.aggregation.spec.BUILTIN_RULES`; `dp` and `local` are handled apart.
BUILTIN: dict[str, Builtin] = {
    "fedavg": Builtin(fedavg, MeanAccumulator),
    "max": Builtin(maximum_of_all, MaxAccumulator),
    "frozen": Builtin(frozen, FrozenAccumulator),
    "median": Builtin(median),
    "trimmed-mean": Builtin(trimmed_mean),
    "krum": Builtin(krum, min_updates=_krum_needs),
    "multi-krum": Builtin(multi_krum, min_updates=_multi_krum_needs),
    "geometric-median": Builtin(geometric_median),
}
