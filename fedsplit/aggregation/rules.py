"""The built-in rules. Each function says how it merges, and how many bad clients it tolerates.

`fedavg`, `max` and `frozen` need one pass: each is its accumulator over all updates. The robust rules do not look at
`num_examples`, as a bad client may claim any number. What they tolerate holds for the floating entries; integer and
boolean ones take the maximum, except under the two Krums, which choose whole clients. The guarantees are those of the
papers, and assume that honest clients hold similar data.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsplit.aggregation import numeric
from fedsplit.aggregation.base import Accumulator, AggregationContext, Rule, RuleFunction, StateDict, Update
from fedsplit.errors import AggregationError

log = logging.getLogger(__name__)
_SETTLED = 1e-6


class MeanAccumulator:
    """Mean of the floating entries weighted by `num_examples`, maximum of the others; without ``averages``, of all."""

    def __init__(self, context: AggregationContext, *, averages: bool = True) -> None:
        self._averages = averages
        self._means: dict[str, numeric.RunningMean] = {}
        self._largest: StateDict = {}

    def add(self, update: Update) -> None:
        for key, tensor in update.state_dict.items():
            if self._averages and numeric.is_floating(tensor):
                if key in self._means:
                    self._means[key].add(tensor, update.num_examples)
                else:
                    self._means[key] = numeric.RunningMean(tensor, update.num_examples)
            elif tensor.is_complex():
                raise AggregationError(f"max: complex numbers have no order, but {key!r} is {tensor.dtype}")
            else:
                # The first is copied, as a view would keep the whole payload of that client alive.
                largest = self._largest.get(key)
                self._largest[key] = tensor.clone() if largest is None else numeric.maximum(largest, tensor)

    def add_all(self, updates: Sequence[Update]) -> bool:
        """Take several updates, reading each once; returns False, and has taken none, if a mean is not finite then."""
        states, weights = [update.state_dict for update in updates], [update.num_examples for update in updates]
        means = numeric.RunningMean.after(self._means, states, weights)
        if means is None:
            return False
        self._means = means
        for update in updates:
            self.add(replace(update, state_dict={key: t for key, t in update.state_dict.items() if key not in means}))
        return True

    def result(self) -> StateDict:
        return {key: mean.result() for key, mean in self._means.items()} | self._largest


class FrozenAccumulator:
    """The tensors that the round started from."""

    def __init__(self, context: AggregationContext) -> None:
        self._previous = context.previous

    def add(self, update: Update) -> None:
        pass

    def result(self) -> StateDict:
        return dict(self._previous)


_MaxAccumulator = partial(MeanAccumulator, averages=False)


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
    return merge(_MaxAccumulator(context), updates)


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
    return _by_entry(updates, partial(numeric.by_coordinate, merge_sorted=_middle))


def trimmed_mean(updates: Sequence[Update], context: AggregationContext, *, fraction: float = 0.1) -> StateDict:
    """Mean of each coordinate without its smallest and largest values: ``fraction`` is cut off at either end.

    `fraction` is from 0 to below 0.5, and the number of clients that are cut is rounded down. Tolerates
    int(fraction * n) of n clients, which is none of 9 at the default of 0.1; a warning says so.

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

    def untrimmed(rows: list[Tensor]) -> Tensor:
        return numeric.mean_of(rows[cut : count - cut])

    return _by_entry(updates, partial(numeric.by_coordinate, merge_sorted=untrimmed))


def krum(updates: Sequence[Update], context: AggregationContext, *, byzantine: int = 1) -> StateDict:
    """The state of the one client that is closest to its n - byzantine - 2 nearest neighbours.

    It is taken whole, with its integer entries: the result is a state that some client really had. Of equals, the one
    with the lowest rank. `byzantine` is how many bad clients to tolerate, which takes at least 2 * byzantine + 3
    updates; 0 works with any number.

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

    `byzantine` is as for `krum`, `selected` how many to average: at most n - byzantine - 2 (n if byzantine is 0), which
    is the default.

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
    return _by_entry(chosen, numeric.mean_of)


def _multi_krum_needs(*, byzantine: int = 1, selected: int | None = None) -> int:
    return max(_krum_needs(byzantine=byzantine), (selected or 1) + (byzantine + 2 if byzantine else 0))


def geometric_median(
    updates: Sequence[Update], context: AggregationContext, *, iterations: int = 32, smoothing: float = 1e-6
) -> StateDict:
    """The point with the smallest sum of distances to the clients, over all floating entries of the part together.

    Tolerates fewer than half of the clients: (n - 1) // 2 of n. Found by the smoothed Weiszfeld algorithm. It starts
    from the mean of the half nearest to the median of each coordinate, and all clients count the same. It takes at most
    `iterations` steps, fewer if the clients' weights have settled; distances below `smoothing` count as that.

    Pillutla et al., "Robust Aggregation for Federated Learning" (RFA), IEEE TSP 2022,
    https://arxiv.org/abs/1912.13445.
    """
    keys = numeric.floating_keys(updates[0].state_dict)

    def distances(state: StateDict) -> list[float]:
        return [numeric.squared_distance(update.state_dict, state, keys) for update in updates]

    def mean(chosen: Sequence[int], weights: Sequence[float] | None = None) -> StateDict:
        states = [updates[i].state_dict for i in chosen]
        return {key: numeric.mean_of([numeric.widened(state[key]) for state in states], weights) for key in keys}

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
        result[key] = merge(tensors) if numeric.is_floating(first) else reduce(numeric.maximum, tensors)
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
    keys = numeric.floating_keys(updates[0].state_dict)
    distances: list[list[float]] = [[] for _ in updates]
    for i, j in combinations(range(count), 2):
        distance = numeric.squared_distance(updates[i].state_dict, updates[j].state_dict, keys)
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
    "max": Builtin(maximum_of_all, _MaxAccumulator),
    "frozen": Builtin(frozen, FrozenAccumulator),
    "median": Builtin(median),
    "trimmed-mean": Builtin(trimmed_mean),
    "krum": Builtin(krum, min_updates=_krum_needs),
    "multi-krum": Builtin(multi_krum, min_updates=_multi_krum_needs),
    "geometric-median": Builtin(geometric_median),
}
