"""Any Flower strategy as the whole of the server's: ``--strategy package.module:Class(key=value, ...)``.

The strategy sees what it would see in Flower's own server: numpy arrays in the order of the state_dict, a client
manager whose clients are the ranks (``cid`` is the rank), results and failures. It chooses who trains, with what
configuration and from which parameters, and it merges. Updates are checked before it sees them.

`fedsplit.aggregation.flower_arrays` makes the arrays, and says which of the strategy's attributes are kept in the
checkpoints. Whole numbers and truth values are float64 in the results, and what becomes of them is rounded: Flower's
averages of integers come to 0 otherwise. So they are exact up to 2**53.
"""

import inspect
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import flwr.common as flower
import torch
from flwr.common import Parameters
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy as FlowerStrategy

from fedsplit.aggregation import Update
from fedsplit.aggregation.flower_arrays import Attributes, decode, fit_result, from_arrays, to_arrays
from fedsplit.aggregation.grammar import parse_call
from fedsplit.aggregation.numeric import is_floating
from fedsplit.aggregation.split import find_object
from fedsplit.aggregation.validation import check_output
from fedsplit.errors import AggregationError, FedSplitError, UsageError
from fedsplit.run.history import PartRow, is_number
from fedsplit.server import strategy as base
from fedsplit.server.peer import RankProxy
from fedsplit.server.settings import ServerSettings
from fedsplit.states.extra import separate
from fedsplit.states.state_dict import StateDict
from fedsplit.states.state_dict import decode as decode_state
from fedsplit.states.ties import find_ties

log = logging.getLogger("fedsplit")


