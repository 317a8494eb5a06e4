"""The Flower client: a relay between the server and the exchange directory.

It decodes no tensor and imports no torch: the bytes it receives go to a file, the bytes of a file go to the server,
and where both sides see the same disk only a digest travels. Only with ``--mask-here`` what the trainer made is masked
on its way (`fedsplit.client.masks`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fedsplit.wire.flower_env  # noqa: F401  (first: it keeps Flower from calling home)

# isort: split
import flwr.common as flower
from flwr.client import Client

from fedsplit.client.long_poll import LongPoll
from fedsplit.disk.digest import bytes_digest
from fedsplit.disk.files import explained, remove
from fedsplit.disk.payload_store import Incoming, PayloadStore, read_part
from fedsplit.disk.remote_store import RemoteStore
from fedsplit.disk.spares import Spares
from fedsplit.errors import ExchangeError, FedSplitError, NoSpaceError, RecordError, RefusedError
from fedsplit.exchange.client_side import ClientSide, Source
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import FinishedRecord, PayloadRecord, Request, ResultRecord, printable, read
from fedsplit.wire.join import Transcript
from fedsplit.wire.protocol import EMBEDDED, TENSOR_TYPE, Ask, Engine, Message, Piece, pack, unpack

if TYPE_CHECKING:
    from fedsplit.client.masks import Masks

log = logging.getLogger("fedsplit")

# Also for a task that failed: with another code Flower drops the metrics, and with them the reason.
_OK = flower.Status(code=flower.Code.OK, message="")
_Reply = tuple[dict[str, Any], list[bytes]]


class Relay(Client):
    """Relays the server's requests to the trainer of the same rank; the caller holds the client role of its exchange.

    A task counts as failed after `trainer_wait_s` seconds without a trainer. Payloads travel through `remote`, the
    store at ``--payload-store URL``, if the server uses it too, or with `use_store` through the server's own store, if
    it can be seen. What the server and this client must prove to each other to know is `join_key`; None takes any
    server. With `mask_here` no update leaves but masked. How the run ended is `outcome`; `refused` is why one turned
    the other away.
    """

    def __init__(
        self, exchange: Exchange, *, trainer_wait_s: float, use_store: bool = True, remote: RemoteStore | None = None,
        join_key: bytes | None = None, engine: Engine = EMBEDDED, mask_here: bool = False,
    ) -> None:  # fmt: skip
        self.outcome: FinishedRecord | None = None
        self.refused: RefusedError | None = None
        self._exchange = exchange
        self._side = ClientSide(exchange)
        self._join_key, self._use_store, self._remote = join_key, use_store, remote
        self.long_poll = LongPoll(self._side, trainer_wait_s)
        self._engine = engine
        self._masks: Masks | None = None
        if mask_here:
            # Late: it is all that needs cryptography, and decodes tensors.
            from fedsplit.client.masks import Masks

            self._masks = Masks(exchange)
        self.begin_connection()
        self._busy = False
        self._incoming: Incoming | None = None
        self._spares = Spares(exchange.directory, "fetched")
        self._is_full = False
        self._announced: tuple[str, str, int] | None = None
        # The version that is waited for; when it was first asked for, and offered to the trainer.
        self._since = (0, 0.0, 0.0)

    # -- the connection --------------------------------------------------------------------------------------------

    def begin_connection(self) -> None:
        """Forget what was proved in the connection before: in a new one the server has proved nothing yet."""
        self._transcript: Transcript | None = None
        self._knows_server = self._join_key is None
        # Where both sides see the same payloads; None if these travel in messages.
        self._store: PayloadStore | RemoteStore | None = None
        self._last_heard = time.monotonic()

    def silence_s(self) -> float:
        """Return for how many seconds the server was silent; 0 while a question of it is being answered."""
        return 0.0 if self._busy else time.monotonic() - self._last_heard

    def leave(self) -> dict[str, str | float]:
        """Return what the relay of the next message must know, where each message has a process of its own."""
        state: dict[str, str | float] = {}
        if self.long_poll.missing_since is not None:
            state["missing-since"] = self.long_poll.missing_since
        if self._store:
            state["store-root"] = self._store.announced_root or ""
        return state

    def take_up(self, kept: Mapping[str, Any]) -> None:
        """Go on from what the relay of the message before has left."""
        # The clock is the machine's: it goes on from one process to the next.
        self.long_poll.missing_since = kept.get("missing-since")
        # That the store is the server's was proved when the connection began. The one at a URL has no root.
        if (root := kept.get("store-root")) is not None:
            self._store = PayloadStore(Path(root)) if root else self._remote

    @contextmanager
    def _question(self, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Read a question, and note that the server is alive."""
        self._busy, self._asked_at = True, time.monotonic()
        try:
            message = unpack(config, "the server")
            if not self._knows_server and message.get("op") not in ("join", "hello", "refuse"):
                raise RefusedError("the server asks for work and has not proved that it knows the join token")
            with self._masks.alone() if self._masks else nullcontext():
                yield message
        finally:
            self._last_heard, self._busy = time.monotonic(), False

    # -- Flower's verbs --------------------------------------------------------------------------------------------

    def get_properties(self, ins: flower.GetPropertiesIns) -> flower.GetPropertiesRes:
        """Answer ``join``, ``hello``, ``finish``, ``refuse`` and ``ping``."""
        with self._question(ins.config) as fields:
            message, rank = read(fields, Message, "the server's message"), self._exchange.rank
            reply: dict[str, Any] = {}
            if message.op == "join":
                reply = self._prove(message)
            elif message.op == "hello":
                try:
                    reply = self._greet(message)
                except RefusedError as exc:
                    self.refused = RefusedError(f"rank {rank} turned the server down: {exc}")
                    reply = {"rank": rank, "leaving": str(exc)}
            elif message.op == "finish":
                run_id, outcome, reason = message.run_id, message.outcome, printable(message.reason)
                if self._masks and outcome == "complete":
                    # Before the end is there to be seen: the script of a SuperNode then ends this process.
                    self._masks.forget()
                self._side.finish(run_id, outcome, reason)
                self.outcome = FinishedRecord(version=1, run_id=run_id, outcome=outcome, reason=reason)
            elif message.op == "refuse":
                reason = f"the server refused rank {rank}: {printable(message.reason)}"
                self.refused = self.refused or RefusedError(reason)
            return flower.GetPropertiesRes(status=_OK, properties=pack(reply))

    def fit(self, ins: flower.FitIns) -> flower.FitRes:
        """Answer ``ask`` for ``initialize`` and ``train``, and ``push``."""
        with self._question(ins.config) as message:
            if message.get("op") == "push":
                reply, blobs = self._take(message, ins.parameters), list[bytes]()
            else:
                reply, blobs = self._ask(read(message, Ask, "the server's request"), ins.parameters.tensors)
        return flower.FitRes(
            status=_OK, parameters=flower.Parameters(blobs, TENSOR_TYPE),
            num_examples=int(reply.get("num_examples", 0)), metrics=pack(reply),
        )  # fmt: skip

    def evaluate(self, ins: flower.EvaluateIns) -> flower.EvaluateRes:
        """Answer ``ask`` for ``evaluate``."""
        with self._question(ins.config) as message:
            reply, _ = self._ask(read(message, Ask, "the server's request"), ins.parameters.tensors)
        return flower.EvaluateRes(
            status=_OK, loss=float(reply.get("loss") or 0.0),
            num_examples=int(reply.get("num_examples", 0)), metrics=pack(reply),
        )  # fmt: skip

    def get_parameters(self, ins: flower.GetParametersIns) -> flower.GetParametersRes:
        """Answer ``pull``: a piece of the payload of the newest result, in one read."""
        with self._question(ins.config) as message:
            try:
                wanted = read(message, Piece, "the server's message")
                if path := self._find(wanted.digest):
                    piece = read_part(path, wanted.offset, wanted.bytes)
                    return flower.GetParametersRes(status=_OK, parameters=flower.Parameters([piece], TENSOR_TYPE))
            except (RecordError, OSError) as exc:
                log.warning("%s", exc)
        reason = f"rank {self._exchange.rank} no longer holds that result"
        status = flower.Status(code=flower.Code.GET_PARAMETERS_NOT_IMPLEMENTED, message=reason)
        return flower.GetParametersRes(status=status, parameters=flower.Parameters([], TENSOR_TYPE))

    # -- the operations ---------------------------------------------------------------------------------------------

    def _prove(self, message: Message) -> dict[str, Any]:
        """Answer ``join``: give the client's proof of the join token, and ask for the server's."""
        if self._join_key is None:
            return {"rank": self._exchange.rank}
        if message.nonce is None:
            raise RecordError("the server asked for a proof of the join token without a nonce to prove it with")
        rank, exchange_id = self._exchange.rank, self._exchange.exchange_id()
        transcript = self._transcript = Transcript(
            run_id=message.run_id, rank=rank, exchange_id=exchange_id, server_nonce=message.nonce
        )
        proof = transcript.proof(self._join_key, "client")
        return {"rank": rank, "exchange_id": exchange_id, "nonce": transcript.client_nonce, "proof": proof}

    def _greet(self, message: Message) -> dict[str, Any]:
        """Answer ``hello``: agree on how payloads travel; raises RefusedError if this is no server to work for."""
        if self._join_key is not None:
            if self._transcript is None:
                raise RefusedError(
                    "the server asks for no join token, this client was given one; start both with --join-token-file"
                )
            if not self._transcript.is_proof(self._join_key, "server", message.proof):
                raise RefusedError("the server did not prove that it knows the join token")
        self._knows_server = True
        # The content of the server's nonce proves to it that both see the same store.
        root, rank = message.store_root, self._exchange.rank
        store = self._remote or (PayloadStore(Path(root)) if self._use_store and root else None)
        nonce = store.read_nonce(message.nonce_name) if store else None
        self._store = store if nonce else None
        how = "the payload store" if self._store else "messages"
        log.info("rank %d: joined run %s; payloads travel by %s", rank, printable(message.run_id), how)
        return {
            "rank": rank, "exchange_id": self._exchange.exchange_id(), "held": self._side.held_digest(), "nonce": nonce,
        }  # fmt: skip

    def _take(self, message: dict[str, Any], parameters: flower.Parameters) -> dict[str, Any]:
        """Take a piece of a state that is too large for one message."""
        try:
            piece = read(message, Piece, "the server's message")
            if self._incoming is None or (self._incoming.digest, self._incoming.size) != (piece.digest, piece.bytes):
                self._incoming = None
                self._incoming = Incoming(self._exchange.fetched_path, piece.digest, piece.bytes, self._spares)
            if parameters.tensors:
                self._incoming.add(piece.offset, parameters.tensors[0])
            return {"have": self._incoming.have}
        except NoSpaceError as exc:
            return {"have": self._incoming.have if self._incoming else 0, **self._wait_for_space(exc, 1.0)}
        except FedSplitError as exc:
            self._incoming = None
            return self._failed(exc)

    def _ask(self, ask: Ask, blobs: list[bytes]) -> _Reply:
        began = time.monotonic()
        try:
            reply, results = self._relay(ask, blobs)
        except NoSpaceError as exc:
            if ask.cancel:
                return {"status": "cancelled"}, []
            return {"status": "working", **self._wait_for_space(exc, ask.hold_s)}, []
        except FedSplitError as exc:
            self._exchange.check_is_there()
            if isinstance(exc, ExchangeError) and not os.access(self._exchange.directory, os.W_OK):
                # Read-only, say. Reported, it would fail every round at once, and use up the run.
                raise
            # Any other exception would end the client and with it the rank; the server decides what a failure means.
            return {"status": "error", **self._failed(exc)}, []
        if ask.then and reply["status"] == "ok":
            asked = time.monotonic()
            left_s = max(0.0, ask.hold_s - (asked - began))
            reply["then"], results = self._ask(replace(ask, **vars(ask.then), then=None, hold_s=left_s), [])
            reply["then"]["held_s"] = time.monotonic() - asked
        return reply, results

    def _relay(self, ask: Ask, blobs: list[bytes]) -> _Reply:
        began = time.monotonic()
        try:
            if self._masks and ask.kind == "train" and ask.secure and ask.step:
                return self._answer_stage(self._masks, ask, blobs)
            asked = self._masks.for_trainer(ask) if self._masks else ask
            version = self._side.offer(asked, asked.digest, lambda _: self._fetch(ask, blobs))
        finally:
            if self._incoming:
                self._incoming.discard()
                self._incoming = None
            remove(self._exchange.fetched_path)
        if version is None:
            return {"status": "need"}, []
        self._is_full = False
        if version != self._since[0]:
            self._since = (version, self._asked_at, began)
        self._announce(ask, version)
        try:
            result = self.long_poll.wait(version, ask.hold_s)
        except FedSplitError:
            # The server is told that this came to nothing: a trainer that comes later must not begin it.
            self._side.cancel(version)
            raise
        if result is not None:
            return self._deliver(self._masks.mask(ask, result) if self._masks else result)
        if ask.cancel:
            self._side.cancel(version)
            return {"status": "cancelled"}, []
        waiting_for = None if self.long_poll.missing_since is None else "trainer"
        return {"status": "working", "waiting_for": waiting_for}, []

    def _answer_stage(self, masks: Masks, ask: Ask, blobs: list[bytes]) -> _Reply:
        """Answer a stage of a secure sum in the trainer's place."""
        self._since = (0, self._asked_at, time.monotonic())
        question = self._fetch(ask, blobs)
        return self._deliver(masks.answer(ask, question)) if question else ({"status": "need"}, [])

    def _wait_for_space(self, exc: NoSpaceError, seconds: float) -> dict[str, Any]:
        """Say that there is no space, once for each time that the disk is full, and pause."""
        if not self._is_full:
            log.warning("rank %d: %s; waiting for space", self._exchange.rank, exc)
        self._is_full = True
        time.sleep(seconds)
        return {"waiting_for": "space"}

    def _fetch(self, ask: Ask, blobs: list[bytes]) -> Source | None:
        """Return where the state is: in the message, in the pieces that came before it, or in the store."""
        digest = str(ask.digest)
        if blobs:
            if (found := bytes_digest(blobs[0])) != digest:
                raise RecordError(f"the server sent a state with digest {found[:12]}…, announced as {digest[:12]}…")
            return Source(bytes=len(blobs[0]), content=blobs[0])
        incoming, store = self._incoming, self._store
        if incoming and incoming.is_whole and incoming.digest == digest:
            return Source(bytes=incoming.size, content=incoming.path, identity=incoming.identity)
        path = store.take(digest, self._exchange.fetched_path) if store else None
        return Source(bytes=ask.bytes, content=path, identity=ask.identity) if path else None

    def _deliver(self, result: ResultRecord) -> _Reply:
        if result.status == "error":
            return {"status": "error", "error": dict(result.error or {}), "seconds": result.seconds}, []
        reply: dict[str, Any] = {
            "status": result.status, "num_examples": result.num_examples, "loss": result.loss,
            "metrics": dict(result.metrics), "seconds": result.seconds,
        }  # fmt: skip
        if result.status == "step":
            reply["handed_s"] = time.monotonic() - self._since[2]
        if result.holds:
            reply["holds"] = result.holds
        if result.local_entries:
            reply["local_entries"] = dict(result.local_entries)
        blobs: list[bytes] = []
        if result.payload:
            path = self._holder(result.kind).directory / result.payload.file
            via = self._place(path, result.payload)
            identity = result.payload.identity if self._exchange.trusts else None
            reply["payload"] = {
                "digest": result.payload.digest, "bytes": result.payload.bytes, "via": via, "identity": identity,
            }  # fmt: skip
            if via == "inline":
                with explained(path, "read"):
                    blobs = [path.read_bytes()]
        if result.status == "step":
            reply["held_s"] = time.monotonic() - self._since[1]
        return reply, blobs

    def _holder(self, kind: str) -> Exchange:
        """Return the directory of what is sent of results of a kind."""
        return self._masks.sent if self._masks and kind != "initialize" else self._exchange

    def _find(self, digest: str) -> Path | None:
        """Return the file of a payload that the server was told of; None if it is no longer there."""
        for place in {self._holder("initialize"), self._holder("train")}:
            result = place.read_result()
            if result and result.payload and result.payload.digest == digest and self._holder(result.kind) is place:
                return place.check_payload(result.payload)
        return None

    def _place(self, path: Path, payload: PayloadRecord) -> str:
        """Bring a result to where the server can get it; returns how it gets there."""
        if self._store:
            try:
                self._store.give(path, payload.digest)
                return "store"
            except ExchangeError as exc:  # the server's disk is full, say: then a message is the way
                log.warning("rank %d: %s; sending the result in a message", self._exchange.rank, exc)
        return "pull" if payload.bytes > self._engine.piece_bytes else "inline"

    def _failed(self, exc: FedSplitError) -> dict[str, Any]:
        log.warning("rank %d: %s", self._exchange.rank, exc)
        return {"error": {"type": type(exc).__name__, "message": str(exc)}}

    def _announce(self, request: Request, version: int) -> None:
        what = (request.run_id, request.kind, request.server_round)
        if what != self._announced:
            self._announced = what
            if request.refused:
                why = printable(request.refused)
                log.warning("rank %d: the server did not count its last answer: %s", self._exchange.rank, why)
            log.info(
                "rank %d: %s, round %d of %d (version %d)",
                self._exchange.rank, request.kind, request.server_round, request.total_rounds, version,
            )  # fmt: skip
