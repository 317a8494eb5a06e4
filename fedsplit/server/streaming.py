"""What the server runs: Flower's strategy, which takes each update as it arrives.

Ours is `fedsplit.server.strategy.Strategy`; `fedsplit.server.foreign.ForeignStrategy` runs any other as one of these.
"""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

import fedsplit.wire.flower_env  # noqa: F401  (first: it keeps Flower from calling home)

# isort: split
from flwr.common import Code, EvaluateRes, FitRes, Parameters, Status
from flwr.common.typing import Scalar as FlowerScalar
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy as FlowerStrategy

from fedsplit.aggregation import Update, check_update
from fedsplit.errors import RecordError
from fedsplit.run.parts import PartRow
from fedsplit.states.state_dict import StateDict, decode
from fedsplit.wire.protocol import TENSOR_TYPE

FitResults = list[tuple[ClientProxy, FitRes]]
FitFailures = list[tuple[ClientProxy, FitRes] | BaseException]
EvaluateResults = list[tuple[ClientProxy, EvaluateRes]]
EvaluateFailures = list[tuple[ClientProxy, EvaluateRes] | BaseException]


class Merge(Protocol):
    """A round's updates on their way into the next state."""

    retains: bool
    """Whether updates are kept until the end. If not, the server may drop each payload after `add`."""

    def add(self, update: Update) -> None:
        """Take an update that was checked; one at a time, in rank order."""


class StreamingStrategy(FlowerStrategy):
    """A Flower strategy that takes updates one by one. What the server runs.

    A round is `configure_fit`, `start_fit`, the merge's ``add`` for each update, `end_fit`, `evaluate`,
    `configure_evaluate` and `aggregate_evaluate`. What takes the updates one by one ends in the same state as
    `aggregate_fit` over all of them.

    Attributes
    ----------
    memory_file : str
        What the file with the strategy's memory is called in a checkpoint.
    asks_everyone : bool
        Whether every connected client trains in every round, with the configuration of the evaluation before it.
    remembers_evaluations : bool
        Whether evaluations may change the memory, so that a checkpoint has to wait for them.
    """

    memory_file: ClassVar[str]
    asks_everyone: bool = False
    remembers_evaluations: bool = False

    @abstractmethod
    def begin_run(self, state: StateDict, local_entries: Mapping[str, torch.Tensor]) -> list[PartRow]:
        """Get to know the entries of the state, before the first round or the first after a resume.

        Parameters
        ----------
        state
            What the server holds.
        local_entries
            The entries that stay with the clients, without data.

        Returns
        -------
        list of PartRow
            Which part of the model is merged by what.
        """

    @abstractmethod
    def start_fit(self, server_round: int) -> Merge:
        """Begin to merge the updates of the round that `configure_fit` configured."""

    @abstractmethod
    def end_fit(
        self, server_round: int, merge: Any, failures: FitFailures
    ) -> tuple[StateDict | None, dict[str, FlowerScalar]]:
        """Return the next state, or None if it stays as it was, and metrics for the round's line."""

    @abstractmethod
    def dump_memory(self) -> bytes | None:
        """Return what the strategy remembers, for the checkpoint; None if there is nothing."""

    @abstractmethod
    def load_memory(self, path: Path) -> None:
        """Take up what was remembered."""

    def line_entries(self) -> dict[str, Any]:
        """Return what else belongs into the round's line."""
        return {}


def read_update(
    rank: int, content: Any, num_examples: int, metrics: Mapping[str, Any], reference: StateDict
) -> Update | str:
    """Read an update and look at every number in it; returns why it is refused if it is.

    Parameters
    ----------
    content
        The payload as a buffer; it must not change or go while the update is used.
    reference
        The global state that the round started from.
    """
    try:
        state = decode(content, f"the update of rank {rank}")
    except RecordError as exc:
        return str(exc)
    return checked(rank, state, num_examples, metrics, reference)


def checked(
    rank: int, state: StateDict, num_examples: int, metrics: Mapping[str, Any], reference: StateDict
) -> Update | str:
    """Return an update, or why it is refused."""
    update = Update(rank=rank, state_dict=state, num_examples=num_examples, metrics=metrics)
    return check_update(update, reference) or update


def refusal(reason: str) -> FitRes:
    """Return what a strategy finds among the failures for an update that does not count."""
    return FitRes(Status(Code.FIT_NOT_IMPLEMENTED, reason), Parameters([], TENSOR_TYPE), 0, {})


def dump(memory: object) -> bytes:
    """Return a memory as the bytes of its file in a checkpoint."""
    buffer = io.BytesIO()
    torch.save(memory, buffer)
    return buffer.getvalue()