class ForeignStrategy(base.StreamingStrategy):
    """Runs the strategy that ``settings.strategy`` names; raises UsageError if it cannot be made."""

    memory_file = "strategy.pt"
    remembers_evaluations = True
    # The strategy itself, and what of it is kept. One that wants the initial parameters is made by `begin_run`.
    inner: FlowerStrategy
    _attributes: Attributes

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._text = settings.strategy or ""
        call = parse_call(self._text)
        if call.rule:
            raise UsageError(f"--strategy {call.name}: rule must be a number, a text, true or false")
        self._class, self._params = load_strategy(call.name), call.params
        self._name = self._class.__name__
        self._warned: set[str] = set()
        self._clients: dict[int, ClientProxy] = {}
        # The state without the further names of tied weights, which are one array, and those names.
        self._reference: StateDict = {}
        self._ties: Mapping[str, str] = {}
        self._given: Parameters | None = None
        # A state as our payload and as Flower's arrays: converted once for all that a round does with it.
        self._state: tuple[Parameters, Parameters] | None = None
        if not self._wants_initial_parameters():
            self._make()
        else:
            with self._refusing():
                inspect.signature(self._class).bind(initial_parameters=None, **self._params)

    def begin_run(self, state: StateDict, local_entries: Mapping[str, torch.Tensor]) -> list[PartRow]:
        """Make the strategy, if it wants the initial parameters, and say what of it cannot be kept."""
        self._take_up(state)
        if self._wants_initial_parameters():
            self._given = to_arrays(self._reference)
            self._make(initial_parameters=self._given)
        self._changed()
        size = sum(tensor.nbytes for tensor in state.values())
        return [PartRow(part="*", entries=len(state), bytes=size, rule=self._text)]

    def start_fit(self, server_round: int) -> base.Merge:
        return _Collected()

    def end_fit(self, server_round: int, merge: Any, failures: base.FitFailures) -> base.Ended:
        results = [(self._clients[update.rank], _result(update, self._reference)) for update in merge.updates]
        parameters, metrics = self.aggregate_fit(server_round, results, failures)
        if parameters is None:
            log.warning("%s returned no parameters: the global state stays as it was", self._name)
            return None, metrics
        return self._named(parameters, "aggregate_fit"), metrics

    def dump_memory(self) -> bytes | None:
        """Return the attributes that have changed since the strategy was made."""
        changed = self._changed()
        return base.dump({"strategy": self._name, "attributes": changed}) if changed else None

    def load_memory(self, path: Path) -> None:
        memory = torch.load(path, weights_only=True, map_location="cpu")
        before = memory["strategy"]
        if before != self._name:
            log.warning("the run went on with strategy %s; what it remembered is not given to %s", before, self._name)
            return
        for name, value in memory["attributes"].items():
            setattr(self.inner, name, decode(value))

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Return the strategy's initial values under the names and dtypes of a trainer's state; None if it has none."""
        parameters = self._call("initialize_parameters", client_manager=client_manager)
        if parameters is None or parameters is self._given:
            return None
        return base.to_payload(self._named(parameters, "initialize_parameters"))

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: ClientManager) -> base.FitChoice:
        chosen: base.FitChoice = self._chosen("configure_fit", server_round, parameters, client_manager)
        self._clients = {int(client.cid): client for client, _ in chosen}
        return chosen

    def aggregate_fit(self, server_round: int, results: base.FitResults, failures: base.FitFailures) -> base.Merged:
        parameters, metrics = self._call("aggregate_fit", server_round, results, failures)
        return parameters, _numbers(metrics)

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, base.Metrics] | None:
        found = self._call("evaluate", server_round, parameters=self._arrays(parameters))
        return None if found is None else (float(found[0]), _numbers(found[1]))

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> base.EvaluateChoice:
        if not self._settings.is_evaluated(server_round):
            return []
        return self._chosen("configure_evaluate", server_round, parameters, client_manager)

    def aggregate_evaluate(
        self, server_round: int, results: base.EvaluateResults, failures: base.EvaluateFailures
    ) -> tuple[float | None, base.Metrics]:
        loss, metrics = self._call("aggregate_evaluate", server_round, results, failures)
        return None if loss is None else float(loss), _numbers(metrics)

    def _wants_initial_parameters(self) -> bool:
        """Tell whether it is made with the first state: when it asks for it, and Flower's own always."""
        parameter = inspect.signature(self._class).parameters.get("initial_parameters")
        if parameter is None or "initial_parameters" in self._params:
            return False
        return parameter.default is parameter.empty or self._class.__module__.startswith("flwr.")

    def _make(self, **extra: Any) -> None:
        with self._refusing():
            self.inner = self._class(**self._params, **extra)
        self._attributes = Attributes(self.inner)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except Exception as exc:  # whatever the user's class raises is for them to read
            raise UsageError(
                f"--strategy {self._text}: {self._name} refuses its parameters: {type(exc).__name__}: {exc}"
            ) from exc

    def _changed(self) -> dict[str, Any]:
        """Return the attributes to keep; what cannot be kept is told of once."""
        changed, lost = self._attributes.changed()
        if new := {name: kind for name, kind in lost.items() if name not in self._warned}:
            self._warned |= set(new)
            log.warning(
                "%s keeps what no checkpoint can hold: %s. After --resume these are as in a new strategy",
                self._name, ", ".join(f"{name} ({kind})" for name, kind in new.items()),
            )  # fmt: skip
        return changed

    def _call(self, method: str, *arguments: Any, **named: Any) -> Any:
        with self._naming(method):
            return getattr(self.inner, method)(*arguments, **named)

    @contextmanager
    def _naming(self, method: str) -> Iterator[None]:
        """Turn what the strategy raises into an `AggregationError` that names it."""
        try:
            yield
        except FedSplitError:
            raise
        except Exception as exc:  # it is the user's code: whatever it raises, they want to see where
            log.error("the traceback of %s.%s:\n%s", self._name, method, traceback.format_exc().rstrip())
            raise AggregationError(
                f"the strategy {self._name} failed in {method}: {type(exc).__name__}: {exc}"
            ) from exc

    def _take_up(self, state: StateDict) -> None:
        self._ties = find_ties(state)
        self._reference = {key: tensor for key, tensor in state.items() if key not in self._ties}

    def _arrays(self, parameters: Parameters) -> Parameters:
        """Return the global state as Flower's arrays."""
        if self._state is None or self._state[0] is not parameters:
            self._take_up(separate(decode_state(parameters.tensors[0], "the global state"))[0])
            self._state = parameters, to_arrays(self._reference)
        return self._state[1]

    def _chosen(
        self, method: str, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, Any]]:
        """Let the strategy choose, and turn each parameters object back once; most are the global state."""
        arrays = self._arrays(parameters)
        chosen = self._call(method, server_round=server_round, parameters=arrays, client_manager=client_manager)
        cids = [client.cid for client, _ in chosen]
        if len(set(cids)) != len(cids) or not all(isinstance(client, RankProxy) for client, _ in chosen):
            raise AggregationError(
                f"the strategy {self._name}: {method} must choose among the clients of its client_manager, each at "
                f"most once; it chose {', '.join(cids)}"
            )
        known, found = {id(arrays): parameters}, []
        for client, ins in chosen:
            if id(ins.parameters) not in known:
                known[id(ins.parameters)] = base.to_payload(self._named(ins.parameters, method))
            config = self._config(client, ins.config, method)
            found.append((client, replace(ins, parameters=known[id(ins.parameters)], config=config)))
        return found

    def _named(self, parameters: Parameters, method: str) -> StateDict:
        """Return arrays of the strategy's under the names, shapes and dtypes of the state."""
        who, reference = f"the strategy {self._name}", self._reference
        with self._naming(method):
            arrays = flower.parameters_to_ndarrays(parameters)
            if len(arrays) != len(reference):
                raise AggregationError(
                    f"{who}: {method} gave {len(arrays)} arrays, expected {len(reference)}, one for each entry"
                )
            for (key, tensor), array in zip(reference.items(), arrays, strict=True):
                expected = (*tensor.shape, 2) if tensor.is_complex() else tuple(tensor.shape)
                if array.shape != expected:
                    raise AggregationError(f"{who}: {method} gave {key!r} the shape {array.shape}, expected {expected}")
            state = from_arrays(arrays, reference)
        try:
            check_output(state, reference)
        except AggregationError as exc:
            raise AggregationError(f"{who} in {method}: {exc}") from exc
        return state | {key: state[kept] for key, kept in self._ties.items()}

    def _config(self, client: ClientProxy, config: Mapping[str, Any], method: str) -> base.Metrics:
        for key, value in config.items():
            if not isinstance(value, bool | int | float | str):
                raise AggregationError(
                    f"the strategy {self._name}: {method} gave rank {client.cid} the configuration {key!r} of type "
                    f"{type(value).__name__}, expected bool, int, float or str"
                )
        return {**dict(self._settings.train_config), **config}


