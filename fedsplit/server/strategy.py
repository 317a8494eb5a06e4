"""The Flower strategy: who takes part, what they are told, and how their updates become the next state.

Importing this module imports torch. The server does so once it listens, while the clients are still on their way.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import fedsplit.wire.flower_env  # noqa: F401  (first: it keeps Flower from calling home)

# isort: split
from flwr.common import EvaluateIns, EvaluateRes, FitIns, FitRes, Parameters
from flwr.common.typing import Scalar as FlowerScalar
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy as FlowerStrategy

from fedsplit.aggregation import Split, Update, check_update
from fedsplit.aggregation.loading import check_rules
from fedsplit.disk.files import Buffer
from fedsplit.errors import RecordError
from fedsplit.exchange.records import Scalar
from fedsplit.run.history import weighted_mean
from fedsplit.server.settings import StrategySettings
from fedsplit.states.local_keys import is_local
from fedsplit.states.state_dict import StateDict, decode, encode

log = logging.getLogger("fedsplit")


class Merge:
    """One round's merging: takes updates in rank order, refuses what must not be merged.

    Attributes
    ----------
    accepted : int
        How many updates were merged so far.
    retains : bool
        Whether some rule must see all updates at once, so that each is kept until the end.
    """

    def __init__(self, strategy: Strategy, server_round: int, total_rounds: int, reference: StateDict) -> None:
        self._settings = strategy.settings
        self._reference = reference
        self._merger = strategy.split.start_round(
            server_round=server_round, total_rounds=total_rounds, previous=reference,
            seed=strategy.settings.seed, memory=strategy.memory,
        )  # fmt: skip
        self._needed = max(strategy.settings.min_results, strategy.split.min_updates)
        self.retains = self._merger.retains
        self.accepted = 0

    def check(self, rank: int, content: Any, num_examples: int, metrics: Mapping[str, Scalar]) -> Update | str:
        """Read an update and look at every number in it; returns why it is refused if it is. Any thread may call this.

        Parameters
        ----------
        content
            The payload as a buffer; used until the round ends if `retains`, else only until `add` returns.
        """
        try:
            state = decode(content, f"the update of rank {rank}")
        except RecordError as exc:
            return str(exc)
        update = Update(rank=rank, state_dict=state, num_examples=num_examples, metrics=metrics)
        return check_update(update, self._reference) or update

    def add(self, update: Update) -> None:
        """Merge an update that passed `check`; in rank order, one at a time."""
        self._merger.add(update)
        self.accepted += 1

    def offer(self, rank: int, content: Any, num_examples: int, metrics: Mapping[str, Scalar]) -> str | None:
        """Check an update and merge it, or say why it is refused."""
        update = self.check(rank, content, num_examples, metrics)
        if isinstance(update, str):
            return update
        self.add(update)
        return None

    def finish(self) -> list[Buffer] | None:
        """Return the payload of the next state; None if there were too few updates and the state stays as it was."""
        if self.accepted < self._needed:
            log.warning(
                "only %d of at least %d updates were accepted: the global state stays as it was",
                self.accepted, self._needed,
            )  # fmt: skip
            return None
        return encode(self._merger.finish())


class Strategy(FlowerStrategy):
    """Flower's strategy interface over the rules of the split.

    The server merges each update as it arrives through `begin_merge`; `aggregate_fit` is the same over a list.

    Parameters
    ----------
    settings
        How rounds are shaped.
    total_rounds
        How many rounds the run has.
    """

    def __init__(self, settings: StrategySettings, total_rounds: int) -> None:
        self.settings = settings
        self.total_rounds = total_rounds
        self.memory: dict[str, dict[str, Any]] = {}
        self.split = Split(parts=(), rows=())
        check_rules(settings.rules)
        self._reference: StateDict = {}

    def set_state(self, content: Any) -> None:
        """Take a payload as the state that the next round starts from; it must outlive that round."""
        self._reference = decode(content, "the global state")

    def without_local(self, chunks: list[Buffer]) -> tuple[list[Buffer], dict[str, tuple[str, list[int]]]]:
        """Take what stays with the trainers out of a state; returns what is left, and their dtypes and shapes."""
        state = decode(b"".join(chunks), "the initial state")
        local = {name for name in state if is_local(name, self.settings.local_patterns)}
        entries = {name: (str(state[name].dtype).removeprefix("torch."), list(state[name].shape)) for name in local}
        return encode({name: tensor for name, tensor in state.items() if name not in local}), entries

    def resolve_split(self, local_entries: Mapping[str, torch.Tensor]) -> None:
        """Give every entry its rule; raises UsageError for a pattern without entries or an entry without a rule."""
        self.split = Split.resolve(
            self.settings.rules, {**self._reference, **local_entries}, local_withheld=not local_entries
        )

    def begin_merge(self, server_round: int) -> Merge:
        """Begin to merge a round's updates."""
        return Merge(self, server_round, self.total_rounds, self._reference)

    def privacy_spent(self) -> dict[str, Any] | None:
        """Return epsilon and delta over all private parts so far; None without one."""
        if not any(spec.inner for spec in self.settings.rules):
            return None
        from fedsplit.aggregation.privacy import privacy_spent

        return privacy_spent(self.memory)

    def dump_memory(self) -> bytes | None:
        """Return what the rules remember, for the checkpoint; None if there is nothing."""
        if not any(self.memory.values()):
            return None
        buffer = io.BytesIO()
        torch.save(self.memory, buffer)
        return buffer.getvalue()

    def load_memory(self, path: Path) -> None:
        """Give the rules back what they remembered."""
        self.memory = torch.load(path, weights_only=True, map_location="cpu")

    # -- Flower's interface ------------------------------------------------------------------------------------------

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """The server asks the trainer of the lowest rank; the strategy has no model."""
        return None

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Flower's form of `StrategySettings.sample`."""
        proxies = client_manager.sample(self.settings.min_clients)
        return [(proxy, FitIns(parameters, dict(self.settings.train_config))) for proxy in proxies]

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, FlowerScalar]]:
        """Merge a list of results in the order given."""
        merge = self.begin_merge(server_round)
        rows = []
        for index, (proxy, result) in enumerate(results, start=1):
            if reason := merge.offer(index, result.parameters.tensors[0], result.num_examples, {}):
                log.warning("the update of client %s was refused: %s", proxy.cid, reason)
            else:
                rows.append((result.num_examples, result.metrics))
        chunks = merge.finish()
        parameters = Parameters([b"".join(chunks)], "safetensors") if chunks is not None else None
        return parameters, dict(weighted_mean(rows))

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Every connected client evaluates, in the rounds that are evaluated."""
        if not self.settings.is_evaluated(server_round):
            return []
        proxies = client_manager.sample(self.settings.min_clients)
        return [(proxy, EvaluateIns(parameters, dict(self.settings.train_config))) for proxy in proxies]

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, FlowerScalar]]:
        """Average losses and metrics by the number of examples."""
        means = weighted_mean((result.num_examples, {**result.metrics, "loss": result.loss}) for _, result in results)
        return means.pop("loss", None), dict(means)

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, dict[str, FlowerScalar]] | None:
        """The server has no data."""
        return None
