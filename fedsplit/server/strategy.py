"""What decides a round: `StreamingStrategy`, which the server runs, and `Strategy`, a rule for every part of the model.

`Strategy` also runs in Flower's own server, ``start_server(strategy=fedsplit.Strategy(...))``, with any `NumPyClient`,
and in a ``ServerApp``. There an entry has no name but its place among the arrays, unless ``keys`` gives it one.

Importing this module imports torch. The server does so once it listens, while the clients are still on their way.
"""

import io
import logging
import math
import random
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import flwr.common as flower
import torch
from flwr.common import Parameters
from flwr.common.typing import Scalar as FlowerScalar
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy as FlowerStrategy

from fedsplit.aggregation import Split, Update, check_update
from fedsplit.aggregation.split import RoundMerger, check_rules
from fedsplit.errors import RecordError, UsageError
from fedsplit.exchange.records import Scalar
from fedsplit.run.history import PartRow, weighted_mean
from fedsplit.server.settings import ServerSettings
from fedsplit.states.extra import join, separate
from fedsplit.states.state_dict import StateDict, decode, encode
from fedsplit.wire.protocol import TENSOR_TYPE

log = logging.getLogger("fedsplit")

# Where the memory has the extra tensors of single ranks; the other keys have the form PATTERN=RULE.
_RANK_EXTRA = "extra tensors by rank"

# What Flower's interface takes and gives back.
Metrics = dict[str, FlowerScalar]
FitChoice = list[tuple[ClientProxy, flower.FitIns]]
EvaluateChoice = list[tuple[ClientProxy, flower.EvaluateIns]]
Merged = tuple[Parameters | None, Metrics]
# The next state, None if it stays as it was, and metrics for the round's line.
Ended = tuple[StateDict | None, Metrics]
FitResults = list[tuple[ClientProxy, flower.FitRes]]
FitFailures = list[tuple[ClientProxy, flower.FitRes] | BaseException]
EvaluateResults = list[tuple[ClientProxy, flower.EvaluateRes]]
EvaluateFailures = list[tuple[ClientProxy, flower.EvaluateRes] | BaseException]


class Merge(Protocol):
    """A round's updates on their way into the next state."""

    retains: bool
    """Whether updates are kept until the end. If not, the server may drop each payload after `add`."""

    at_once: int
    """How many updates to give to `add_all` instead, whose numbers need no check before; 1 if it has no such way."""

    def add(self, update: Update) -> None:
        """Take an update that was checked; one at a time, in rank order."""

    def add_all(self, updates: Sequence[Update]) -> dict[int, str]:
        """Take the next few; returns the ranks of those refused for their numbers, and why."""


class StreamingStrategy(FlowerStrategy):
    """A Flower strategy that takes updates one by one: what the server runs.

    A round is `configure_fit`, `start_fit`, the merge's ``add`` for each update, `end_fit`, `evaluate`,
    `configure_evaluate` and `aggregate_evaluate`. The state is the same as that of `aggregate_fit` over all updates.
    """

    # What the file with the strategy's memory is called in a checkpoint.
    memory_file: ClassVar[str]
    # Whether every connected client trains in every round, with the configuration of the evaluation before it.
    asks_everyone: bool = False
    # Whether evaluations may change the memory, so that a checkpoint has to wait for them.
    remembers_evaluations: bool = False
    # In asynchronous rounds, how many ranks there are in all: `configure_fit` is offered those that are free.
    num_ranks: int = 0
    # Whether the extra tensors of an update are of use.
    reads_extra: bool = False
    # With fewer updates in a merge than this, the state stays as it was.
    min_updates: int = 1

    @abstractmethod
    def begin_run(self, state: StateDict, local_entries: Mapping[str, torch.Tensor]) -> list[PartRow]:
        """Get to know the state, and the entries that stay with the clients (without data); returns the resolved split.

        Called before the first round of a run, and before the first after a resume.
        """

    @abstractmethod
    def start_fit(self, server_round: int) -> Merge:
        """Begin to merge the updates of the round that `configure_fit` configured."""

    @abstractmethod
    def end_fit(self, server_round: int, merge: Any, failures: FitFailures) -> Ended:
        """Return the next state, joined with the extra tensors that go along with it, and metrics."""

    @abstractmethod
    def dump_memory(self) -> bytes | None:
        """Return what the strategy remembers, for the checkpoint; None if there is nothing."""

    @abstractmethod
    def load_memory(self, path: Path) -> None:
        """Take up what was remembered."""

    def line_entries(self) -> dict[str, Any]:
        """Return what else belongs into the round's line."""
        return {}


