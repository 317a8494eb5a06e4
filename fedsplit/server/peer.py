"""A connection to a client: every question that the server asks it, and the one place that decodes its answers.

Nothing else on the server reads a client's record. A question that is not answered raises `PeerLostError`, an answer
that cannot be read raises `RecordError`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

import flwr.common as flower
from flwr.server.client_proxy import ClientProxy

from fedsplit.disk.payload_store import PayloadStore
from fedsplit.disk.remote_store import RemoteStore
from fedsplit.errors import AggregationError, FedSplitError, RecordError
from fedsplit.exchange.records import printable, read
from fedsplit.wire.answers import Answer, Greeted, Joined, Said, Taken, Told
from fedsplit.wire.join import Transcript, new_nonce
from fedsplit.wire.protocol import BYTES_PER_S, TENSOR_TYPE, pack, unpack

log = logging.getLogger("fedsplit")

AnySaid = TypeVar("AnySaid", bound=Said)

_GREETING_S = 30.0
# What a relay may take to answer beyond what it was told to hold: it never waits for the trainer any longer.
_GRACE_S = 30.0
# One that was refused may be greeted again after this long, on an engine where a node outlives its questions.
_REFUSED_S = 60.0


class PeerLostError(Exception):
    """The connection broke in the middle of a question. Internal: the rank may come back."""


class TurnedAwayError(Exception):
    """A client may not take part; the message is what it is told. Internal."""


class RankProxy(ClientProxy):
    """A rank as a strategy knows it, the same object over every connection: it is chosen, and the server asks it."""

    def __init__(self, rank: int) -> None:
        super().__init__(str(rank))
        self.node_id = rank
        self.properties = {"rank": rank}

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise AggregationError(
            f"the strategy asked rank {self.cid} itself; here it returns its instructions from configure_fit and "
            "configure_evaluate, and the server asks"
        )

    get_properties = get_parameters = fit = evaluate = reconnect = _refuse


@dataclass(frozen=True, kw_only=True)
class Reply(Answer):
    """An answer to ``ask``, and what came along with it; the server makes one itself where no answer came."""

    # The payload, if it came along.
    blob: bytes | None = None
    # How the task that was asked for next ended, if it has.
    ahead: Reply | None = None

    @classmethod
    def of(cls, answer: Answer, blob: bytes | None) -> Reply:
        """Put an answer and what came along together."""
        if answer.then is None:
            return cls(**vars(answer), blob=blob)
        # A blob that came along is the payload of the last of two tasks.
        then = cls.of(replace(answer.then, then=None), blob)
        return cls(**vars(answer), ahead=then if then.has_ended else None)

    @property
    def has_ended(self) -> bool:
        """Whether there is a result, of a task or of a step of it, or a failure."""
        return self.status in ("ok", "error", "step", "again")

    @property
    def all_metrics(self) -> dict[str, Any]:
        """The metrics, the loss among them."""
        return ({} if self.loss is None else {"loss": self.loss}) | self.shown_metrics


class Peer:
    """A connection to a client."""

    def __init__(self, proxy: ClientProxy) -> None:
        self.proxy = proxy
        # Who it is: known once it was greeted.
        self.rank = -1
        self.exchange_id = ""
        # Digest of the state that its exchange directory holds.
        self.held: str | None = None
        # Whether payloads travel by reference.
        self.sees_store = False
        # When it may be greeted again if it is not here: not during a greeting, nor soon after it was refused.
        self.again_at = math.inf
        self._last_heard = time.monotonic()
        # Flower's bridge takes one question at a time.
        self._lock = threading.Lock()

    def greet(self, run_id: str, store: PayloadStore | RemoteStore | None, join_key: bytes | None) -> None:
        """Ask who it is, once it has proved that it may know who asks; raises TurnedAwayError if it takes no part."""
        transcript = self._challenge(run_id, join_key) if join_key else None
        nonce_name, nonce = "", ""
        try:
            nonce_name, nonce = store.put_nonce() if store else ("", "")
        except FedSplitError as exc:
            log.warning("%s; payloads of a new client travel in messages", exc)
        root = store.announced_root if store else None
        record = {"op": "hello", "run_id": run_id, "nonce_name": nonce_name, "store_root": root}
        if transcript and join_key:
            record["proof"] = transcript.proof(join_key, "server")
        try:
            hello = self._question(record, Greeted)
        finally:
            if store and nonce:
                store.drop(nonce_name)
        if hello.leaving:
            reason = printable(hello.leaving)
            log.warning("rank %d: the client turned this server down: %s", hello.rank, reason)
            raise TurnedAwayError(reason)
        if hello.exchange_id is None:
            raise RecordError("a client's greeting does not name its exchange directory")
        self.rank, self.exchange_id, self.held = hello.rank, hello.exchange_id, hello.held
        self.sees_store = bool(nonce) and hello.nonce == nonce
        if transcript and (self.rank, self.exchange_id) != (transcript.rank, transcript.exchange_id):
            raise RecordError("its greeting names another rank or exchange directory than its proof of the join token")
        self._last_heard = time.monotonic()

    def _challenge(self, run_id: str, key: bytes) -> Transcript:
        """Let the client prove that it knows the join token."""
        nonce = new_nonce()
        joined = self._question({"op": "join", "run_id": run_id, "nonce": nonce}, Joined)
        if not joined.proof:
            log.warning("rank %d: turned away: its client has no join token", joined.rank)
            raise TurnedAwayError("this server asks for a join token; start the client with its --join-token-file")
        if joined.nonce is None or joined.exchange_id is None:
            raise RecordError("its answer has no challenge, or does not name its exchange directory")
        transcript = Transcript(
            run_id=run_id, rank=joined.rank, exchange_id=joined.exchange_id, server_nonce=nonce,
            client_nonce=joined.nonce,
        )  # fmt: skip
        if not transcript.is_proof(key, "client", joined.proof):
            log.warning("rank %d: turned away: its client has another join token", joined.rank)
            raise TurnedAwayError("wrong join token: the --join-token-file of server and client hold different tokens")
        return transcript

    def refuse(self, reason: str) -> None:
        """Tell the client why it cannot take part, and end the connection."""
        self.again_at = time.monotonic() + _REFUSED_S
        try:
            self._send({"op": "refuse", "reason": reason})
            self.proxy.reconnect(flower.ReconnectIns(seconds=None), _GREETING_S, None)
        except Exception as exc:  # noqa: BLE001  (it is being sent away; whether it hears why is not ours to ensure)
            log.debug("the refused client did not listen: %s", exc)

    def was_heard_within(self, seconds: float) -> bool:
        """Tell whether the client answered anything lately; while its trainer works it does so every second."""
        return time.monotonic() - self._last_heard < seconds

    def is_silent(self, for_s: float) -> bool:
        """Tell whether no question is under way and none was answered in the last ``for_s`` seconds."""
        return not (self._lock.locked() or self.was_heard_within(for_s))

    def tell(self, record: Mapping[str, Any]) -> None:
        """Send ``finish`` or ``ping``."""
        self._call(lambda: self._question(record, Told))

    def ask(self, record: Mapping[str, Any], blob: bytes | None, *, most_s: float) -> Reply:
        """Ask for a task, to be answered within ``most_s`` seconds; ``blob`` is the state that goes along."""
        timeout = _timeout(record["bytes"], most_s, record["hold_s"])
        if record["kind"] != "evaluate" or "then" in record or record.get("step") is not None:
            return Reply.of(*self._fit(record, blob, timeout, Answer))
        # Not for what may come along with the answer: Flower's answer to an evaluation has no room for that.
        ins = flower.EvaluateIns(_parameters(blob), pack(record))
        found = self._call(lambda: self.proxy.evaluate(ins, timeout, None))
        return Reply.of(self._read(found.metrics, Answer), None)

    def push(self, digest: str, total_bytes: int, offset: int, piece: bytes, *, most_s: float) -> Taken:
        """Send a piece of a state; returns how many bytes of it the client has."""
        record = {"op": "push", "digest": digest, "bytes": total_bytes, "offset": offset}
        taken, _ = self._fit(record, piece, _timeout(len(piece), most_s), Taken)
        if taken.error:
            raise RecordError(f"the state could not be sent: {taken.failure}")
        return taken

    def pull(self, digest: str, offset: int, piece_bytes: int, *, most_s: float) -> bytes | None:
        """Fetch a piece of the payload of a result; None if the client no longer has it."""
        ins = flower.GetParametersIns(pack({"op": "pull", "digest": digest, "offset": offset, "bytes": piece_bytes}))
        found = self._call(lambda: self.proxy.get_parameters(ins, _timeout(piece_bytes, most_s), None))
        return found.parameters.tensors[0] if found.status.code == flower.Code.OK and found.parameters.tensors else None

    def _fit(
        self, record: Mapping[str, Any], blob: bytes | None, timeout: float, kind: type[AnySaid]
    ) -> tuple[AnySaid, bytes | None]:
        ins = flower.FitIns(_parameters(blob), pack(record))
        found = self._call(lambda: self.proxy.fit(ins, timeout, None))
        return self._read(found.metrics, kind), next(iter(found.parameters.tensors), None)

    def _call(self, call: Callable[[], Any]) -> Any:
        with self._lock:
            try:
                answer = call()
            except Exception as exc:
                raise PeerLostError(f"{type(exc).__name__}: {exc}") from exc
            self._last_heard = time.monotonic()
            return answer

    def _send(self, record: Mapping[str, Any]) -> flower.GetPropertiesRes:
        ins = flower.GetPropertiesIns(pack(record))
        try:
            return self.proxy.get_properties(ins, _GREETING_S, None)
        except Exception as exc:  # whatever Flower raises: no answer came
            raise PeerLostError(f"{type(exc).__name__}: {exc}") from exc

    def _question(self, record: Mapping[str, Any], kind: type[AnySaid]) -> AnySaid:
        return self._read(self._send(record).properties, kind)

    def _read(self, fields: Mapping[str, Any], kind: type[AnySaid]) -> AnySaid:
        """Let an answer through the gate; raises RecordError that names the field."""
        where = "a client" if self.rank < 0 else f"the client of rank {self.rank}"
        return read(unpack(fields, where), kind, where)


def _parameters(blob: bytes | None) -> flower.Parameters:
    return flower.Parameters([] if blob is None else [blob], TENSOR_TYPE)


def _timeout(size: int, most_s: float, hold_s: float = 0.0) -> float:
    """Return within how many seconds a question with so many bytes must be answered."""
    # Flower takes a timeout of 0 for none at all.
    return max(0.1, min(hold_s + _GRACE_S + size / BYTES_PER_S, most_s))
