"""Where a trainer's tasks come from, and where its answers go: the interface between `Trainer` and the other side.

`ExchangeChannel` is the ordinary one, through the exchange directory. With `StandaloneChannel` a trainer asks itself.
`fedsplit.trainer.process_group` puts either of the two before all processes of a process group.
"""

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

from fedsplit.codecs.held import Held, Part
from fedsplit.disk.files import wait_for_space
from fedsplit.errors import PeerMissingError, RecordError, SchemaError
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import FinishedRecord, LocalEntries, Scalar, TaskRecord
from fedsplit.exchange.trainer_side import TrainerSide
from fedsplit.exchange.waiting import Watch
from fedsplit.states.extra import separate
from fedsplit.states.state_dict import StateDict, encode, map_file

log = logging.getLogger("fedsplit")

# How much of what travels packed is in a part of it. A part costs a question more: smaller ones would save nothing.
PART_BYTES = 24_000_000
_STOP_CHECK_S = 0.05
_REMIND_S = 30.0
_CLIENT_CHECK_S = 0.5
_BAD_RECORD_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a loop body replied, checked and without the entries that stay at home.

    `checksum` is the sum of the module's parameters if there are several processes: after training together it is the
    same in all.
    """

    state: StateDict | None
    num_examples: int
    loss: float | None = None
    metrics: Mapping[str, Scalar] = field(default_factory=dict)
    local_entries: LocalEntries = field(default_factory=dict)
    seconds: float = 0.0
    checksum: float | None = None
    status: Literal["ok", "step", "again"] = "ok"


class Channel(Protocol):
    """What a trainer needs from the other side. All but `fail` are called in every process, in the same order.

    This is number ``process``, counted from 0, of ``processes`` of one trainer.
    """

    process: int = 0
    processes: int = 1

    def hold(self) -> AbstractContextManager[None]:
        """Hold the trainer's role of the rank for the length of the block; raises RoleTakenError."""

    def next(self) -> TaskRecord | FinishedRecord:
        """Wait for the next task or the end of the run; raises PeerMissingError if no client came in time."""

    def read_state(self, record: TaskRecord) -> StateDict:
        """Return the state that the newest task came with; writing to it changes nothing elsewhere."""

    def pack(self, record: TaskRecord, state: StateDict, carried: Callable[[], StateDict]) -> list[Callable[[], Part]]:
        """Return what packs a trained state for its way, in one part or in several."""
        return [lambda: (state, {})]

    def is_wanted(self, record: TaskRecord) -> bool:
        """Tell whether somebody still waits for the answer; cheap enough to ask for every batch."""

    def answer(self, record: TaskRecord, answer: Answer) -> bool:
        """Offer an answer; returns False if it was not wanted any more."""

    def fail(self, record: TaskRecord, error: Mapping[str, str], seconds: float) -> None:
        """Offer an error (type, message, traceback) instead of an answer."""

    def share(self, value: int) -> int:
        """Return process 0's value in every process."""
        return value


