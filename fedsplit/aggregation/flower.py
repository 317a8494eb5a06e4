"""Flower's strategies as rules of a part, `flower.FedAdam(eta=0.01)`, and what any strategy remembers between rounds.

The class runs unchanged: only its `aggregate_fit` is called, with numpy arrays. In each round it is made anew from its
parameters and the global state, and given back the attributes it had at the end of the round before; so a resumed run
ends at the same bits. Integer and boolean entries take the maximum and are never shown to the strategy. Flower is
imported with this module, so only when such a rule is loaded.

Not promised: state that a strategy changes inside an array in place, or keeps outside its attributes; no strategy of
Flower 1.41 does either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import flwr.server.strategy as strategies
import numpy as np
import torch
from flwr.common import Code, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from torch import Tensor

from fedsplit.aggregation.base import AggregationContext, Rule, StateDict, Update
from fedsplit.aggregation.numeric import floating_keys, is_floating, maximum, widened
from fedsplit.errors import AggregationError, UsageError

StrategyMaker = Callable[..., strategies.Strategy]

# docs/aggregation.md says what each class of flwr.server.strategy does here; a test compares the names and reasons.
WORKING = (
    "FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "FedOpt", "FedMedian", "FedTrimmedAvg", "Krum", "Bulyan",
    "FaultTolerantFedAvg", "FedProx",
)  # fmt: skip
NOT_WORKING: Mapping[str, str] = {
    "Strategy": "it is the abstract base class",
    "QFedAvg": "it weighs by the loss of the global model measured on the server, which has no model",
    "FedAvgAndroid": "it sends arrays without their shapes; it merges as FedAvg",
    **dict.fromkeys(("FedXgbBagging", "FedXgbCyclic", "FedXgbNnAvg"), "it merges XGBoost trees as bytes, not arrays"),
    **dict.fromkeys(
        (
            "DPFedAvgAdaptive", "DPFedAvgFixed",
            "DifferentialPrivacyClientSideAdaptiveClipping", "DifferentialPrivacyClientSideFixedClipping",
            "DifferentialPrivacyServerSideAdaptiveClipping", "DifferentialPrivacyServerSideFixedClipping",
        ),
        "it wraps another strategy and its clients' configuration: use dp(rule, clip=…, noise=…)",
    ),
}  # fmt: skip


def flower_rule(text: str, name: str, params: Mapping[str, Any]) -> Rule:
    """Load a class of `flwr.server.strategy` as a rule that messages call `text`.

    Raises UsageError for a class that is not there or cannot work as a rule, and for parameters it does not take.
    """
    if name in NOT_WORKING:
        raise UsageError(f"flower.{name} cannot be the rule of a part: {NOT_WORKING[name]}")
    kind = getattr(strategies, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, strategies.Strategy)):
        raise UsageError(f"Flower has no strategy {name!r}; those that work here: {', '.join(WORKING)}")
    _check_params(name, kind, params)
    if "fit_metrics_aggregation_fn" in inspect.signature(kind).parameters:
        # Without one, the strategy logs a warning in its first round.
        params = {**params, "fit_metrics_aggregation_fn": lambda metrics: {}}
    make: StrategyMaker = partial(kind, **params)
    try:
        make(initial_parameters=ndarrays_to_parameters([]))
    except (TypeError, ValueError) as exc:
        raise UsageError(f"flower.{name} refuses its parameters: {exc}") from exc
    return Rule.of_function(text, partial(_aggregate, make))


def _check_params(name: str, kind: type, params: Mapping[str, Any]) -> None:
    # All that FedAvg takes but `inplace` is about which clients take part, and the server has its own flags for that.
    elsewhere = {*inspect.signature(strategies.FedAvg).parameters} - {"inplace"}
    signature = inspect.signature(kind).parameters.values()
    taken = [p.name for p in signature if p.kind is not p.VAR_KEYWORD]
    merging = [key for key in taken if key not in elsewhere and not key.startswith("min_completion_rate")]
    open_ended = len(taken) < len(signature)
    for key in params:
        if key in taken and key not in merging:
            raise UsageError(f"flower.{name}: {key!r} does not shape the merge; the server's own flags choose clients")
        if key not in taken and not open_ended:
            raise UsageError(f"flower.{name} has no parameter {key!r}: it takes {', '.join(merging) or 'none'}")


def _aggregate(make: StrategyMaker, updates: Sequence[Update], context: AggregationContext) -> StateDict:
    first = updates[0].state_dict
    # Sorted, as the memory holds lists: a state read from a file may have its keys in another order.
    previous = {key: context.previous[key] for key in sorted(floating_keys(first))}
    merged = _merge(make, previous, updates, context.memory) if previous else {}
    return {
        key: merged[key] if key in merged else reduce(maximum, [update.state_dict[key] for update in updates])
        for key in first
    }


def _merge(make: StrategyMaker, previous: StateDict, updates: Sequence[Update], memory: dict[str, Any]) -> StateDict:
    """Let a strategy that remembers what the one of the round before did merge the floating entries."""
    strategy = make(initial_parameters=to_parameters(previous))
    attributes = Attributes(strategy)
    _restore(strategy, memory.get("attributes", {}), previous)
    # Its own count, as FedAvgM and FedAdam take round 1 for the first merge, and rounds may pass without one.
    merges = memory.get("merges", 0) + 1
    results: Any = [(None, fit_result(update, {key: update.state_dict[key] for key in previous})) for update in updates]
    parameters, _ = strategy.aggregate_fit(merges, results, [])
    if parameters is None:
        raise AggregationError(f"{type(strategy).__name__} returned nothing")
    memory["attributes"] = attributes.changed()
    memory["merges"] = merges
    pairs = zip(previous.items(), parameters_to_ndarrays(parameters), strict=True)
    return {key: from_numpy(array, tensor) for (key, tensor), array in pairs}


def fit_result(update: Update, state: Mapping[str, Tensor]) -> FitRes:
    """Return an update as Flower's strategies see it, with these entries."""
    return FitRes(Status(Code.OK, ""), to_parameters(state), update.num_examples, dict(update.metrics))


