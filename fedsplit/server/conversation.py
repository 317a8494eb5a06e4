"""One rank's task from the server's point of view: asked until it is answered, over as many connections as it takes.

This is long polling: a client holds a question for some seconds, and is asked again if the task is not done by then. A
client that goes away is waited for: its exchange directory has the task, or already its result, so nothing is trained
twice.
"""

import logging
import math
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

from fedsplit.disk.digest import bytes_digest
from fedsplit.disk.files import Buffer
from fedsplit.disk.payload_store import PayloadStore, StoredPayload, read_part
from fedsplit.disk.remote_store import RemoteStore
from fedsplit.errors import ExchangeError, RecordError
from fedsplit.exchange.records import Request
from fedsplit.server.observer import Observer
from fedsplit.server.peer import Peer, PeerLostError, Reply
from fedsplit.server.roster import Roster
from fedsplit.wire.answers import ResultPayload
from fedsplit.wire.protocol import BYTES_PER_S, EMBEDDED, Engine, ask_record

log = logging.getLogger("fedsplit")

# How many pieces are under way to clients at the same time: of each there are several copies in memory.
_SENDERS = 8
# How many updates are under way to here at the same time: they may share a link.
FETCHED_AT_ONCE = 4
# How long it is looked for a client before anybody is told that it is away, and how often after that.
_SOON_S, _LOOK_S = 0.05, 1.0
# How long an answer may take beyond the round's deadline: long enough to be told of it.
_LATE_S = 5.0
# What a transfer may take beyond the time that its bytes need on the slowest link.
_TRANSFER_S = 30.0
# An update has the entries of the state that it started from; its header may be longer.
HEADER_BYTES = 4_000_000
_WAITED_FOR = {"trainer": "a trainer", "space": "space on its disk"}


class BegunAnewError(RecordError):
    """A trainer does not know the steps before. Internal."""


class _StoppedError(Exception):
    """The run is being stopped: ends the thread of a rank."""


