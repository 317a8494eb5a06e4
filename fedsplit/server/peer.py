"""A connected client that has said which rank it is, and the rank as Flower's strategies know it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import fedsplit.wire.flower_env  # noqa: F401  (first: it keeps Flower from calling home)

# isort: split
from flwr.common import Code, EvaluateIns, FitIns, GetParametersIns, GetPropertiesIns, Parameters
from flwr.server.client_proxy import ClientProxy

from fedsplit.errors import AggregationError
from fedsplit.wire.protocol import BYTES_PER_S, TENSOR_TYPE, pack, unpack

GREETING_S = 30.0
# What a relay may take to answer beyond what it was told to hold: it never waits for the trainer any longer.
_GRACE_S = 30.0


class PeerLostError(Exception):
    """The connection broke in the middle of a question. Internal: the rank may come back."""


class RankProxy(ClientProxy):
    """A rank as a strategy knows it: the same object for the whole run, over every connection.

    A strategy chooses ranks and gives them instructions; the server carries them out.

    Parameters
    ----------
    rank
        Its ``cid`` is the rank as text.
    """

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


class Peer:
    """A connected client that has said who it is.

    Attributes
    ----------
    held : str or None
        Digest of the state that its exchange directory holds.
    sees_store : bool
        Whether payloads travel by reference.
    """

    def __init__(self, proxy: ClientProxy, hello: dict[str, Any], *, sees_store: bool) -> None:
        self.proxy = proxy
        self.rank = int(hello["rank"])
        self.exchange_id = str(hello["exchange_id"])
        self.held: str | None = hello.get("held")
        self.sees_store = sees_store
        self.last_heard = time.monotonic()
        # Flower's bridge takes one question at a time.
        self._lock = threading.Lock()

    def was_heard_within(self, seconds: float) -> bool:
        """Tell whether the client answered anything lately; while it trains it does so every second."""
        return time.monotonic() - self.last_heard < seconds

    def control(self, record: dict[str, Any]) -> dict[str, Any]:
        """Send ``hello``, ``finish`` or ``refuse``."""
        reply = self._call(lambda: self.proxy.get_properties(GetPropertiesIns(pack(record)), GREETING_S, None))
        return unpack(reply.properties, f"the client of rank {self.rank}")

    def ask(self, record: dict[str, Any], blob: bytes | None) -> tuple[dict[str, Any], bytes | None]:
        """Ask for a task; returns the reply's record and the result's bytes if they came along."""
        parameters = Parameters([blob] if blob is not None else [], TENSOR_TYPE)
        timeout = record["hold_s"] + _GRACE_S + record["bytes"] / BYTES_PER_S
        # Flower's answer to an evaluation has no room for what may come along with it.
        if record["kind"] == "evaluate" and "then" not in record:
            evaluated = self._call(lambda: self.proxy.evaluate(EvaluateIns(parameters, pack(record)), timeout, None))
            return unpack(evaluated.metrics, f"the client of rank {self.rank}"), None
        fitted = self._call(lambda: self.proxy.fit(FitIns(parameters, pack(record)), timeout, None))
        blobs = fitted.parameters.tensors
        return unpack(fitted.metrics, f"the client of rank {self.rank}"), blobs[0] if blobs else None

    def push(self, digest: str, total_bytes: int, offset: int, piece: bytes) -> dict[str, Any]:
        """Send a piece of a state; returns the reply's record, with how many bytes the client ``have``."""
        record = pack({"op": "push", "digest": digest, "bytes": total_bytes, "offset": offset})
        ins = FitIns(Parameters([piece], TENSOR_TYPE), record)
        timeout = _GRACE_S + len(piece) / BYTES_PER_S
        reply = self._call(lambda: self.proxy.fit(ins, timeout, None))
        return unpack(reply.metrics, f"the client of rank {self.rank}")

    def pull(self, digest: str, offset: int, piece_bytes: int) -> bytes | None:
        """Fetch a piece of the payload of a result; None if the client no longer has it."""
        timeout = _GRACE_S + piece_bytes / BYTES_PER_S
        ins = GetParametersIns(pack({"op": "pull", "digest": digest, "offset": offset, "bytes": piece_bytes}))
        reply = self._call(lambda: self.proxy.get_parameters(ins, timeout, None))
        return reply.parameters.tensors[0] if reply.status.code == Code.OK and reply.parameters.tensors else None

    def ping_if_silent(self, for_s: float) -> None:
        """Ask for a sign of life, unless a question is under way or one was answered in the last ``for_s`` seconds."""
        if self._lock.locked() or time.monotonic() - self.last_heard < for_s:
            return
        self.control({"op": "ping"})

    def _call(self, call: Callable[[], Any]) -> Any:
        with self._lock:
            try:
                answer = call()
            except Exception as exc:
                raise PeerLostError(f"{type(exc).__name__}: {exc}") from exc
            self.last_heard = time.monotonic()
            return answer