def to_parameters(state: Mapping[str, Tensor]) -> Parameters:
    """Return a state as Flower's strategies see it: arrays in the order of its keys.

    Floating entries are in float32 at least, as numpy has no bfloat16 and would average float16 in float16; complex
    ones are pairs.
    """
    return ndarrays_to_parameters([to_numpy(tensor) for tensor in state.values()])


def to_numpy(tensor: Tensor) -> Any:
    """Return one entry as `to_parameters` does."""
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


def _restore(strategy: object, saved: Mapping[str, Any], previous: StateDict) -> None:
    for name, encoded in saved.items():
        value = decode(encoded)
        # Where a new strategy has arrays already, they are its copy of the global state. The copy it kept is more
        # precise, but only right if the state is still the same: noise may have been added, or a part replaced.
        is_copy = all(isinstance(each, Parameters | list) for each in (getattr(strategy, name, None), value))
        if not is_copy or _is_state(value, previous):
            setattr(strategy, name, value)


def _is_state(value: Any, previous: StateDict) -> bool:
    arrays = parameters_to_ndarrays(value) if isinstance(value, Parameters) else value
    return len(arrays) == len(previous) and all(
        torch.equal(widened(from_numpy(array, tensor)), widened(tensor))
        for array, tensor in zip(arrays, previous.values(), strict=True)
    )


class NotKeepableError(TypeError):
    """A value that no checkpoint can hold, or that has such a value in it; it never leaves this module."""


class Attributes:
    """What a strategy that was just made comes to remember: its attributes, as a checkpoint can hold them.

    Kept are None, bool, int, float, str, numpy arrays and numbers, torch tensors, Flower's `Parameters`, and lists,
    tuples and dicts of these. Only attributes that differ from those of a strategy made anew are saved, so that
    parameters changed on resuming take effect.
    """

    def __init__(self, strategy: object) -> None:
        self._strategy = strategy
        self._made = dict(vars(strategy))
        # Copies, since a list or a dict may be changed in place. Nobody does that to Flower's Parameters.
        self._encoded = {
            name: encoded
            for name, value in self._made.items()
            if not isinstance(value, Parameters) and (encoded := _encoded_or_none(value))
        }

    def changed(self) -> dict[str, Any]:
        """Return the encoded attributes that a strategy made anew would not have; without those of `not_keepable`."""
        found = {}
        for name, value in vars(self._strategy).items():
            if name in self._made and value is self._made[name] and name not in self._encoded:
                continue
            encoded = _encoded_or_none(value)
            if encoded and not (name in self._encoded and _is_same(encoded, self._encoded[name])):
                found[name] = encoded[0]
        return found

    def not_keepable(self) -> dict[str, str]:
        """Return the type of each attribute that cannot be kept; functions, classes and modules do not count."""
        return {
            name: type(value).__name__
            for name, value in vars(self._strategy).items()
            if not (inspect.isroutine(value) or inspect.isclass(value) or inspect.ismodule(value))
            and not _encoded_or_none(value)
        }


def encode(value: Any) -> Any:
    """Return a value as `torch.save` writes and ``weights_only`` reads it, arrays as copies, or refuse it."""
    if isinstance(value, np.generic):  # before float, which numpy's float64 is too
        return {"scalar": _tensor(value)}
    if isinstance(value, None | bool | int | float | str):
        return value
    if isinstance(value, np.ndarray):
        return _tensor(value)
    if isinstance(value, torch.Tensor):
        return {"tensor": value.detach().clone()}
    if isinstance(value, Parameters) and value.tensor_type == "numpy.ndarray":
        return {"parameters": [_tensor(array) for array in parameters_to_ndarrays(value)]}
    if type(value) is list:
        return [encode(item) for item in value]
    if type(value) is tuple:
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"items": [[encode(key), encode(item)] for key, item in value.items()]}
    raise NotKeepableError(f"a {type(value).__name__}")


def decode(value: Any) -> Any:
    """Return what `encode` was given."""
    match value:
        case torch.Tensor():
            return value.numpy()
        case list():
            return [decode(item) for item in value]
        case {"scalar": tensor}:
            return tensor.numpy()[()]
        case {"tensor": tensor}:
            return tensor
        case {"parameters": tensors}:
            return ndarrays_to_parameters([tensor.numpy() for tensor in tensors])
        case {"tuple": items}:
            return tuple(decode(item) for item in items)
        case {"items": items}:
            return {decode(key): decode(item) for key, item in items}
        case _:
            return value


def _tensor(array: Any) -> torch.Tensor:
    try:
        return torch.from_numpy(np.array(array))
    except TypeError as exc:
        raise NotKeepableError(f"an array of {array.dtype}") from exc


def _encoded_or_none(value: object) -> tuple[Any] | None:
    """Return a value encoded, in a tuple since None is a value, or None if it cannot be."""
    try:
        return (encode(value),)
    except (NotKeepableError, RecursionError):
        return None


def _is_same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(_is_same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_is_same(left[key], right[key]) for key in left)
    return bool(left == right)