class ExchangeChannel(Channel):
    """Tasks and answers through the exchange directory, to and from the client of the same rank.

    `client_wait_s` are seconds to wait for a client to be there; None waits for ever. States that tasks come with as
    differences are put together in `held`.
    """

    def __init__(self, exchange: Exchange, held: Held, client_wait_s: float | None = None) -> None:
        self._exchange = exchange
        self._held = held
        self._side = TrainerSide(exchange)
        self._client_wait_s = client_wait_s
        self._watch = Watch(exchange.task_path, exchange.finished_path, lock=exchange.lock_path("client"))
        self._looked_at = 0.0
        self._missing_since: float | None = None
        self._awaited = ""

    def hold(self) -> AbstractContextManager[None]:
        return self._exchange.hold("trainer")

    def next(self) -> TaskRecord | FinishedRecord:
        began = reminded = time.monotonic()
        bad_since: float | None = None
        self._watch.begin()
        while True:
            now = time.monotonic()
            try:
                if self._watch.has_changed():
                    if found := self._side.next():
                        if isinstance(found, FinishedRecord):
                            wait_for_space(partial(self._side.leave, found))
                        if isinstance(found, FinishedRecord) or wait_for_space(partial(self._takes, found)):
                            return found
                        self._side.answer(found, status="again")
                    bad_since = None
            except SchemaError:
                raise
            except RecordError as exc:
                bad_since = bad_since or now
                if now - bad_since > _BAD_RECORD_S:
                    log.warning("%s; waiting for the client to write it anew", exc)
                    bad_since = now + _REMIND_S
            if self._watch.is_look_due():
                self._check_client(now)
                whom = "a client" if self._missing_since else "the server's next task"
                if now - reminded > _REMIND_S or whom != self._awaited:
                    who, directory = self._exchange.who, self._exchange.directory
                    log.info("%s: waiting for %s (%s, %.0f s)", who, whom, directory, now - began)
                    if whom != self._awaited and not log.hasHandlers():
                        # A script that has set up no logging must not seem to hang.
                        print(f"fedsplit: {who}: waiting for {whom} ({directory})", file=sys.stderr)
                    reminded, self._awaited = now, whom
            self._watch.sleep()

    def _takes(self, record: TaskRecord) -> bool:
        """Tell whether the state of a task can be had: else it differs from one that is not here."""
        self._held.digest = None
        if not record.wire or record.payload is None:
            return True
        return self._held.take(self._exchange.directory / record.payload.file, record.payload.digest)

    def read_state(self, record: TaskRecord) -> StateDict:
        if record.payload is None:
            return {}
        return self._held.state() if self._held.digest else map_file(self._exchange.directory / record.payload.file)

    def pack(self, record: TaskRecord, state: StateDict, carried: Callable[[], StateDict]) -> list[Callable[[], Part]]:
        if record.kind != "train":
            return super().pack(record, state, carried)
        return self._held.pack(state, record.wire, carried, math.inf if record.step is None else PART_BYTES)

    def is_wanted(self, record: TaskRecord) -> bool:
        if time.monotonic() - self._looked_at < _STOP_CHECK_S:
            return True
        self._looked_at = time.monotonic()
        return self._side.is_wanted(record)

    def answer(self, record: TaskRecord, answer: Answer) -> bool:
        chunks = None if answer.state is None else encode(answer.state)
        return wait_for_space(
            lambda: self._side.answer(
                record, chunks, num_examples=answer.num_examples, loss=answer.loss, metrics=answer.metrics,
                local_entries=answer.local_entries, seconds=answer.seconds, status=answer.status,
                holds=self._held.digest,
            )
        )  # fmt: skip

    def fail(self, record: TaskRecord, error: Mapping[str, str], seconds: float) -> None:
        wait_for_space(lambda: self._side.answer(record, error=error, seconds=seconds))

    def _check_client(self, now: float) -> None:
        is_here = self._exchange.is_held("client")
        self._watch.looked(_CLIENT_CHECK_S, is_near=is_here and self._exchange.is_near("client"))
        if is_here:
            self._missing_since = None
            return
        self._missing_since = self._missing_since or now
        if self._client_wait_s is not None and now - self._missing_since > self._client_wait_s:
            who = self._exchange.who
            raise PeerMissingError(
                f"no client of {who} came to {self._exchange.directory} within {self._client_wait_s:g} s; "
                f"start the client of {who} with the same --exchange-dir"
            )


class StandaloneChannel(Channel):
    """Asks what a server with this one client would ask: for a debugger, and to try a script by itself.

    The trainer's own model is the initial state. Each of the `rounds` asks for training and for evaluation, and the
    state of a reply is the state of the next task. There is no exchange directory, no client, no server and no rule, so
    extra tensors go nowhere.
    """

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._state: StateDict = {}
        self._tasks = self._ask()

    def hold(self) -> AbstractContextManager[None]:
        return nullcontext()

    def next(self) -> TaskRecord | FinishedRecord:
        return next(self._tasks)

    def read_state(self, record: TaskRecord) -> StateDict:
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def is_wanted(self, record: TaskRecord) -> bool:
        return True

    def answer(self, record: TaskRecord, answer: Answer) -> bool:
        if answer.state is not None:
            state, _ = separate(answer.state)
            self._state = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        if record.kind != "initialize":
            numbers = {**({} if answer.loss is None else {"loss": answer.loss}), **answer.metrics}
            shown = "".join(f", {name} {value:.4g}" for name, value in numbers.items() if not isinstance(value, str))
            what = f"{record.kind} of round {record.server_round}/{self._rounds}"
            log.info("standalone: %s, %d examples%s", what, answer.num_examples, shown)
        return True

    def fail(self, record: TaskRecord, error: Mapping[str, str], seconds: float) -> None:
        text = error.get("traceback", "")
        log.error("standalone: %s of round %d failed\n%s", record.kind, record.server_round, text)

    def _ask(self) -> Iterator[TaskRecord | FinishedRecord]:
        run_id, rounds = "standalone", self._rounds
        tasks = [("initialize", 0)]
        tasks += [(kind, number) for number in range(1, rounds + 1) for kind in ("train", "evaluate")]
        for version, (kind, number) in enumerate(tasks, start=1):
            yield TaskRecord(version=version, run_id=run_id, kind=kind, server_round=number, total_rounds=rounds)
        while True:
            yield FinishedRecord(version=len(tasks) + 1, run_id=run_id, outcome="complete")