@dataclass(frozen=True, kw_only=True)
class RoundContext:
    """What is the same for all ranks that are asked in a round."""

    roster: Roster
    store: PayloadStore
    remote: RemoteStore | None
    # How long a client that is away is waited for.
    client_wait_s: float
    # Set when the run is being stopped.
    stop: threading.Event
    # An unfinished task is cancelled so many seconds after the beginning.
    timeout_s: float = math.inf
    began: float = field(default_factory=time.monotonic)
    engine: Engine = EMBEDDED
    observer: Observer = field(default_factory=Observer)
    sending: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_SENDERS))
    # Whether the digest of a result is more than the name of its file, as it is written down: then it is made here.
    keeps_digests: bool = False

    @property
    def ends_at(self) -> float:
        """When the deadline is, by `time.monotonic`."""
        return self.began + self.timeout_s

    @property
    def left_s(self) -> float:
        """How many seconds are left until the deadline."""
        return max(0.0, self.ends_at - time.monotonic())

    def check_time(self) -> None:
        """Raise RecordError when the deadline is over."""
        if not self.left_s:
            raise RecordError(f"not completed within {self.timeout_s:g} s")

    def check_stop(self) -> None:
        """End this thread when the run is being stopped."""
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
    # What that state can be made of, with the one before, and whether the rank said that it holds that one.
    short: StoredPayload | None = None
    can_unpack: bool = False
    # How much was sent, of either of the two.
    sent_bytes: int = 0
    # What an update may have beside the state's entries.
    extra_bytes: int = 0
    then: Request | None = None
    # Seconds in which the client waited for a trainer.
    waited_s: float = 0.0
    _waiting_for: str | None = None
    _heard_at: float = 0.0
    # When it was last known that its trainer is at work.
    _seen_at: float = field(default_factory=time.monotonic)

    @property
    def away_s(self) -> float:
        """For how many seconds nothing has been heard of a trainer at work."""
        return time.monotonic() - self._seen_at

    def check_size(self, found: int) -> None:
        """Raise RecordError if an answer is too large: an update has the entries of the state that it started from."""
        if self.state and found > self.state.bytes + self.extra_bytes + HEADER_BYTES:
            raise RecordError(f"its update has {found:,} bytes, the state {self.state.bytes:,}")

    def begin_transfer(self) -> None:
        """Give the transfer of an answer that is there a deadline of its own, if the task had one."""
        context, size = self.context, self.state.bytes + self.extra_bytes if self.state else 0
        if math.isfinite(context.timeout_s):
            self.context = replace(context, began=time.monotonic(), timeout_s=self._transfer_s(size))

    def _transfer_s(self, size: int) -> float:
        # The ranks before this one may have needed all of the round's time.
        wait_s = min(self.context.client_wait_s, self.context.timeout_s)
        return _TRANSFER_S + FETCHED_AT_ONCE * size / BYTES_PER_S + wait_s

    def until_done(self) -> Reply:
        """Ask until there is a result or a failure."""
        return self._until_answered()

    def _until_answered(self) -> Reply:
        context, self._heard_at = self.context, time.monotonic()
        try:
            while True:
                peer = self._find_peer()
                try:
                    reply = self._ask(peer)
                    if reply.status != "again" or self.short is None or self.request.step:
                        return reply
                    # It does not hold the state before, after all.
                    self.short = None
                except PeerLostError:
                    context.roster.drop(peer)
                context.check_time()
                # One that comes and goes and answers nothing is away all the same.
                if time.monotonic() - self._heard_at > context.client_wait_s:
                    raise RecordError(f"no answer of its client for {context.client_wait_s:g} s")
        except RecordError as exc:
            return Reply(status="error", error={"message": str(exc)})

    def fetch(self, reply: Reply) -> Buffer | Any:
        """Get a result's payload, whose bytes match its digest; raises RecordError if there is none."""
        store, remote = self.context.store, self.context.remote
        while True:
            payload = reply.payload
            if reply.failure or not payload:
                raise RecordError(reply.failure or "it came without a state_dict")
            self.check_size(payload.bytes)
            if payload.via == "store":
                if remote:
                    # Checked on the way; large states wait for their merge in a file, not in memory.
                    remote.take(payload.digest, store.path(payload.digest))
                identity = None if self.context.keeps_digests else payload.identity
                return store.map(payload.digest, own=remote is not None, identity=identity)
            if payload.via == "inline" and reply.blob is not None:
                if bytes_digest(reply.blob) != payload.digest:
                    raise RecordError(f"the result of rank {self.rank} does not have the digest that it announced")
                return reply.blob
            if (content := self._receive(payload)) is not None:
                return content
            # The client has lost the file: asked again, it looks at what became of the task.
            reply = self._until_answered()
            if reply.status == "again":
                raise BegunAnewError("its trainer was started again, and does not know its update")

    def _ask(self, peer: Peer) -> Reply:
        context, state, request, then = self.context, self._to_send(peer), self.request, self.then
        if peer.sees_store and request.wire:
            # Nothing has to be small that does not travel, nor come in parts.
            request, then = replace(request, wire=(), step=request.step or None), then and replace(then, wire=())
        digest, size = (state.digest, state.bytes) if state else (None, 0)
        sends = not (peer.sees_store or peer.held == digest)
        while True:
            context.check_stop()
            asked, cancel, blob = time.monotonic(), not context.left_s, None
            if state and sends:
                # Without the state no trainer has begun.
                context.check_time()
                blob = self._bring(peer, state)
                self.sent_bytes += size
            hold_s = min(context.engine.hold_s, context.left_s)
            record = ask_record(
                request, digest=digest, payload_bytes=size, hold_s=hold_s, cancel=cancel, then=then,
                identity=state.identity if state and context.store.trusts else None,
            )  # fmt: skip
            reply = peer.ask(record, blob, most_s=context.left_s + _LATE_S)
            self._heard_at = time.monotonic()
            if reply.status == "need":
                if sends or not state:
                    raise RecordError("its client asks for a state that it was given, or that there is none of")
                peer.held, sends = None, True
                continue
            if state:
                peer.held, sends = digest, False
            if reply.has_ended:
                return reply
            if cancel:
                if reply.status == "working":
                    # It was told that the time is over, and goes on: its rank is free for another client.
                    context.roster.turn_away(peer, "it did not give up a task whose time was over")
                context.check_time()
            elif reply.status == "cancelled":
                raise RecordError("its client gave up a task that nobody had cancelled")
            took_s = self._heard_at - asked
            self._note(reply.waiting_for, took_s)
            if not reply.waiting_for:
                self._seen_at = self._heard_at
            # A client holds the question itself; one that does not must not make the server ask without a pause.
            context.stop.wait(hold_s - took_s)

    def _to_send(self, peer: Peer) -> StoredPayload | None:
        """Return what the task starts from, as this client is asked: the whole, or what has changed."""
        state, short = self.state, self.short
        if state is None or short is None or peer.sees_store or not short.path.exists():
            return state
        # What the client has already, its trainer may be at work on.
        return short if peer.held == short.digest or (self.can_unpack and peer.held != state.digest) else state

    def _bring(self, peer: Peer, state: StoredPayload) -> bytes | None:
        """Bring the state to a client: returns a small one, to go along with the question, and sends a large one."""
        context, size, have = self.context, state.bytes, 0
        if size <= context.engine.piece_bytes:
            return state.path.read_bytes()
        while have < size:
            context.check_stop()
            context.check_time()
            piece = read_part(state.path, have, context.engine.piece_bytes)
            with context.sending:
                taken = peer.push(state.digest, size, have, piece, most_s=context.left_s + _LATE_S)
            if taken.waiting_for == "space":
                self._note("space", 0.0)
                context.stop.wait(_LOOK_S)
            elif taken.have <= have:
                raise RecordError(f"the state could not be sent: the client of rank {self.rank} takes no more of it")
            have = taken.have
        return None

    def _receive(self, payload: ResultPayload) -> Any:
        """Fetch a result piece by piece, over as many connections as it takes; None if the client has lost it."""
        context, size = self.context, payload.bytes
        try:
            incoming = context.store.receive(payload.digest, size)
        except ExchangeError as exc:
            # A size that a client made up must not end the run for everybody.
            raise RecordError(str(exc)) from exc
        over = time.monotonic() + self._transfer_s(size)
        try:
            while not incoming.is_whole:
                peer = self._find_peer()
                wanted = min(context.engine.piece_bytes, size - incoming.have)
                if (left_s := over - time.monotonic()) <= 0:
                    raise RecordError(f"its update did not arrive in time: {incoming.have:,} of {size:,} bytes came")
                try:
                    piece = peer.pull(payload.digest, incoming.have, wanted, most_s=left_s)
                except PeerLostError:
                    context.roster.drop(peer)
                    continue
                if not piece:
                    return None
                if len(piece) != wanted:
                    raise RecordError(
                        f"its update came in pieces of another length: {len(piece):,}, not {wanted:,} bytes"
                    )
                incoming.add(incoming.have, piece)
            return incoming.map()
        finally:
            incoming.discard()

    def _find_peer(self) -> Peer:
        """Wait for the rank's client; raises RecordError if it stays away too long."""
        context, began = self.context, time.monotonic()
        context.check_stop()
        if peer := context.roster.wait_for_rank(self.rank, _SOON_S):
            return peer
        context.observer.waiting(self.rank, "client")
        log.warning("rank %d: waiting up to %g s for its client", self.rank, context.client_wait_s)
        while not (peer := context.roster.wait_for_rank(self.rank, _LOOK_S)):
            context.check_stop()
            if time.monotonic() - began > context.client_wait_s:
                raise RecordError(f"its client stayed away for {context.client_wait_s:g} s")
            if not context.left_s:
                raise RecordError(f"its client was away when the round's {context.timeout_s:g} s were over")
        context.observer.waiting(self.rank, None)
        return peer

    def _note(self, waiting_for: str | None, seconds: float) -> None:
        if waiting_for:
            self.waited_s += seconds
        if waiting_for != self._waiting_for:
            if waiting_for:
                log.warning("rank %d: its client waits for %s", self.rank, _WAITED_FOR[waiting_for])
            self.context.observer.waiting(self.rank, waiting_for)
        self._waiting_for = waiting_for