class Strategy(StreamingStrategy):
    """Merges every part of the model by a rule of its own.

    Parameters
    ----------
    aggregate
        The rules, each as after ``--aggregate``: ``"fedavg"``, ``"body.*=median"``. One text is one rule.
    min_clients, min_results, fraction_train, evaluate_every, train_config, seed
        As the server's flags of these names.
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
        self, aggregate: str | Sequence[str] = (), *, min_clients: int = 2, min_results: int = 1,
        fraction_train: float = 1.0, evaluate_every: int = 1,
        train_config: Mapping[str, Scalar] | Iterable[tuple[str, Scalar]] = (), seed: int = 0, rounds: int = 3,
        keys: Sequence[str] | None = None, initial_parameters: Parameters | None = None,
    ) -> None:  # fmt: skip
        self.settings = ServerSettings(
            aggregate=(aggregate,) if isinstance(aggregate, str) else tuple(aggregate), min_clients=min_clients,
            min_results=min_results, fraction_train=fraction_train, evaluate_every=evaluate_every,
            train_config=tuple(dict(train_config).items()), seed=seed, rounds=rounds,
        )  # fmt: skip
        check_rules(self.settings.rules)
        self.asks_everyone = fraction_train == 1.0
        self.split = Split()
        self.memory: dict[str, dict[str, Any]] = {}
        self._config: Metrics = {**dict(self.settings.train_config)}
        self._keys = keys
        self._initial_parameters = initial_parameters
        self._reference: StateDict = {}
        self._extra: StateDict = {}
        # By rank, as text: a part of the memory.
        self._rank_extra: dict[str, StateDict] = {}
        self._order: list[str] = []
        self._ranks: list[int] = []

    @classmethod
    def of(cls, settings: ServerSettings) -> Self:
        """Make the strategy that a server's flags ask for."""
        names = ("aggregate", "min_clients", "min_results", "fraction_train", "evaluate_every", "train_config",
                 "seed", "rounds")  # fmt: skip
        return cls(**{name: getattr(settings, name) for name in names})

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        return self._initial_parameters

    def begin_run(self, state: StateDict, local_entries: Mapping[str, torch.Tensor]) -> list[PartRow]:
        """Give every entry its rule; raises UsageError for a pattern without entries or an entry without a rule."""
        self._reference, settings = state, self.settings
        entries = {**state, **local_entries}
        self.split = Split.resolve(settings.rules, entries, local_withheld=not local_entries, at_home=local_entries)
        if self.split.min_updates > settings.min_clients:
            raise UsageError(
                f"the rules need at least {self.split.min_updates} updates a round, --min-clients is "
                f"{settings.min_clients}; start with --min-clients {self.split.min_updates} or more"
            )
        self.reads_extra, self.min_updates = self.split.reads_extra, max(settings.min_results, self.split.min_updates)
        return [part.row for part in self.split.parts]

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: ClientManager) -> FitChoice:
        """Draw the clients that train: the same ones whenever the same clients are there.

        In Flower's own server, raises UsageError for a ``local`` rule and for ``keys`` that do not name each array.
        """
        self._take_up(parameters)
        settings = self.settings
        client_manager.wait_for(settings.min_clients, 86400)
        clients = client_manager.all()
        self._order = sorted(clients, key=_order)
        number = max(1, math.ceil(settings.fraction_train * len(clients)), settings.min_results)
        draw = random.Random(f"{settings.seed}/{server_round}")
        chosen = draw.sample(self._order, min(number, len(clients)))
        chosen.sort(key=_order)
        self._ranks = [self._rank(cid) for cid in chosen]
        return [(clients[cid], flower.FitIns(self._given(cid, parameters), dict(self._config))) for cid in chosen]

    def start_fit(self, server_round: int) -> RoundMerger:
        return self.split.start_round(
            server_round=server_round, total_rounds=self.settings.rounds, previous=self._reference,
            seed=self.settings.seed, memory=self.memory, extra=self._extra,
            rank_extra={int(rank): own for rank, own in self._rank_extra.items()}, ranks=self._ranks,
            num_ranks=self.num_ranks or len(self._order),
        )  # fmt: skip

    def end_fit(self, server_round: int, merge: Any, failures: FitFailures) -> Ended:
        if merge.count >= self.min_updates:
            merged = merge.finish()
            self._rank_extra = {str(rank): own for rank, own in merge.rank_extra.items() if own}
            return join(merged, merge.extra), {}
        stays = "only %d of at least %d updates were accepted: the global state stays as it was"
        log.warning(stays, merge.count, self.min_updates)
        return None, {}

    def aggregate_fit(self, server_round: int, results: FitResults, failures: FitFailures) -> Merged:
        """Merge a list of results, in the order of their clients' ids; what must not be merged is refused."""
        merge, accepted, tensor_type = self.start_fit(server_round), [], TENSOR_TYPE
        for client, result in sorted(results, key=lambda each: _order(each[0].cid)):
            rank = self._rank(client.cid)
            tensor_type = result.parameters.tensor_type
            try:
                state = self._decoded(result.parameters, f"the update of rank {rank}")
                update = _checked(rank, state, result.num_examples, result.metrics, self._reference)
            except (RecordError, UsageError, TypeError, ValueError) as exc:
                update = str(exc)
            if isinstance(update, str):
                log.warning("the update of client %s was refused: %s", client.cid, update)
                continue
            merge.add(update)
            accepted.append((result.num_examples, result.metrics))
        merged, _ = self.end_fit(server_round, merge, failures)
        metrics: Metrics = dict(weighted_mean(accepted))
        if merged is None:
            return None, metrics
        if tensor_type == TENSOR_TYPE:
            return to_payload(merged), metrics
        if merge.extra or self._rank_extra:
            raise UsageError("a rule sends extra tensors, which clients of Flower's own do not take")
        return flower.ndarrays_to_parameters([tensor.numpy() for tensor in merged.values()]), metrics

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, Metrics] | None:
        return None

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> EvaluateChoice:
        """Every connected client evaluates, in the rounds that are evaluated."""
        clients = client_manager.all() if self.settings.is_evaluated(server_round) else {}
        return [
            (clients[cid], flower.EvaluateIns(self._given(cid, parameters), dict(self._config)))
            for cid in sorted(clients, key=_order)
        ]

    def aggregate_evaluate(
        self, server_round: int, results: EvaluateResults, failures: EvaluateFailures
    ) -> tuple[float | None, Metrics]:
        """Average losses and metrics by the number of examples."""
        means = weighted_mean((result.num_examples, {**result.metrics, "loss": result.loss}) for _, result in results)
        return means.pop("loss", None), dict(means)

    def dump_memory(self) -> bytes | None:
        memory = self.memory | ({_RANK_EXTRA: self._rank_extra} if self._rank_extra else {})
        return dump(memory) if any(memory.values()) else None

    def load_memory(self, path: Path) -> None:
        self.memory = torch.load(path, weights_only=True, map_location="cpu")
        self._rank_extra = self.memory.pop(_RANK_EXTRA, {})
        for key in self.memory.keys() - {part.memory_key for part in self.split.parts}:
            # What dp(…) has spent stays spent, whichever rule follows.
            kept = {name: value for name, value in self.memory[key].items() if name == "privacy"}
            if kept != self.memory[key]:
                log.warning("no part has the rule %s any more: what it remembered is given to no other rule", key)
            self.memory[key] = kept

    def line_entries(self) -> dict[str, Any]:
        """Return epsilon and delta over all private parts so far, as ``privacy``; nothing without such a part."""
        if not any(spec.name == "dp" for spec in self.settings.rules):
            return {}
        from fedsplit.aggregation.privacy import privacy_spent

        return {"privacy": spent} if (spent := privacy_spent(self.memory)) else {}

    def _take_up(self, parameters: Parameters) -> None:
        """Remember the state that the round starts from; in Flower's own server, find out about it first."""
        self._reference, self._extra = separate(self._decoded(parameters, "the global state"))
        if not self.split.parts:
            if local := [str(spec) for spec in self.settings.rules if spec.name == "local"]:
                raise UsageError(
                    f"{local[0]}: a client of Flower's own sends all its arrays, so nothing can stay with it; leave "
                    "those arrays out of its get_parameters, or run fedsplit's client and a fedsplit.Trainer"
                )
            if self.settings.secure_terms:
                raise UsageError("secure(…): only fedsplit's own server and trainers sum updates without seeing them")
            self.begin_run(self._reference, {})

    def _given(self, cid: str, parameters: Parameters) -> Parameters:
        """Return what a client is given: the global state, and its own extra tensors if there are any."""
        if not (own := self._rank_extra.get(cid)):
            return parameters
        state, extra = separate(decode(parameters.tensors[0], "the global state"))
        # Not joined to one: the buffers are those of the tensors, and are written one after the other.
        chunks: list[Any] = encode(join(state, {**extra, **own}))
        return Parameters(chunks, TENSOR_TYPE)

    def _rank(self, cid: str) -> int:
        return int(cid) if cid.isdecimal() else self._order.index(cid) + 1

    def _decoded(self, parameters: Parameters, where: str) -> StateDict:
        if parameters.tensor_type == TENSOR_TYPE:
            return decode(parameters.tensors[0], where)
        arrays = flower.parameters_to_ndarrays(parameters)
        keys = [str(index) for index in range(len(arrays))] if self._keys is None else self._keys
        if len(keys) != len(arrays):
            raise UsageError(f"keys names {len(keys)} arrays, the parameters have {len(arrays)}")
        return {key: torch.from_numpy(array) for key, array in zip(keys, arrays, strict=True)}


