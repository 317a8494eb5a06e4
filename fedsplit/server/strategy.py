"""Our strategy: every part of the model is merged by a rule of its own.

`Strategy` is Flower's interface over `fedsplit.aggregation`. It runs in this project's server, and as well in Flower's
own: ``start_server(strategy=fedsplit.Strategy(...))`` with any `NumPyClient`, or ``ServerApp(server_fn=...)``. There an
entry has no name but its place among the arrays, unless ``keys`` gives it one.

Importing this module imports torch. The server does so once it listens, while the clients are still on their way.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

import fedsplit.wire.flower_env  # noqa: F401  (first: it keeps Flower from calling home)

# isort: split
from flwr.common import EvaluateIns, FitIns, FitRes, Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.typing import Scalar as FlowerScalar
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy

from fedsplit.aggregation import Split, Update
from fedsplit.aggregation.split import check_rules
from fedsplit.errors import UsageError
from fedsplit.exchange.records import Scalar
from fedsplit.run.history import weighted_mean
from fedsplit.run.parts import PartRow
from fedsplit.server.settings import ServerSettings
from fedsplit.server.streaming import (
    EvaluateFailures,
    EvaluateResults,
    FitFailures,
    FitResults,
    Merge,
    StreamingStrategy,
    checked,
    dump,
    read_update,
)  # fmt: skip
from fedsplit.states.state_dict import StateDict, decode, encode
from fedsplit.wire.protocol import TENSOR_TYPE

log = logging.getLogger("fedsplit")


class Strategy(StreamingStrategy):
    """Merges every part of the model by a rule of its own.

    Parameters
    ----------
    aggregate
        The rules, each as after ``--aggregate``: ``"fedavg"``, ``"body.*=median"``. One text is one rule.
    min_clients
        How many clients a round waits for.
    min_results
        With fewer accepted updates a round leaves the state as it was.
    fraction_train
        Share of the connected clients that train in a round.
    evaluate_every
        Evaluate after every N-th round; 0 is never.
    train_config
        What every client is told, for training and evaluation.
    seed
        For the sampling of clients and for rules that draw.
    rounds
        What rules are told as ``total_rounds``.
    keys
        The names of the arrays that clients of Flower's own exchange, in their order, such as
        ``list(model.state_dict())``. Without them the names are ``"0"``, ``"1"``, ...
    initial_parameters
        What the first round starts from; None asks a client.

    Raises
    ------
    UsageError
        For a value out of its range, and for a rule that cannot be read or loaded.
    """

    memory_file = "rules.pt"

    def __init__(
        self,
        aggregate: str | Sequence[str] = (),
        *,
        min_clients: int = 2,
        min_results: int = 1,
        fraction_train: float = 1.0,
        evaluate_every: int = 1,
        train_config: Mapping[str, Scalar] | Iterable[tuple[str, Scalar]] = (),
        seed: int = 0,
        rounds: int = 3,
        keys: Sequence[str] | None = None,
        initial_parameters: Parameters | None = None,
    ) -> None:
        self.settings = ServerSettings(
            aggregate=(aggregate,) if isinstance(aggregate, str) else tuple(aggregate), min_clients=min_clients,
            min_results=min_results, fraction_train=fraction_train, evaluate_every=evaluate_every,
            train_config=tuple(dict(train_config).items()), seed=seed, rounds=rounds,
        )  # fmt: skip
        check_rules(self.settings.rules)
        self.asks_everyone = fraction_train == 1.0
        self.split = Split(parts=(), rows=())
        self.memory: dict[str, dict[str, Any]] = {}
        self._keys = keys
        self._initial_parameters = initial_parameters
        self._reference: StateDict = {}
        self._order: list[str] = []

    @classmethod
    def of(cls, settings: ServerSettings) -> Self:
        """Make the strategy that a server's flags ask for."""
        names = ("aggregate", "min_clients", "min_results", "fraction_train", "evaluate_every", "train_config",
                 "seed", "rounds")  # fmt: skip
        return cls(**{name: getattr(settings, name) for name in names})

    # -- training ----------------------------------------------------------------------------------------------------

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Return the parameters to start from; None lets the server ask a client."""
        return self._initial_parameters

    def begin_run(self, state: StateDict, local_entries: Mapping[str, torch.Tensor]) -> list[PartRow]:
        """Give every entry its rule; raises UsageError for a pattern without entries or an entry without a rule."""
        self._reference = state
        entries = {**state, **local_entries}
        self.split = Split.resolve(self.settings.rules, entries, local_withheld=not local_entries)
        if self.split.min_updates > self.settings.min_clients:
            raise UsageError(
                f"the rules need at least {self.split.min_updates} updates a round, --min-clients is "
                f"{self.settings.min_clients}; start with --min-clients {self.split.min_updates} or more"
            )
        return list(self.split.rows)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Draw the clients that train: the same ones whenever the same clients are there.

        Raises
        ------
        UsageError
            In Flower's own server: for a ``local`` rule, or ``keys`` that do not name each array.
        """
        self._take_up(parameters)
        client_manager.wait_for(self.settings.min_clients, 86400)
        clients = client_manager.all()
        self._order = sorted(clients, key=_order)
        config: dict[str, FlowerScalar] = {**dict(self.settings.train_config)}
        return [(clients[cid], FitIns(parameters, config)) for cid in self.sample(server_round, self._order)]

    def sample(self, server_round: int, clients: Sequence[str]) -> list[str]:
        """Draw from client ids that are in order; returns them in that order."""
        number = max(1, math.ceil(self.settings.fraction_train * len(clients)), self.settings.min_results)
        draw = random.Random(f"{self.settings.seed}/{server_round}")
        return sorted(draw.sample(list(clients), min(number, len(clients))), key=_order)

    def start_fit(self, server_round: int) -> Merge:
        """Begin to merge the updates of a round."""
        return self.split.start_round(
            server_round=server_round, total_rounds=self.settings.rounds, previous=self._reference,
            seed=self.settings.seed, memory=self.memory,
        )  # fmt: skip

    def end_fit(
        self, server_round: int, merge: Any, failures: FitFailures
    ) -> tuple[StateDict | None, dict[str, FlowerScalar]]:
        """Return the next state; None if there were too few updates."""
        needed = max(self.settings.min_results, self.split.min_updates)
        if merge.count < needed:
            log.warning(
                "only %d of at least %d updates were accepted: the global state stays as it was", merge.count, needed
            )
            return None, {}
        return merge.finish(), {}

    def aggregate_fit(
        self, server_round: int, results: FitResults, failures: FitFailures
    ) -> tuple[Parameters | None, dict[str, FlowerScalar]]:
        """Merge a list of results, in the order of their clients' ids; what must not be merged is refused."""
        merge = self.start_fit(server_round)
        accepted = []
        tensor_type = TENSOR_TYPE
        for client, result in sorted(results, key=lambda each: _order(each[0].cid)):
            rank = int(client.cid) if client.cid.isdecimal() else self._order.index(client.cid) + 1
            tensor_type = result.parameters.tensor_type
            update = self._read(rank, result)
            if isinstance(update, str):
                log.warning("the update of client %s was refused: %s", client.cid, update)
                continue
            merge.add(update)
            accepted.append((result.num_examples, result.metrics))
        state, _ = self.end_fit(server_round, merge, failures)
        parameters = None if state is None else _to_parameters(state, tensor_type)
        return parameters, dict(weighted_mean(accepted))

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, dict[str, FlowerScalar]] | None:
        """The server has no data."""
        return None

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Every connected client evaluates, in the rounds that are evaluated."""
        if not self.settings.is_evaluated(server_round):
            return []
        clients = client_manager.all()
        config: dict[str, FlowerScalar] = {**dict(self.settings.train_config)}
        return [(clients[cid], EvaluateIns(parameters, config)) for cid in sorted(clients, key=_order)]

    def aggregate_evaluate(
        self, server_round: int, results: EvaluateResults, failures: EvaluateFailures
    ) -> tuple[float | None, dict[str, FlowerScalar]]:
        """Average losses and metrics by the number of examples."""
        means = weighted_mean((result.num_examples, {**result.metrics, "loss": result.loss}) for _, result in results)
        return means.pop("loss", None), dict(means)

    # -- what outlives the process -------------------------------------------------------------------------------------

    def dump_memory(self) -> bytes | None:
        """Return what the rules remember."""
        return dump(self.memory) if any(self.memory.values()) else None

    def load_memory(self, path: Path) -> None:
        """Give the rules back what they remembered."""
        self.memory = torch.load(path, weights_only=True, map_location="cpu")

    def line_entries(self) -> dict[str, Any]:
        """Return epsilon and delta over all private parts so far, as ``privacy``; nothing without such a part."""
        if not any(spec.inner for spec in self.settings.rules):
            return {}
        from fedsplit.aggregation.privacy import privacy_spent

        return {"privacy": spent} if (spent := privacy_spent(self.memory)) else {}

    # -- Flower's own clients ------------------------------------------------------------------------------------------

    def _take_up(self, parameters: Parameters) -> None:
        """Remember the state that the round starts from; in Flower's own server, find out about it first."""
        if parameters.tensor_type == TENSOR_TYPE:
            self._reference = decode(parameters.tensors[0], "the global state")
        else:
            self._reference = self._named(parameters)
        if not self.split.parts:
            if local := [str(spec) for spec in self.settings.rules if spec.name == "local"]:
                raise UsageError(
                    f"{local[0]}: a client of Flower's own sends all its arrays, so nothing can stay with it; leave "
                    "those arrays out of its get_parameters, or run client_main.py and a fedsplit.Trainer"
                )
            self.begin_run(self._reference, {})

    def _named(self, parameters: Parameters) -> StateDict:
        arrays = parameters_to_ndarrays(parameters)
        keys = [str(index) for index in range(len(arrays))] if self._keys is None else self._keys
        if len(keys) != len(arrays):
            raise UsageError(f"keys names {len(keys)} arrays, the parameters have {len(arrays)}")
        return {key: torch.from_numpy(array) for key, array in zip(keys, arrays, strict=True)}

    def _read(self, rank: int, result: FitRes) -> Update | str:
        try:
            if result.parameters.tensor_type == TENSOR_TYPE:
                return read_update(
                    rank, result.parameters.tensors[0], result.num_examples, result.metrics, self._reference
                )
            state = self._named(result.parameters)
        except (UsageError, TypeError, ValueError) as exc:
            return str(exc)
        return checked(rank, state, result.num_examples, result.metrics, self._reference)


def _to_parameters(state: StateDict, tensor_type: str) -> Parameters:
    if tensor_type == TENSOR_TYPE:
        return Parameters([b"".join(encode(state))], TENSOR_TYPE)
    return ndarrays_to_parameters([tensor.numpy() for tensor in state.values()])


def _order(cid: str) -> tuple[int, str]:
    """Ranks by their number, before ids that Flower's own server gives out."""
    return (int(cid), "") if cid.isdecimal() else (1 << 62, cid)
