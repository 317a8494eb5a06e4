"""Flower's strategies as rules of a part, `flower.FedAdam(eta=0.01)`, and what any strategy remembers between rounds.

The class runs unchanged: only its `aggregate_fit` is called, with numpy arrays. In each round it is made anew from its
parameters and the global state, and given back the attributes it had at the end of the round before; so a resumed run
ends at the same bits. Integer and boolean entries take the maximum and are never shown to the strategy. Flower is
imported with this module, so only when such a rule is loaded.

Not promised: state that a strategy changes inside an array in place, or keeps outside its attributes; no strategy of
Flower 1.41 does either.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import flwr.server.strategy as strategies
import torch
from flwr.common import Parameters, parameters_to_ndarrays

from fedsplit.aggregation.base import AggregationContext, Rule, StateDict, Update
from fedsplit.aggregation.flower_arrays import Attributes, decode, fit_result, from_arrays, to_arrays
from fedsplit.aggregation.numeric import floating_keys, maximum, widened
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
        make(initial_parameters=to_arrays({}))
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
    strategy = make(initial_parameters=to_arrays(previous))
    attributes = Attributes(strategy)
    for name, encoded in memory.get("attributes", {}).items():
        value = decode(encoded)
        # Where a new strategy has arrays already, they are its copy of the global state. The copy it kept is more
        # precise, but only right if the state is still the same: noise may have been added, or a part replaced.
        is_copy = all(isinstance(each, Parameters | list) for each in (getattr(strategy, name, None), value))
        if not is_copy or _is_state(value, previous):
            setattr(strategy, name, value)
    # Its own count, as FedAvgM and FedAdam take round 1 for the first merge, and rounds may pass without one.
    merges = memory.get("merges", 0) + 1
    results: Any = [(None, fit_result(update, {key: update.state_dict[key] for key in previous})) for update in updates]
    parameters, _ = strategy.aggregate_fit(merges, results, [])
    if parameters is None:
        raise AggregationError(f"{type(strategy).__name__} returned nothing")
    memory["attributes"], _ = attributes.changed()
    memory["merges"] = merges
    return from_arrays(parameters_to_ndarrays(parameters), previous)


def _is_state(value: Any, previous: StateDict) -> bool:
    arrays = parameters_to_ndarrays(value) if isinstance(value, Parameters) else value
    if len(arrays) != len(previous):
        return False
    found = from_arrays(arrays, previous)
    return all(torch.equal(widened(found[key]), widened(tensor)) for key, tensor in previous.items())