def read_update(
    rank: int, content: Any, num_examples: int, metrics: Mapping[str, Any], reference: StateDict,
    read: Callable[[Any, str], StateDict] = decode, *, numbers: bool = True,
) -> Update | str:  # fmt: skip
    """Read an update of the state ``reference`` and look at every number in it; returns why it is refused if it is.

    Without ``numbers`` they are for the merge to look at. The buffer ``content`` must not change or go while the update
    is used; ``read`` lays a state's tensors over it.
    """
    try:
        state = read(content, f"the update of rank {rank}")
    except RecordError as exc:
        return str(exc)
    return _checked(rank, state, num_examples, metrics, reference, numbers)


def _checked(
    rank: int, state: StateDict, num_examples: int, metrics: Mapping[str, Any], reference: StateDict,
    numbers: bool = True,
) -> Update | str:  # fmt: skip
    state, extra = separate(state)
    update = Update(rank=rank, state_dict=state, num_examples=num_examples, metrics=metrics, extra=extra)
    return check_update(update, reference, numbers=numbers) or update


def refusal(reason: str) -> flower.FitRes:
    """Return what a strategy finds among the failures for an update that does not count."""
    return flower.FitRes(flower.Status(flower.Code.FIT_NOT_IMPLEMENTED, reason), Parameters([], TENSOR_TYPE), 0, {})


def dump(memory: object) -> bytes:
    """Return a memory as the bytes of its file in a checkpoint."""
    buffer = io.BytesIO()
    torch.save(memory, buffer)
    return buffer.getvalue()


def to_payload(state: StateDict) -> Parameters:
    """Return a state as one safetensors payload."""
    return Parameters([b"".join(encode(state))], TENSOR_TYPE)


def _order(cid: str) -> tuple[int, str]:
    """Ranks by their number, before ids that Flower's own server gives out."""
    return (int(cid), "") if cid.isdecimal() else (1 << 62, cid)
