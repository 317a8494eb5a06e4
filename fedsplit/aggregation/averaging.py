"""The rules that need one pass: `fedavg`, `max`, `frozen`. Each function is its accumulator over all updates."""

from __future__ import annotations

from collections.abc import Sequence

from fedsplit.aggregation.base import AggregationContext, StateDict, Update, merge
from fedsplit.aggregation.numeric import RunningMean, is_floating, maximum
from fedsplit.errors import AggregationError


class MeanAccumulator:
    """Mean of the floating entries weighted by `num_examples`, maximum of the others."""

    def __init__(self, context: AggregationContext) -> None:
        self._means: dict[str, RunningMean] = {}
        self._largest = MaxAccumulator(context)

    def add(self, update: Update) -> None:
        self._largest.add(update, floating=False)
        for key, tensor in update.state_dict.items():
            if is_floating(tensor):
                self._means.setdefault(key, RunningMean()).add(tensor, update.num_examples)

    def result(self) -> StateDict:
        return {key: mean.result() for key, mean in self._means.items()} | self._largest.result()


class MaxAccumulator:
    """Elementwise maximum; of the floating entries only if `add` is told so."""

    def __init__(self, context: AggregationContext) -> None:
        self._largest: StateDict = {}

    def add(self, update: Update, *, floating: bool = True) -> None:
        for key, tensor in update.state_dict.items():
            if tensor.is_complex() and floating:
                raise AggregationError(f"max: complex numbers have no order, but {key!r} is {tensor.dtype}")
            if floating or not is_floating(tensor):
                # The first is copied, as a view would keep the whole payload of that client alive.
                known = self._largest.get(key)
                self._largest[key] = tensor.clone() if known is None else maximum(known, tensor)

    def result(self) -> StateDict:
        return self._largest


class FrozenAccumulator:
    """The tensors that the round started from."""

    def __init__(self, context: AggregationContext) -> None:
        self._previous = context.previous

    def add(self, update: Update) -> None:
        pass

    def result(self) -> StateDict:
        return dict(self._previous)


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
