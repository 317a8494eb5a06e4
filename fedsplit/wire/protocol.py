"""What server and client say to each other: JSON records inside Flower's own messages; docs/protocol.md lists them.

Each record is a string under the key ``fedsplit`` of Flower's ``config``, ``properties`` or ``metrics``. The bytes of a
state travel in Flower's ``Parameters``, and only when the other side does not hold them: a small safetensors blob along
with the question, a large one in pieces, so that neither its size nor Flower's many copies of a message are a limit.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from fedsplit.disk.identity import Identity
from fedsplit.errors import RecordError
from fedsplit.exchange.records import MOST_NAME, SCHEMA, Count, Digest, Request, parse

KEY = "fedsplit"
# No server may make a client hold a question for longer.
_MOST_HOLD_S = 60
TENSOR_TYPE = "safetensors"

# Flower's default, and what gRPC can do at most.
MAX_MESSAGE_BYTES = 2**31 - 1
# The slowest link that is waited for, beyond the half minute that every question has.
BYTES_PER_S = 1_000_000.0


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How questions are asked on one of Flower's engines."""

    name: str
    # Seconds that a client holds a question which it cannot answer yet (long polling).
    hold_s: float
    # States and results up to this size go along with a question, larger ones before or after it, in such pieces.
    piece_bytes: int
    # Whether the next round's training is asked for along with an evaluation, because a question is expensive.
    asks_ahead: bool
    # Seconds of silence after which a client is asked whether it is still there; None if the engine does that.
    ping_s: float | None


# Asking again every second costs nothing (a question takes a millisecond), and a run that is stopped stops at once.
# Flower makes half a dozen copies of each piece, so pieces are small; much smaller ones would only take longer.
EMBEDDED = Engine(name="embedded", hold_s=1.0, piece_bytes=1 << 22, asks_ahead=False, ping_s=10.0)
# A question starts a process and is found by polling every few seconds, so most tasks should need only one. But none is
# held for ever: a trainer in the middle of a task must hear that the run was stopped. Flower cuts its messages into
# pieces itself.
SUPERLINK = Engine(name="superlink", hold_s=20.0, piece_bytes=1 << 62, asks_ahead=True, ping_s=None)


@dataclass(frozen=True, kw_only=True)
class Message:
    """The record of what travels as ``get_properties``, as a client reads it."""

    op: Literal["join", "hello", "finish", "refuse", "ping"]
    run_id: Annotated[str, Meta(max_length=MOST_NAME)] = ""
    # Of ``join``: the challenge. Of ``hello``: the server's proof, and where to look for which nonce of its store.
    nonce: Digest | None = None
    proof: Digest | None = None
    store_root: str | None = None
    nonce_name: str = ""
    # Of ``finish`` and ``refuse``.
    outcome: Literal["complete", "stopped", "failed"] = "complete"
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Ask(Request):
    """The record of ``ask``, as a client reads it."""

    # SHA-256 and length of the state that the task starts from; None and 0 if it needs none.
    digest: Digest | None = None
    bytes: Count = 0
    # Of its file in the payload store, as the server wrote it.
    identity: Identity | None = None
    # For how many seconds the client may hold the question.
    hold_s: Annotated[float, Meta(ge=0, le=_MOST_HOLD_S)] = 0.0
    # Whether the task is to be cancelled if it has no answer yet.
    cancel: bool = False
    # What to begin next, from the same state.
    then: Request | None = None


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The record of ``push`` and ``pull``: which piece of which payload."""

    digest: Digest
    # Of ``push``: the length of the whole payload. Of ``pull``: the length of the piece.
    bytes: Count
    offset: Count


def pack(record: Mapping[str, Any]) -> dict[str, Any]:
    """Put a record into a Flower config, properties or metrics dictionary."""
    return {KEY: json.dumps({"schema": SCHEMA, **record})}


def unpack(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Take a record out of a Flower dictionary; raises RecordError if the other side speaks another protocol."""
    text = fields.get(KEY)
    if not isinstance(text, str):
        raise RecordError(f"{where} does not speak fedsplit: its message has no {KEY!r} record")
    return parse(text.encode(), where)


def ask_record(
    request: Request, *, digest: str | None, payload_bytes: int, hold_s: float, cancel: bool,
    then: Request | None = None, identity: Identity | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the record that asks for a task, and for another one that starts from the same state once it is done."""
    asked = {"digest": digest, "bytes": payload_bytes, "hold_s": hold_s, "cancel": cancel, "identity": identity}
    record = {"op": "ask", **_fields(request), **asked}
    return record if then is None else {**record, "then": _fields(then)}


def _fields(request: Request) -> dict[str, Any]:
    # Not copied to the last text, as `asdict` would, twice for each rank and round.
    return {**vars(request), "secure": request.secure and asdict(request.secure)}
