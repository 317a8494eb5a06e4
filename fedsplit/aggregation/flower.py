"""Flower's strategies as rules of a part: `flower.FedAdam(eta=0.01)`.

The class runs unchanged: only its `aggregate_fit` is called, with numpy arrays. In each round it is made anew
from its parameters and the global state, and given back the attributes it had at the end of the round before,
which `context.memory` keeps; a resumed run therefore goes on bit for bit as one that never stopped. Flower is
imported when such a rule is loaded, not before.

Not promised: state that a strategy changes inside an array in place, or keeps outside its attributes; no
strategy of Flower 1.41 does either. Integer and boolean entries take the maximum and are never shown to the
strategy.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedsplit.aggregation.attributes import Attributes, decode
from fedsplit.aggregation.base import AggregationContext, FunctionRule, Rule, StateDict, Update
from fedsplit.aggregation.numeric import floating_keys, is_floating, max_of, widened
from fedsplit.errors import AggregationError, UsageError

if TYPE_CHECKING:
    from flwr.common import FitRes
    from flwr.server.strategy import Strategy

NDArrays = list[Any]

# What each class of flwr.server.strategy does here. docs/aggregation.md shows these; a test holds them to the
# truth.
WORKING: Mapping[str, str] = {
    "FedAvg": "weighted mean; with inplace=false in two passes",
    "FedAvgM": "server momentum, kept in the checkpoints",
    "FedAdagrad": "server Adagrad, its moments kept in the checkpoints",
    "FedAdam": "server Adam, its moments kept in the checkpoints",
    "FedYogi": "server Yogi, its moments kept in the checkpoints",
    "FedOpt": "the base class of the three above: merges as FedAvg",
    "FedMedian": "median of each coordinate",
    "FedTrimmedAvg": "trimmed mean of each coordinate",
    "Krum": "Krum; multi-Krum with num_clients_to_keep above 0",
    "Bulyan": "needs to_keep=0, which it hands on to Krum, and 4 * num_malicious_clients + 3 updates",
    "FaultTolerantFedAvg": "merges as FedAvg: a failed client never reaches a rule",
    "FedProx": "merges as FedAvg; its proximal term is the trainer's business",
}
_BYTES = "it merges XGBoost trees as bytes, not arrays"
_WRAPPER = "it wraps another strategy and its clients' configuration: use dp(rule, clip=…, noise=…)"
NOT_WORKING: Mapping[str, str] = {
    "Strategy": "it is the abstract base class",
    "QFedAvg": "it weighs by the loss of the global model measured on the server, which has no model",
    "FedAvgAndroid": "it sends arrays without their shapes; it merges as FedAvg",
    "FedXgbBagging": _BYTES,
    "FedXgbCyclic": _BYTES,
    "FedXgbNnAvg": _BYTES,
    "DPFedAvgAdaptive": _WRAPPER,
    "DPFedAvgFixed": _WRAPPER,
    "DifferentialPrivacyClientSideAdaptiveClipping": _WRAPPER,
    "DifferentialPrivacyClientSideFixedClipping": _WRAPPER,
    "DifferentialPrivacyServerSideAdaptiveClipping": _WRAPPER,
    "DifferentialPrivacyServerSideFixedClipping": _WRAPPER,
}


def flower_rule(text: str, name: str, params: Mapping[str, Any]) -> Rule:
    """Load a strategy as a rule.

    Parameters
    ----------
    text : str
        How messages call the rule.
    name : str
        A class of `flwr.server.strategy`.
    params : mapping
        Keyword arguments of the class that shape how it merges.

    Raises
    ------
    UsageError
        For a class that is not there or cannot work as a rule, and for parameters it does not take.
    """
    if name in NOT_WORKING:
        raise UsageError(f"flower.{name} cannot be the rule of a part: {NOT_WORKING[name]}")
    from flwr.server import strategy as strategies

    kind = getattr(strategies, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, strategies.Strategy)):
        raise UsageError(f"Flower has no strategy {name!r}; those that work here: {', '.join(WORKING)}")
    _check_params(name, kind, params)
    adapter = _Adapter(kind, params)
    try:
        adapter.make([])
    except (TypeError, ValueError) as exc:
        raise UsageError(f"flower.{name} refuses its parameters: {exc}") from exc
    return FunctionRule(name=text, function=adapter.aggregate)


def _check_params(name: str, kind: type, params: Mapping[str, Any]) -> None:
    from flwr.server.strategy import FedAvg

    # Everything FedAvg takes but one is about which clients take part, and the server has its own flags for
    # that.
    elsewhere = {*inspect.signature(FedAvg).parameters} - {"inplace"}
    signature = inspect.signature(kind).parameters.values()
    taken = [p.name for p in signature if p.kind is not p.VAR_KEYWORD]
    merging = [key for key in taken if key not in elsewhere and not key.startswith("min_completion_rate")]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature)
    for key in params:
        if key in taken and key not in merging:
            raise UsageError(f"flower.{name}: {key!r} does not shape the merge; see server_main.py --help")
        if key not in merging and not open_ended:
            takes = ", ".join(merging) or "none"
            raise UsageError(f"flower.{name} has no parameter {key!r}: it takes {takes}")


class _Adapter:
    """Makes the strategy anew for each round and carries its attributes over."""

    def __init__(self, kind: type[Strategy], params: Mapping[str, Any]) -> None:
        self._kind = kind
        self._params = params

    def make(self, arrays: NDArrays) -> Strategy:
        from flwr.common import ndarrays_to_parameters

        extra: dict[str, Any] = {"initial_parameters": ndarrays_to_parameters(arrays)}
        if "fit_metrics_aggregation_fn" in inspect.signature(self._kind).parameters:
            # Without one, the strategy logs a warning in its first round.
            extra["fit_metrics_aggregation_fn"] = _no_metrics
        return self._kind(**extra, **self._params)

    def aggregate(self, updates: Sequence[Update], context: AggregationContext) -> StateDict:
        first = updates[0].state_dict
        # Sorted, as the memory holds lists: a state read from a file may have its keys in another order.
        keys = sorted(floating_keys(first))
        result = {
            key: max_of([update.state_dict[key] for update in updates])
            for key, tensor in first.items()
            if not is_floating(tensor)
        }
        if keys:
            previous = {key: context.previous[key] for key in keys}
            merged = self._merge(previous, updates, context.memory)
            for (key, tensor), array in zip(previous.items(), merged, strict=True):
                result[key] = from_numpy(array, tensor)
        return {key: result[key] for key in first}

    def _merge(self, previous: StateDict, updates: Sequence[Update], memory: dict[str, Any]) -> NDArrays:
        from flwr.common import parameters_to_ndarrays

        strategy = self.make([to_numpy(tensor) for tensor in previous.values()])
        attributes = Attributes(strategy)
        _restore(strategy, memory.get("attributes", {}), previous)
        # Its own count, as FedAvgM and FedAdam take round 1 for the first merge, and rounds may pass without
        # one.
        merges = memory.get("merges", 0) + 1
        results: Any = [(None, _fit_result(update, previous)) for update in updates]
        parameters, _ = strategy.aggregate_fit(merges, results, [])
        if parameters is None:
            raise AggregationError(f"{self._kind.__name__} returned nothing")
        memory["attributes"] = attributes.changed()
        memory["merges"] = merges
        return parameters_to_ndarrays(parameters)


def _no_metrics(metrics: object) -> dict[str, Any]:
    return {}


def _fit_result(update: Update, keys: Mapping[str, Tensor]) -> FitRes:
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters

    return FitRes(
        status=Status(Code.OK, ""),
        parameters=ndarrays_to_parameters([to_numpy(update.state_dict[key]) for key in keys]),
        num_examples=update.num_examples,
        metrics=dict(update.metrics),
    )


def to_numpy(tensor: Tensor) -> Any:
    """Return an entry as Flower's strategies see it.

    Floating entries are in float32 at least, as numpy has no bfloat16 and would average float16 in float16; complex
    ones are pairs.
    """
    wide = widened(tensor).resolve_conj() if is_floating(tensor) else tensor
    return (torch.view_as_real(wide) if wide.is_complex() else wide).numpy(force=True)


def from_numpy(array: Any, like: Tensor) -> Tensor:
    """Return an array of a strategy's as an entry of the dtype of ``like``; whole numbers are rounded to."""
    tensor = torch.from_numpy(np.array(array))
    if like.is_complex():
        tensor = torch.view_as_complex(tensor)
    elif not is_floating(like) and is_floating(tensor):
        # The mean of counters: without this 4.9999 would become 4.
        tensor = tensor.round()
    return tensor.to(like.dtype)


def _restore(strategy: Strategy, saved: Mapping[str, Any], previous: StateDict) -> None:
    for name, encoded in saved.items():
        value = decode(encoded)
        # An attribute a new strategy already has arrays in is its copy of the global state. The one it kept
        # is more precise, but may only be used if it is the same state: noise may have been added, or a part
        # replaced.
        is_copy = _holds_arrays(getattr(strategy, name, None)) and _holds_arrays(value)
        if not is_copy or _is_state(value, previous):
            setattr(strategy, name, value)


def _is_state(value: Any, previous: StateDict) -> bool:
    from flwr.common import Parameters, parameters_to_ndarrays

    arrays = parameters_to_ndarrays(value) if isinstance(value, Parameters) else value
    return len(arrays) == len(previous) and all(
        torch.equal(widened(from_numpy(array, tensor)), widened(tensor))
        for array, tensor in zip(arrays, previous.values(), strict=True)
    )


def _holds_arrays(value: object) -> bool:
    from flwr.common import Parameters

    return isinstance(value, Parameters | list)
