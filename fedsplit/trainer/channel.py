"""Where a trainer's tasks come from, and where its answers go: the interface between `Trainer` and the other side.

`ExchangeChannel` is the ordinary one, through the exchange directory. With `fedsplit.trainer.standalone` a trainer asks
itself, for a debugger. `fedsplit.trainer.process_group` puts either of the two before all processes of a process group.
Every method but `fail` is called in every process, in the same order.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from fedsplit.errors import PeerMissingError, RecordError, SchemaError
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import FinishedRecord, Scalar, TaskRecord
from fedsplit.exchange.trainer_side import TrainerSide
from fedsplit.exchange.waiting import Watch
from fedsplit.states.state_dict import StateDict, encode, map_file

log = logging.getLogger("fedsplit")

_STOP_CHECK_S = 0.05
_REMIND_S = 30.0
_CLIENT_CHECK_S = 0.5
_BAD_RECORD_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a loop body replied, checked and without the entries that stay at home.

    Attributes
    ----------
    checksum
        Sum of the module's parameters if there are several processes: after training together it is the same in all.
    """

    state: StateDict | None
    num_examples: int
    loss: float | None = None
    metrics: Mapping[str, Scalar] = field(default_factory=dict)
    seconds: float = 0.0
    checksum: float | None = None


class Channel(Protocol):
    """What a trainer needs from the other side.

    Attributes
    ----------
    process, processes
        Which of how many processes of one trainer this is, counted from 0.
    """

    process: int
    processes: int

    def hold(self) -> AbstractContextManager[None]:
        """Hold the trainer's role of the rank for the length of the block."""

    def next(self) -> TaskRecord | FinishedRecord:
        """Wait for the next task or the end of the run."""

    def read_state(self, record: TaskRecord) -> StateDict:
        """Return the state that the newest task came with; writing to it changes nothing elsewhere."""

    def is_wanted(self, record: TaskRecord) -> bool:
        """Tell whether somebody still waits for the answer; cheap enough to ask for every batch."""

    def answer(self, record: TaskRecord, answer: Answer) -> bool:
        """Offer an answer; returns False if it was not wanted any more."""

    def fail(self, record: TaskRecord, error: Mapping[str, str], seconds: float) -> None:
        """Offer an error (type, message, traceback) instead of an answer."""

    def share(self, value: int) -> int:
        """Return process 0's value in every process."""


class ExchangeChannel:
    """Tasks and answers through the exchange directory, to and from the client of the same rank.

    Parameters
    ----------
    exchange
        The rank's directory.
    client_wait_s
        Seconds to wait for a client to be there; None waits for ever.
    """

    process = 0
    processes = 1

    def __init__(self, exchange: Exchange, client_wait_s: float | None = None) -> None:
        self._exchange = exchange
        self._side = TrainerSide(exchange)
        self._client_wait_s = client_wait_s
        self._watch = Watch(exchange.task_path, exchange.finished_path)
        self._looked: tuple[int, float] = (0, 0.0)
        self._client_checked = 0.0
        self._missing_since: float | None = None

    def hold(self) -> AbstractContextManager[None]:
        """Hold the trainer's role; raises RoleTakenError if a live trainer of this rank uses the directory."""
        return self._exchange.hold("trainer")

    def next(self) -> TaskRecord | FinishedRecord:
        """Wait for the next task or the end of the run; raises PeerMissingError if no client came in time."""
        began = time.monotonic()
        self._watch.begin()
        reminded = began
        bad_since: float | None = None
        while True:
            now = time.monotonic()
            try:
                if self._watch.has_changed():
                    if found := self._side.next():
                        if isinstance(found, FinishedRecord):
                            self._side.leave(found)
                        return found
                    bad_since = None
            except SchemaError:
                raise
            except RecordError as exc:
                bad_since = bad_since or now
                if now - bad_since > _BAD_RECORD_S:
                    log.warning("%s; waiting for the client to write it anew", exc)
                    bad_since = now + _REMIND_S
            if now - self._client_checked > _CLIENT_CHECK_S:
                self._client_checked, was_missing = now, self._missing_since
                self._missing_since = self._check_client(was_missing, now)
                if now - reminded > _REMIND_S or (self._missing_since is None) != (was_missing is None):
                    reminded = now
                    self._remind(self._missing_since is not None, now - began)
            self._watch.sleep()

    def read_state(self, record: TaskRecord) -> StateDict:
        """Map the task's payload."""
        return {} if record.payload is None else map_file(self._exchange.directory / record.payload.file)

    def is_wanted(self, record: TaskRecord) -> bool:
        """Look at the exchange, at most every 50 ms; in between nothing has changed."""
        version, looked = self._looked
        now = time.monotonic()
        if version == record.version and now - looked < _STOP_CHECK_S:
            return True
        self._looked = (record.version, now)
        return self._side.is_wanted(record)

    def answer(self, record: TaskRecord, answer: Answer) -> bool:
        """Write the payload and offer the result."""
        chunks = None if answer.state is None else encode(answer.state)
        return self._side.answer(
            record, chunks, num_examples=answer.num_examples, loss=answer.loss, metrics=answer.metrics,
            seconds=answer.seconds,
        )  # fmt: skip

    def fail(self, record: TaskRecord, error: Mapping[str, str], seconds: float) -> None:
        """Offer an error."""
        self._side.answer(record, error=error, seconds=seconds)

    def share(self, value: int) -> int:
        """Return the value: there is one process."""
        return value

    def _check_client(self, missing_since: float | None, now: float) -> float | None:
        if self._exchange.is_held("client"):
            return None
        since = now if missing_since is None else missing_since
        if self._client_wait_s is not None and now - since > self._client_wait_s:
            raise PeerMissingError(
                f"no client of rank {self._exchange.rank} came to {self._exchange.directory} within "
                f"{self._client_wait_s:g} s; start client_main.py --rank {self._exchange.rank} with the same "
                "--exchange-dir"
            )
        return since

    def _remind(self, missing: bool, seconds: float) -> None:
        whom = "a client" if missing else "the server's next task"
        log.info("rank %d: waiting for %s (%s, %.0f s)", self._exchange.rank, whom, self._exchange.directory, seconds)
