"""One rank's task from the server's point of view: asked until it is answered, over as many connections as it takes.

This is long polling: a client holds a question for some seconds. If the task is not done by then it says so, and it is
asked again. A client that goes away in the middle is waited for. Its exchange directory still has the task, or already
its result, so nothing is trained twice.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fedsplit.disk.files import Buffer
from fedsplit.disk.payload_store import PayloadStore, StoredPayload, read_part
from fedsplit.errors import ExchangeError, RecordError
from fedsplit.exchange.records import Request
from fedsplit.server.observer import Observer
from fedsplit.server.peer import Peer, PeerLostError
from fedsplit.server.roster import Roster
from fedsplit.wire.protocol import EMBEDDED, Engine, ask_record

if TYPE_CHECKING:
    from fedsplit.disk.remote_store import RemoteStore

log = logging.getLogger("fedsplit")

# How many pieces are under way to clients at the same time: of each there are several copies in memory.
_SENDERS = 8
_LOOK_S = 1.0


class StoppedError(Exception):
    """The run is being stopped; internal."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """How a rank's task ended.

    Attributes
    ----------
    failure : str or None
        Why there is no result; the other fields mean nothing then.
    seconds : float
        What the trainer says it took.
    """

    rank: int
    failure: str | None = None
    traceback: str = ""
    num_examples: int = 0
    loss: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    digest: str | None = None
    payload_bytes: int = 0
    via: str = ""
    blob: bytes | None = None

    @property
    def all_metrics(self) -> dict[str, Any]:
        """The metrics, the loss among them."""
        return ({} if self.loss is None else {"loss": self.loss}) | self.metrics


@dataclass(frozen=True, kw_only=True)
class RoundContext:
    """What is the same for all ranks that are asked in a round.

    Attributes
    ----------
    client_wait_s : float
        Seconds to wait for a client that is away.
    deadline : float or None
        `time.monotonic` after which an unfinished task is cancelled.
    stop : threading.Event
        Set when the run is being stopped.
    """

    roster: Roster
    store: PayloadStore
    remote: RemoteStore | None
    client_wait_s: float
    deadline: float | None
    deadline_s: float | None
    stop: threading.Event
    engine: Engine = EMBEDDED
    observer: Observer = field(default_factory=Observer)
    sending: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_SENDERS))


class Conversation:
    """Asks one rank for one task.

    Parameters
    ----------
    context
        What is the same for all ranks.
    rank
        Whom to ask.
    request
        What is asked.
    state
        The state that it starts from; None for ``initialize``.
    then
        A task to begin next, from the same state.

    Attributes
    ----------
    ahead : Reply or None
        How the task asked for next ended, if it did before the reply had to be sent.
    ahead_s : float
        Seconds in which the reply was held back for that.
    waited_s : float
        Seconds in which there was no client, or no trainer, to do it.
    """

    def __init__(
        self,
        context: RoundContext,
        rank: int,
        request: Request,
        state: StoredPayload | None,
        then: Request | None = None,
    ) -> None:
        self._context = context
        self._rank = rank
        self._request = request
        self._state = state
        self._then = then
        self._waiting_for: str | None = None
        self.ahead: Reply | None = None
        self.ahead_s = 0.0
        self.waited_s = 0.0

    def until_done(self) -> Reply:
        """Ask until there is a result or a failure."""
        while True:
            peer, failure = self._find_peer()
            if peer is None:
                return Reply(rank=self._rank, failure=failure)
            try:
                return self._ask(peer)
            except PeerLostError:
                self._context.roster.drop(peer)
            except RecordError as exc:
                return Reply(rank=self._rank, failure=str(exc))

    def fetch(self, answer: Reply) -> Buffer | Any:
        """Get the payload of a result: mapped from the store, or out of a message; its bytes match its digest.

        Raises
        ------
        RecordError
            If the client cannot deliver it.
        """
        while True:
            digest = str(answer.digest)
            if answer.via == "store":
                if self._context.remote is None:
                    return self._context.store.map(digest)
                # Checked on the way; large states wait for their merge in a file, not in memory.
                self._context.remote.take(digest, self._context.store.path(digest))
                return self._context.store.map(digest, own=True)
            if answer.blob is not None:
                if hashlib.sha256(answer.blob).hexdigest() != digest:
                    raise RecordError(f"the result of rank {self._rank} does not have the digest that it announced")
                return answer.blob
            if (content := self._receive(digest, answer.payload_bytes)) is not None:
                return content
            # The client has lost the file: asked again, it looks at what became of the task.
            answer = self.until_done()
            if answer.failure or not answer.digest:
                raise RecordError(answer.failure or "no payload")

    def _ask(self, peer: Peer) -> Reply:
        force_send = False
        while True:
            asked = time.monotonic()
            if self._context.stop.is_set():
                raise StoppedError
            cancel = self._is_late()
            hold_s = 0.0 if cancel else self._hold_s()
            state = self._state
            send = state if state and (force_send or not (peer.sees_store or peer.held == state.digest)) else None
            if send and cancel:
                # Without the state no trainer has begun.
                return self._too_late()
            reply, blob = peer.ask(self._record(hold_s, cancel), self._bring(peer, send) if send else None)
            status = reply.get("status")
            if status == "need":
                peer.held, force_send = None, True
                continue
            if self._state is not None:
                peer.held, force_send = self._state.digest, False
            if status == "ok":
                if then := reply.get("then"):
                    self.ahead_s = float(then.get("held_s", 0.0))
                    self.ahead = self._ended(then, blob)
                return self._read(reply, None if then else blob)
            if status == "cancelled":
                return self._too_late()
            if status != "working":
                return self._failed(reply.get("error") or {})
            self._note(reply.get("waiting_for"), time.monotonic() - asked)

    def _bring(self, peer: Peer, state: StoredPayload) -> bytes | None:
        """Bring the state to a client: returns a small one, to go along with the question, and sends a large one."""
        size, step = state.bytes, self._context.engine.piece_bytes
        if size <= step:
            return state.path.read_bytes()
        have = 0
        while have < size:
            if self._context.stop.is_set():
                raise StoppedError
            if self._is_late():
                return None
            with self._context.sending:
                reply = peer.push(state.digest, size, have, read_part(state.path, have, step))
            if error := reply.get("error"):
                raise RecordError(f"the state could not be sent: {error.get('message')}")
            before, have = have, int(reply.get("have", 0))
            if have <= before:
                raise RecordError(f"the state could not be sent: the client of rank {self._rank} takes no more of it")
        return None

    def _record(self, hold_s: float, cancel: bool) -> dict[str, Any]:
        digest, size = (self._state.digest, self._state.bytes) if self._state else (None, 0)
        return ask_record(
            self._request, digest=digest, payload_bytes=size, hold_s=hold_s, cancel=cancel, then=self._then
        )

    def _receive(self, digest: str, size: int) -> Any:
        """Fetch a result piece by piece, over as many connections as it takes; None if the client has lost it."""
        try:
            incoming = self._context.store.receive(digest, size)
        except ExchangeError as exc:
            # A size that a client made up must not end the run for everybody.
            raise RecordError(str(exc)) from exc
        try:
            while not incoming.is_whole:
                if self._context.stop.is_set():
                    raise StoppedError
                peer, failure = self._find_peer()
                if peer is None:
                    raise RecordError(failure)
                step = min(self._context.engine.piece_bytes, size - incoming.have)
                try:
                    piece = peer.pull(digest, incoming.have, step)
                except PeerLostError:
                    self._context.roster.drop(peer)
                    continue
                if not piece:
                    return None
                incoming.add(incoming.have, piece)
            return incoming.map()
        finally:
            incoming.discard()

    def _find_peer(self) -> tuple[Peer | None, str]:
        began, said = time.monotonic(), False
        while not self._context.stop.is_set():
            if peer := self._context.roster.wait_for_rank(self._rank, _LOOK_S if said else 0.05):
                if said:
                    self._context.observer.waiting(self._rank, None)
                return peer, ""
            if not said:
                said = True
                self._context.observer.waiting(self._rank, "client")
                log.warning("rank %d: waiting up to %g s for its client", self._rank, self._context.client_wait_s)
            if time.monotonic() - began > self._context.client_wait_s:
                return None, f"its client stayed away for {self._context.client_wait_s:g} s"
            if self._is_late():
                return None, f"its client was away when the round's {self._context.deadline_s:g} s were over"
        raise StoppedError

    def _read(self, reply: dict[str, Any], blob: bytes | None) -> Reply:
        payload = reply.get("payload") or {}
        answer = Reply(
            rank=self._rank, num_examples=int(reply.get("num_examples", 0)), loss=reply.get("loss"),
            metrics=dict(reply.get("metrics") or {}), seconds=float(reply.get("seconds", 0.0)),
        )  # fmt: skip
        if not payload:
            return answer
        return replace(
            answer, digest=payload.get("digest"), payload_bytes=int(payload.get("bytes", 0)),
            via=str(payload.get("via")), blob=blob,
        )  # fmt: skip

    def _ended(self, reply: dict[str, Any], blob: bytes | None) -> Reply | None:
        """Read how a task ended; None if it has not."""
        if reply.get("status") == "error":
            return self._failed(reply.get("error") or {})
        return self._read(reply, blob) if reply.get("status") == "ok" else None

    def _failed(self, error: dict[str, Any]) -> Reply:
        kind, message = error.get("type", "an error"), error.get("message", "")
        return Reply(rank=self._rank, failure=f"{kind}: {message}", traceback=str(error.get("traceback", "")))

    def _too_late(self) -> Reply:
        return Reply(rank=self._rank, failure=f"not completed within {self._context.deadline_s:g} s")

    def _is_late(self) -> bool:
        return self._context.deadline is not None and time.monotonic() >= self._context.deadline

    def _hold_s(self) -> float:
        hold_s = self._context.engine.hold_s
        if self._context.deadline is None:
            return hold_s
        return max(0.0, min(hold_s, self._context.deadline - time.monotonic()))

    def _note(self, waiting_for: str | None, seconds: float) -> None:
        if waiting_for:
            self.waited_s += seconds
        if waiting_for and waiting_for != self._waiting_for:
            log.warning("rank %d: its client waits for a %s", self._rank, waiting_for)
        if waiting_for != self._waiting_for:
            self._context.observer.waiting(self._rank, waiting_for)
        self._waiting_for = waiting_for
