"""One rank's task from the server's point of view: asked until it is answered, over as many connections as it takes.

This is long polling: a client holds a question for some seconds, and is asked again if the task is not done by then. A
client that goes away is waited for: its exchange directory has the task, or already its result, so nothing is trained
twice.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from fedsplit.disk.files import Buffer
from fedsplit.disk.payload_store import PayloadStore, StoredPayload, read_part
from fedsplit.disk.remote_store import RemoteStore
from fedsplit.errors import ExchangeError, RecordError
from fedsplit.exchange.records import Request
from fedsplit.server.observer import Observer
from fedsplit.server.peer import Peer, PeerLostError, Reply
from fedsplit.server.roster import Roster
from fedsplit.wire.protocol import BYTES_PER_S, EMBEDDED, Engine, ask_record

log = logging.getLogger("fedsplit")

# How many pieces are under way to clients at the same time: of each there are several copies in memory.
_SENDERS = 8
_LOOK_S = 1.0
# How long an answer may take beyond the round's deadline: long enough to be told of it.
_LATE_S = 5.0
# What a transfer may take beyond the time that its bytes need on the slowest link.
_TRANSFER_S = 30.0
# An update has the entries of the state that it started from; its header may be longer.
_HEADER_BYTES = 4_000_000


_WAITED_FOR = {"trainer": "a trainer", "space": "space on its disk"}


class _StoppedError(Exception):
    """The run is being stopped: ends the thread of a rank."""


@dataclass(frozen=True, kw_only=True)
class RoundContext:
    """What is the same for all ranks that are asked in a round; a deadline is by this machine's `time.monotonic`."""

    roster: Roster
    store: PayloadStore
    remote: RemoteStore | None
    # How long a client that is away is waited for.
    client_wait_s: float
    # When an unfinished task is cancelled, and how many seconds after the round's start that is.
    deadline: float | None
    deadline_s: float | None
    # Set when the run is being stopped.
    stop: threading.Event
    engine: Engine = EMBEDDED
    observer: Observer = field(default_factory=Observer)
    sending: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_SENDERS))

    @property
    def is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    @property
    def hold_s(self) -> float:
        """For how many seconds a client may hold a question that is asked now (long polling)."""
        left = self.engine.hold_s if self.deadline is None else self.deadline - time.monotonic()
        return max(0.0, min(self.engine.hold_s, left))

    @property
    def most_s(self) -> float | None:
        """Within how many seconds a question that is asked now must be answered; None without a deadline."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic()) + _LATE_S

    def check_stop(self) -> None:
        if self.stop.is_set():
            raise _StoppedError


@dataclass(kw_only=True)
class Conversation:
    """Asks one rank for one task; with ``then`` also for another one, of the same state, once the first is done."""

    context: RoundContext
    rank: int
    request: Request
    # What the task starts from; None for ``initialize``.
    state: StoredPayload | None = None
    then: Request | None = None
    # Seconds in which the client waited for a trainer.
    waited_s: float = 0.0
    _waiting_for: str | None = None
    _heard_at: float = 0.0

    def until_done(self) -> Reply:
        """Ask until there is a result or a failure."""
        self._heard_at = time.monotonic()
        while True:
            try:
                peer = self._find_peer()
                return self._ask(peer)
            except PeerLostError:
                self.context.roster.drop(peer)
                if self.context.is_late:
                    return self._too_late()
                # One that comes and goes and answers nothing is away all the same.
                if time.monotonic() - self._heard_at > self.context.client_wait_s:
                    return Reply(
                        status="error", failure=f"no answer of its client for {self.context.client_wait_s:g} s"
                    )
            except RecordError as exc:
                return Reply(status="error", failure=str(exc))

    def fetch(self, reply: Reply) -> Buffer | Any:
        """Get a result's payload, whose bytes match its digest; raises RecordError if the client cannot deliver it."""
        store, remote = self.context.store, self.context.remote
        while True:
            digest = str(reply.digest)
            if self.state and reply.payload_bytes > self.state.bytes + _HEADER_BYTES:
                raise RecordError(f"its update has {reply.payload_bytes:,} bytes, the state {self.state.bytes:,}")
            if reply.via == "store":
                if remote is None:
                    return store.map(digest)
                # Checked on the way; large states wait for their merge in a file, not in memory.
                remote.take(digest, store.path(digest))
                return store.map(digest, own=True)
            if reply.blob is not None:
                if hashlib.sha256(reply.blob).hexdigest() != digest:
                    raise RecordError(f"the result of rank {self.rank} does not have the digest that it announced")
                return reply.blob
            if (content := self._receive(digest, reply.payload_bytes)) is not None:
                return content
            # The client has lost the file: asked again, it looks at what became of the task.
            reply = self.until_done()
            if reply.failure or not reply.digest:
                raise RecordError(reply.failure or "no payload")

    def _ask(self, peer: Peer) -> Reply:
        context, state = self.context, self.state
        digest, size = (state.digest, state.bytes) if state else (None, 0)
        force_send = False
        while True:
            asked = time.monotonic()
            context.check_stop()
            cancel = context.is_late
            blob = None
            if state and (force_send or not (peer.sees_store or peer.held == digest)):
                if cancel:
                    # Without the state no trainer has begun.
                    return self._too_late()
                blob = self._bring(peer, state)
            hold_s = 0.0 if cancel else context.hold_s
            record = ask_record(
                self.request, digest=digest, payload_bytes=size, hold_s=hold_s, cancel=cancel, then=self.then
            )
            reply = peer.ask(record, blob, most_s=context.most_s)
            self._heard_at = time.monotonic()
            if reply.status == "need":
                peer.held, force_send = None, True
                continue
            if state:
                peer.held, force_send = digest, False
            if reply.has_ended:
                return reply
            if reply.status == "cancelled":
                return self._too_late()
            if cancel:
                # It was told that the time is over, and goes on: its rank is free for another client.
                context.roster.turn_away(peer, "it did not give up a task whose time was over")
                return self._too_late()
            took_s = time.monotonic() - asked
            self._note(reply.waiting_for, took_s)
            # A client holds the question itself; one that does not must not make the server ask without a pause.
            context.stop.wait(hold_s - took_s)

    def _too_late(self) -> Reply:
        return Reply(status="error", failure=f"not completed within {self.context.deadline_s:g} s")

    def _bring(self, peer: Peer, state: StoredPayload) -> bytes | None:
        """Bring the state to a client: returns a small one, to go along with the question, and sends a large one."""
        size, step = state.bytes, self.context.engine.piece_bytes
        if size <= step:
            return state.path.read_bytes()
        have = 0
        while have < size:
            self.context.check_stop()
            if self.context.is_late:
                return None
            piece = read_part(state.path, have, step)
            with self.context.sending:
                taken = peer.push(state.digest, size, have, piece, most_s=self.context.most_s)
            before, have = have, taken.have
            if taken.waiting_for == "space":
                self._note("space", 0.0)
                self.context.stop.wait(_LOOK_S)
            elif have <= before:
                raise RecordError(f"the state could not be sent: the client of rank {self.rank} takes no more of it")
        return None

    def _receive(self, digest: str, size: int) -> Any:
        """Fetch a result piece by piece, over as many connections as it takes; None if the client has lost it."""
        try:
            incoming = self.context.store.receive(digest, size)
        except ExchangeError as exc:
            # A size that a client made up must not end the run for everybody.
            raise RecordError(str(exc)) from exc
        # Its own deadline, as the ranks before this one may have needed all of the round's.
        over = time.monotonic() + _TRANSFER_S + size / BYTES_PER_S + self.context.client_wait_s
        try:
            while not incoming.is_whole:
                peer = self._find_peer()
                wanted = min(self.context.engine.piece_bytes, size - incoming.have)
                if (left_s := over - time.monotonic()) <= 0:
                    raise RecordError(f"its update did not arrive in time: {incoming.have:,} of {size:,} bytes came")
                try:
                    piece = peer.pull(digest, incoming.have, wanted, most_s=left_s)
                except PeerLostError:
                    self.context.roster.drop(peer)
                    continue
                if not piece:
                    return None
                if len(piece) != wanted:
                    raise RecordError(
                        f"its update came in pieces of another length: {len(piece):,} for {wanted:,} bytes"
                    )
                incoming.add(incoming.have, piece)
            return incoming.map()
        finally:
            incoming.discard()

    def _find_peer(self) -> Peer:
        """Wait for the rank's client; raises RecordError if it stays away too long."""
        context, began, said = self.context, time.monotonic(), False
        while True:
            context.check_stop()
            if peer := context.roster.wait_for_rank(self.rank, _LOOK_S if said else 0.05):
                if said:
                    context.observer.waiting(self.rank, None)
                return peer
            if not said:
                said = True
                context.observer.waiting(self.rank, "client")
                log.warning("rank %d: waiting up to %g s for its client", self.rank, context.client_wait_s)
            if time.monotonic() - began > context.client_wait_s:
                raise RecordError(f"its client stayed away for {context.client_wait_s:g} s")
            if context.is_late:
                raise RecordError(f"its client was away when the round's {context.deadline_s:g} s were over")

    def _note(self, waiting_for: str | None, seconds: float) -> None:
        if waiting_for:
            self.waited_s += seconds
        if waiting_for != self._waiting_for:
            if waiting_for:
                log.warning("rank %d: its client waits for %s", self.rank, _WAITED_FOR[waiting_for])
            self.context.observer.waiting(self.rank, waiting_for)
        self._waiting_for = waiting_for
