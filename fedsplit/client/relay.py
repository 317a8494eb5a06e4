"""The Flower client: a relay between the server and the exchange directory.

It decodes no tensor and imports no torch: the bytes it receives go to a file, the bytes of a file go to the server,
and where both sides see the same disk only a digest travels. It answers every question within the engine's hold, a
second or twenty, so it always knows what the server wants; how long a training takes is none of its business.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fedsplit.wire.flower_env  # noqa: F401  (first: it keeps Flower from calling home)

# isort: split
from flwr.client import Client
from flwr.common import (
    Code,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersIns,
    GetParametersRes,
    GetPropertiesIns,
    GetPropertiesRes,
    Parameters,
    Status,
)  # fmt: skip

from fedsplit.disk.files import remove
from fedsplit.disk.payload_store import Incoming, PayloadStore, read_nonce, read_part
from fedsplit.errors import ExchangeError, FedSplitError, RecordError, RefusedError
from fedsplit.exchange.client_side import ClientSide, Source
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import FinishedRecord, PayloadRecord, Request, ResultRecord, request_from_json
from fedsplit.exchange.waiting import Watch
from fedsplit.wire.join import Transcript, is_nonce
from fedsplit.wire.protocol import EMBEDDED, TENSOR_TYPE, Engine, pack, unpack

if TYPE_CHECKING:
    from fedsplit.disk.remote_store import RemoteStore

log = logging.getLogger("fedsplit")

_TRAINER_CHECK_S = 0.08
_BAD_RESULT_S = 5.0
# Also for a task that failed: with another code Flower drops the metrics, and with them the reason.
_OK = Status(code=Code.OK, message="")


class Relay(Client):
    """Relays the server's requests to the trainer of the same rank.

    Parameters
    ----------
    exchange
        The exchange directory; the caller holds its client role.
    trainer_wait_s
        Seconds to wait for a trainer to be there before a task is reported as failed.
    remote
        The store at ``--payload-store URL``; used instead of the server's own where the server uses it too.
    use_store
        Whether payloads may travel by reference, where the server's store can be seen.
    join_key
        What the server and this client must prove to each other to know; None takes any server.
    engine
        Which of Flower's engines this runs on.

    Attributes
    ----------
    outcome : FinishedRecord or None
        How the run ended, once the server has said so.
    refused : RefusedError or None
        Why the server turned this client away, or this client the server.
    missing_since : float or None
        `time.monotonic` since when no trainer was there, while a task waits for one.
    """

    def __init__(
        self,
        exchange: Exchange,
        *,
        trainer_wait_s: float,
        use_store: bool = True,
        remote: RemoteStore | None = None,
        join_key: bytes | None = None,
        engine: Engine = EMBEDDED,
    ) -> None:
        self.outcome: FinishedRecord | None = None
        self.refused: RefusedError | None = None
        self._exchange = exchange
        self._side = ClientSide(exchange)
        self._trainer_wait_s = trainer_wait_s
        self._use_store = use_store
        self._remote = remote
        self._store: PayloadStore | RemoteStore | None = None
        self._join_key = join_key
        self._engine = engine
        self._transcript: Transcript | None = None
        self._knows_server = join_key is None
        self._last_heard = time.monotonic()
        self._busy = False
        self._incoming: Incoming | None = None
        self.missing_since: float | None = None
        self._watch = Watch(exchange.result_path)
        self._trainer_checked = 0.0
        self._announced: tuple[str, str, int] | None = None

    # -- the connection --------------------------------------------------------------------------------------------

    def begin_connection(self) -> None:
        """Forget what was proved: whoever answers in a new connection has proved nothing yet."""
        self._transcript = None
        self._knows_server = self._join_key is None
        self._store = None
        self._last_heard = time.monotonic()

    def silence_s(self) -> float:
        """Return for how many seconds the server was silent; 0 while busy."""
        return 0.0 if self._busy else time.monotonic() - self._last_heard

    @contextmanager
    def _question(self, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Read a question, and note that the server is alive."""
        self._busy = True
        try:
            message = unpack(config, "the server")
            if not self._knows_server and message.get("op") not in ("join", "hello", "refuse"):
                raise RefusedError("the server asks for work and has not proved that it knows the join token")
            yield message
        finally:
            self._last_heard, self._busy = time.monotonic(), False

    # -- Flower's verbs --------------------------------------------------------------------------------------------

    def get_properties(self, ins: GetPropertiesIns) -> GetPropertiesRes:
        """Answer ``join``, ``hello``, ``finish``, ``refuse`` and ``ping``."""
        with self._question(ins.config) as message:
            operation = message.get("op")
            reply: dict[str, Any] = {}
            if operation == "join":
                reply = self._prove(message)
            elif operation == "hello":
                reply = self._greet(message)
            elif operation == "finish":
                self._finish(message)
            elif operation == "refuse":
                self.refused = self.refused or RefusedError(
                    f"the server refused rank {self._exchange.rank}: {message.get('reason')}"
                )
            elif operation != "ping":
                raise RecordError(f"the server asks for {operation!r}, which this version of fedsplit does not know")
            return GetPropertiesRes(status=_OK, properties=pack(reply))

    def fit(self, ins: FitIns) -> FitRes:
        """Answer ``ask`` for ``initialize`` and ``train``, and ``push``."""
        with self._question(ins.config) as message:
            if message.get("op") == "push":
                reply, blobs = self._take(message, ins.parameters), list[bytes]()
            else:
                reply, blobs = self._ask(message, ins.parameters.tensors)
        return FitRes(
            status=_OK, parameters=Parameters(blobs, TENSOR_TYPE),
            num_examples=int(reply.get("num_examples", 0)), metrics=pack(reply),
        )  # fmt: skip

    def evaluate(self, ins: EvaluateIns) -> EvaluateRes:
        """Answer ``ask`` for ``evaluate``."""
        with self._question(ins.config) as message:
            reply, _ = self._ask(message, ins.parameters.tensors)
        return EvaluateRes(
            status=_OK, loss=float(reply.get("loss") or 0.0),
            num_examples=int(reply.get("num_examples", 0)), metrics=pack(reply),
        )  # fmt: skip

    def get_parameters(self, ins: GetParametersIns) -> GetParametersRes:
        """Answer ``pull``: a piece of the payload of the newest result, in one read."""
        with self._question(ins.config) as message:
            try:
                result = self._exchange.read_result()
                if result and result.payload and result.payload.digest == message.get("digest"):
                    path = self._exchange.check_payload(result.payload)
                    piece = read_part(path, _number(message, "offset"), _number(message, "bytes"))
                    return GetParametersRes(status=_OK, parameters=Parameters([piece], TENSOR_TYPE))
            except (RecordError, OSError) as exc:
                log.warning("%s", exc)
        reason = f"rank {self._exchange.rank} no longer holds that result"
        status = Status(code=Code.GET_PARAMETERS_NOT_IMPLEMENTED, message=reason)
        return GetParametersRes(status=status, parameters=Parameters([], TENSOR_TYPE))

    # -- the operations ---------------------------------------------------------------------------------------------

    def _prove(self, message: dict[str, Any]) -> dict[str, Any]:
        """Answer the server's challenge, and challenge it."""
        if self._join_key is None:
            return {"rank": self._exchange.rank}
        if not is_nonce(message.get("nonce")):
            raise RecordError("the server's challenge is none")
        transcript = self._transcript = Transcript(
            run_id=str(message.get("run_id")), rank=self._exchange.rank, exchange_id=self._side.exchange_id(),
            server_nonce=message["nonce"],
        )  # fmt: skip
        return {
            "rank": transcript.rank, "exchange_id": transcript.exchange_id, "nonce": transcript.client_nonce,
            "proof": transcript.proof(self._join_key, "client"),
        }  # fmt: skip

    def _distrust(self, message: dict[str, Any]) -> str | None:
        """Return why a server that greets is not the one to work for, or None."""
        if self._join_key is None:
            return None
        if self._transcript is None:
            return "the server asks for no join token, this client was given one; start both with --join-token-file"
        if not self._transcript.is_proof(self._join_key, "server", message.get("proof")):
            return "the server did not prove that it knows the join token"
        return None

    def _greet(self, message: dict[str, Any]) -> dict[str, Any]:
        if reason := self._distrust(message):
            self.refused = RefusedError(f"rank {self._exchange.rank} turned the server down: {reason}")
            return {"rank": self._exchange.rank, "leaving": reason}
        self._knows_server = True
        proof = None
        self._store = None
        root, name = message.get("store_root"), str(message.get("nonce_name"))
        if self._remote:
            proof = self._remote.read_nonce(name)
            self._store = self._remote if proof else None
        elif self._use_store and root:
            proof = read_nonce(Path(str(root)), name)
            self._store = PayloadStore(Path(str(root))) if proof else None
        how = "the payload store" if self._store else "messages"
        log.info("rank %d: joined run %s; payloads travel by %s", self._exchange.rank, message.get("run_id"), how)
        return {
            "rank": self._exchange.rank, "exchange_id": self._side.exchange_id(),
            "held": self._side.held_digest(), "nonce": proof,
        }  # fmt: skip

    def _finish(self, message: dict[str, Any]) -> None:
        run_id, outcome, reason = (str(message.get(key, "")) for key in ("run_id", "outcome", "reason"))
        self._side.finish(run_id, outcome, reason)
        self.outcome = FinishedRecord(version=1, run_id=run_id, outcome=outcome, reason=reason)

    def _take(self, message: dict[str, Any], parameters: Parameters) -> dict[str, Any]:
        """Take a piece of a state that is too large for one message."""
        try:
            digest, size, offset = str(message.get("digest")), _number(message, "bytes"), _number(message, "offset")
            if self._incoming is None or (self._incoming.digest, self._incoming.size) != (digest, size):
                self._incoming = Incoming(self._exchange.fetched_path, digest, size)
            if parameters.tensors:
                self._incoming.add(offset, parameters.tensors[0])
            return {"have": self._incoming.have}
        except FedSplitError as exc:
            self._incoming = None
            log.warning("rank %d: %s", self._exchange.rank, exc)
            return {"error": {"type": type(exc).__name__, "message": str(exc)}}

    def _ask(self, message: dict[str, Any], blobs: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
        request = request_from_json(message, "the server's request")
        began = time.monotonic()
        try:
            reply, results = self._relay(request, message, blobs)
        except FedSplitError as exc:
            # An exception would end the client process and with it the rank; the server decides what a failure means.
            log.warning("rank %d: %s", self._exchange.rank, exc)
            return {"status": "error", "error": {"type": type(exc).__name__, "message": str(exc)}}, []
        if reply["status"] == "ok" and isinstance(then := message.pop("then", None), dict):
            asked = time.monotonic()
            left_s = max(0.0, float(message.get("hold_s", 0.0)) - (asked - began))
            reply["then"], results = self._ask({**message, **then, "hold_s": left_s}, [])
            reply["then"]["held_s"] = time.monotonic() - asked
        return reply, results

    def _relay(
        self, request: Request, message: dict[str, Any], blobs: list[bytes]
    ) -> tuple[dict[str, Any], list[bytes]]:
        digest = message.get("digest")

        def fetch(wanted: str) -> Source | None:
            if blobs:
                return _checked(blobs[0], wanted)
            incoming = self._incoming
            if incoming and incoming.is_whole and incoming.digest == wanted:
                return Source(digest=wanted, bytes=incoming.size, content=incoming.path)
            path = self._store.take(wanted, self._exchange.fetched_path) if self._store else None
            return Source(digest=wanted, bytes=int(message["bytes"]), content=path) if path else None

        try:
            version = self._side.offer(request, digest, fetch)
        finally:
            self._incoming = None
            remove(self._exchange.fetched_path)
        if version is None:
            return {"status": "need"}, []
        self._announce(request, version)
        try:
            result = self._await(version, float(message.get("hold_s", 0.0)))
        except FedSplitError:
            # The server is told that this came to nothing: a trainer that comes later must not begin it.
            self._side.cancel(version)
            raise
        if result is not None:
            return self._deliver(result)
        if message.get("cancel"):
            self._side.cancel(version)
            return {"status": "cancelled"}, []
        waiting_for = "trainer" if self.missing_since is not None else None
        return {"status": "working", "waiting_for": waiting_for}, []

    def _await(self, version: int, hold_s: float) -> ResultRecord | None:
        """Wait for the answer to a version; None if it does not come within ``hold_s``."""
        began = time.monotonic()
        bad_since = None
        self._watch.begin()
        while True:
            now = time.monotonic()
            try:
                if self._watch.has_changed() and (result := self._side.result(version)):
                    self.missing_since = None
                    return result
            except RecordError as exc:
                bad_since = bad_since or now
                if now - bad_since > min(hold_s, _BAD_RESULT_S):
                    raise RecordError(f"the trainer's answer cannot be read: {exc}") from exc
            if now - self._trainer_checked >= _TRAINER_CHECK_S:
                self._trainer_checked = now
                self._check_trainer(now)
            if now - began >= hold_s:
                return None
            self._watch.sleep()

    def _check_trainer(self, now: float) -> None:
        rank = self._exchange.rank
        if self._exchange.is_held("trainer"):
            if self.missing_since is not None:
                log.info("rank %d: a trainer is here (%s)", rank, self._exchange.owner("trainer"))
            self.missing_since = None
            return
        if self.missing_since is None:
            self.missing_since = now
            log.warning(
                "rank %d: no trainer holds %s; waiting up to %g s for model_main.py --rank %d",
                rank, self._exchange.lock_path("trainer"), self._trainer_wait_s, rank,
            )  # fmt: skip
        elif now - self.missing_since > self._trainer_wait_s:
            self.missing_since = None
            raise FedSplitError(
                f"no trainer of rank {rank} for {self._trainer_wait_s:g} s; start model_main.py --rank {rank} "
                f"with the same --exchange-dir ({self._exchange.directory.parent})"
            )

    def _deliver(self, result: ResultRecord) -> tuple[dict[str, Any], list[bytes]]:
        if result.status == "error":
            return {"status": "error", "error": dict(result.error or {}), "seconds": result.seconds}, []
        reply: dict[str, Any] = {
            "status": "ok", "num_examples": result.num_examples, "loss": result.loss,
            "metrics": dict(result.metrics), "seconds": result.seconds,
        }  # fmt: skip
        blobs: list[bytes] = []
        if result.payload:
            via = self._place(result.payload)
            reply["payload"] = {"digest": result.payload.digest, "bytes": result.payload.bytes, "via": via}
            if via == "inline":
                blobs = [(self._exchange.directory / result.payload.file).read_bytes()]
        return reply, blobs

    def _place(self, payload: PayloadRecord) -> str:
        """Bring a result to where the server can get it; returns how it gets there."""
        if self._store:
            try:
                self._store.give(self._exchange.directory / payload.file, payload.digest)
                return "store"
            except ExchangeError as exc:  # the server's disk is full, say: then a message is the way
                log.warning("rank %d: %s; sending the result in a message", self._exchange.rank, exc)
        return "pull" if payload.bytes > self._engine.piece_bytes else "inline"

    def _announce(self, request: Request, version: int) -> None:
        what = (request.run_id, request.kind, request.server_round)
        if what != self._announced:
            self._announced = what
            log.info(
                "rank %d: %s, round %d of %d (version %d)",
                self._exchange.rank, request.kind, request.server_round, request.total_rounds, version,
            )  # fmt: skip


def _number(message: dict[str, Any], key: str) -> int:
    value = message.get(key)
    if type(value) is not int or value < 0:
        raise RecordError(f"the server's message has {value!r} for {key!r}, expected a number of bytes")
    return value


def _checked(blob: bytes, digest: str) -> Source:
    found = hashlib.sha256(blob).hexdigest()
    if found != digest:
        raise RecordError(f"the server sent a state with digest {found[:12]}…, announced as {digest[:12]}…")
    return Source(digest=digest, bytes=len(blob), content=blob)