class _Collected:
    """The updates of a round, all kept until the strategy takes them."""

    retains = True
    at_once = 1

    def __init__(self) -> None:
        self.updates: list[Update] = []
        self.add = self.updates.append

    def add_all(self, updates: Sequence[Update]) -> dict[int, str]:
        raise NotImplementedError  # not while `at_once` is 1


def load_strategy(name: str) -> type[FlowerStrategy]:
    """Find a class of ``flwr.server.strategy``, or ``package.module:Class``; raises UsageError if it is no strategy."""
    module_name, separator, path = name.partition(":")
    if not separator:
        module_name, path = "flwr.server.strategy", name
    target = find_object(f"{module_name}:{path}", f"--strategy {name}")
    if not inspect.isclass(target) or not issubclass(target, FlowerStrategy) or inspect.isabstract(target):
        raise UsageError(
            f"--strategy {name}: {module_name} has no class {path!r} that implements flwr.server.strategy.Strategy"
        )
    return target


def _result(update: Update, reference: StateDict) -> flower.FitRes:
    state = {key: update.state_dict[key] for key in reference}
    return fit_result(update, {key: each if is_floating(each) else each.double() for key, each in state.items()})


def _numbers(metrics: Mapping[str, Any] | None) -> base.Metrics:
    """Return the metrics that a round's line can hold: numbers, numpy's among them."""
    plain = {str(name): value.item() if hasattr(value, "item") else value for name, value in (metrics or {}).items()}
    return {name: value for name, value in plain.items() if is_number(value)}
