"""The server's way to the trainer of the upper part: it is the client in ``<exchange_dir>/upper/``.

A task of the upper trainer is a sequence of steps, each answered before the next one is offered. All of them are kept,
as names of payloads in the server's store, until the task is over: a trainer that was killed and started again says
that it did not do the steps before, and is given them once more from the first one. What it gives then must be what it
gave before, bit for bit.

Importing this module imports no torch.
"""

import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fedsplit.client.long_poll import LongPoll
from fedsplit.disk.identity import Verify
from fedsplit.disk.payload_store import PayloadStore, StoredPayload
from fedsplit.errors import FedSplitError, RecordError
from fedsplit.exchange.client_side import ClientSide, Source
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import Request, ResultRecord, Scalar, printable

log = logging.getLogger("fedsplit")

# How long the trainer is waited for before it is looked whether the run is being stopped.
_HOLD_S = 0.5
# What a step wants if there is none any more.
END = "end"
# A step that the trainer does not survive must not be given to it for ever.
_MOST_AGAIN = 20


@dataclass(kw_only=True)
class Step:
    """A step of a task: what is given, and the digest of what came back, once it did."""

    payload: StoredPayload | None
    numbers: Mapping[str, Scalar]
    digest: str | None = None
    is_answered: bool = False


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What the trainer of the upper part gave: a payload in the store, numbers, and the seconds that it took."""

    payload: StoredPayload | None
    numbers: Mapping[str, Scalar]
    seconds: float
    # How long others' steps were waited for before.
    waited_s: float = 0.0


class Beyond:
    """Asks the trainer of the upper part; one question at a time, whoever asks.

    `wait_s` are seconds to wait for a trainer to be there. After a failure every further step of the same task fails.
    """

    def __init__(self, exchange_dir: Path, wait_s: float, verify: Verify = "auto") -> None:
        self.exchange = Exchange(exchange_dir, "upper", verify)
        self.side = ClientSide(self.exchange)
        self._poll = LongPoll(self.side, wait_s)
        self._lock = threading.Lock()
        self._steps: list[Step] = []
        self._failure: str | None = None

    def open(self, store: PayloadStore, stop: threading.Event) -> None:
        """Use a server's store; `stop` is set when its run is being stopped."""
        self._store, self._stop = store, stop

    def initial_state(self, request: Request) -> StoredPayload:
        """Ask for the state that the upper part starts from."""
        self.begin(request, None)
        if (found := self._next(None, {}).payload) is None:
            raise RecordError("the trainer of the upper part gave no state")
        return found

    def begin(self, request: Request, state: StoredPayload | None) -> None:
        """Begin another task; a request of steps has step 0, which gives the state."""
        with self._lock:
            self._request, self._steps, self._failure = request, [], None
            self._state = state

    @property
    def has_begun(self) -> bool:
        """Whether any step of the task was given to the trainer."""
        return bool(self._steps)

    def answers(self) -> set[str]:
        """Return the digests of what the task's steps gave."""
        return {step.digest for step in self._steps if step.digest}

    def step(self, payload: StoredPayload | None, numbers: Mapping[str, Scalar], until: float = math.inf) -> Answered:
        """Have the next step done; raises RecordError if it cannot be.

        It is waited for until ``until`` by `time.monotonic`, and then raises RecordError. The task can go on all the
        same: a further step waits for this one's answer first.
        """
        asked = time.monotonic()
        with self._lock:
            waited_s = time.monotonic() - asked
            if not self._steps:
                self._next(self._state, {}, until)
            return replace(self._next(payload, numbers, until), waited_s=waited_s)

    def _next(self, payload: StoredPayload | None, numbers: Mapping[str, Scalar], until: float = math.inf) -> Answered:
        if self._failure:
            raise RecordError(self._failure)
        _check_time(until)
        self._steps.append(Step(payload=payload, numbers=numbers))
        at, again = len(self._steps) - 1, 0
        # What nobody waited for any longer.
        while at and not self._steps[at - 1].is_answered:
            at -= 1
        try:
            while True:
                result = self._ask(at, until)
                if result.status == "again":
                    again += 1
                    if again > _MOST_AGAIN:
                        raise RecordError(f"the trainer of the upper part began anew {again} times in one step")
                    log.info("the trainer of the upper part is new: it is given %d steps once more", len(self._steps))
                    at = 0
                    continue
                answered = self._take(at, result)
                if (at := at + 1) == len(self._steps):
                    return answered
        except _LateError:
            raise
        except FedSplitError as exc:
            self._failure = str(exc)
            raise RecordError(self._failure) from exc

    def _ask(self, at: int, until: float) -> ResultRecord:
        """Put a step before the trainer and wait for its answer."""
        step = self._steps[at]
        request = self._request
        if request.step is not None:
            request = replace(request, step=at, config=step.numbers if at else request.config)
        digest = step.payload.digest if step.payload else None
        while not self._stop.is_set():
            _check_time(until)
            version = self.side.offer(request, digest, lambda _: self._source(step.payload))
            if version is None:
                raise RecordError(
                    f"step {at} of {request.kind}, round {request.server_round}, is no longer in the store"
                )
            if (result := self._poll.wait(version, min(_HOLD_S, max(0.0, until - time.monotonic())))) is None:
                continue
            if result.status == "error":
                error = result.error or {}
                if error.get("traceback"):
                    text = printable(error["traceback"], lines=True, most=50_000).rstrip()
                    log.warning("the trainer of the upper part failed:\n%s", text)
                kind, message = error.get("type", "an error"), printable(error.get("message", ""))
                raise RecordError(f"the trainer of the upper part failed: {kind}: {message}")
            return result
        raise RecordError("the run is being stopped")

    def _take(self, at: int, result: ResultRecord) -> Answered:
        step, payload = self._steps[at], result.payload
        digest = payload.digest if payload else None
        if step.is_answered and digest != step.digest:
            raise RecordError(differs("the trainer of the upper part", self._request, at))
        stored = None
        if payload:
            stored = self._store.give(self.exchange.directory / payload.file, payload.digest, payload.identity)
        step.digest, step.is_answered = digest, True
        return Answered(payload=stored, numbers=result.metrics, seconds=result.seconds)

    def _source(self, payload: StoredPayload | None) -> Source | None:
        path = self._store.take(payload.digest) if payload else None
        return Source(bytes=payload.bytes, content=path, identity=payload.identity) if payload and path else None


class _LateError(RecordError):
    """A step was not waited for any longer."""


def _check_time(until: float) -> None:
    if time.monotonic() >= until:
        raise _LateError("the trainer of the upper part had not answered when the time was over")


def differs(who: str, request: Request, step: int) -> str:
    """Return what is said of a trainer that did a step once more and gave something else."""
    return (
        f"{who} did step {step} of {request.kind}, round {request.server_round}, again and gave other values: its "
        "training is not deterministic; seed every generator that it draws from, keep its state in local_state, and "
        "use the same number of threads"
    )


class Clock:
    """Adds up seconds by name, from several threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to a name."""
        with self._lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the length of the block."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - began)
