"""What server and client say to each other: JSON records inside Flower's own messages.

============  ====================  ==============================================================================
operation     travels as            meaning
============  ====================  ==============================================================================
``join``      ``get_properties``    only with a join token: a challenge. Answered with the rank, a challenge back and
                                    the client's proof; the server's own proof comes with ``hello``. Before that
                                    neither side does anything for the other (see `fedsplit.wire.join`)
``hello``     ``get_properties``    who are you? The rank, the exchange directory's id, the state held there, and
                                    whether the server's payload store can be seen (proved by reading back a nonce)
``ask``       ``fit`` for           do this task. Answered within ``hold_s`` seconds, with the result or with
              ``initialize`` and    ``working``; asked again until it is done. So a dead link is noticed, the server
              ``train``,            can stop or cancel at any time, and an hour of training is no hour of silence.
              ``evaluate``          With ``then``, another task of the same state is begun once it is done, and as
                                    much of it answered along with it as there is (through ``fit``)
``push``      ``fit``               a piece of the state that the next ``ask`` names. Answered with how many bytes of it
                                    are there: what was lost with a connection goes on from where it stopped
``pull``      ``get_parameters``    send a piece of a result's payload, when the merge has come to it
``finish``    ``get_properties``    the run is over; tell the trainer
``refuse``    ``get_properties``    you cannot take part, and why
``ping``      ``get_properties``    are you still there? Asked when there was nothing else to ask for a while
============  ====================  ==============================================================================

Each record stands as a string under the key ``fedsplit`` of Flower's ``config``, ``properties`` or ``metrics``. The
bytes of a state travel in Flower's ``Parameters``, and only when the other side does not hold them: a small safetensors
blob along with the question, a large one in pieces, so that neither its size nor Flower's many copies of a message are
a limit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedsplit.errors import RecordError
from fedsplit.exchange.records import SCHEMA, Request, loads

KEY = "fedsplit"
TENSOR_TYPE = "safetensors"

# Flower's default, and what gRPC can do at most.
MAX_MESSAGE_BYTES = 2**31 - 1
# The slowest link that is waited for, beyond the half minute that every question has.
BYTES_PER_S = 1_000_000.0


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How an engine of Flower's wants to be spoken through.

    Attributes
    ----------
    hold_s : float
        Seconds that a client holds an unanswered question.
    piece_bytes : int
        States and results up to this size go along with a question; larger ones in pieces of this size before or after
        it.
    asks_ahead : bool
        Whether the training of the next round is asked for along with an evaluation, because a question is dear.
    ping_s : float or None
        Seconds of silence after which a client is asked whether it is still there; None if the engine sees to that.
    """

    name: str
    hold_s: float
    piece_bytes: int
    asks_ahead: bool
    ping_s: float | None


# A second costs nothing, since a question takes a millisecond; and a run that is stopped stops at once.
# Of a piece there are half a dozen copies on its way through Flower; smaller ones would spend their time on the way.
EMBEDDED = Engine(name="embedded", hold_s=1.0, piece_bytes=1 << 22, asks_ahead=False, ping_s=10.0)
# A question starts a process and is found by polls of seconds: most tasks should take one. Not for ever, or nobody
# could tell a trainer in the middle of a task that the run was stopped. Flower cuts its messages into pieces itself.
SUPERLINK = Engine(name="superlink", hold_s=20.0, piece_bytes=1 << 62, asks_ahead=True, ping_s=None)


def pack(record: Mapping[str, Any]) -> dict[str, Any]:
    """Put a record into a Flower config, properties or metrics dictionary."""
    return {KEY: json.dumps({"schema": SCHEMA, **record})}


def unpack(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Take a record out of a Flower dictionary.

    Raises
    ------
    RecordError
        If the other side does not speak this protocol, or another version of it.
    """
    text = fields.get(KEY)
    if not isinstance(text, str):
        raise RecordError(f"{where} does not speak fedsplit: its message has no {KEY!r} record")
    return loads(text.encode(), where)


def ask_record(
    request: Request,
    *,
    digest: str | None,
    payload_bytes: int,
    hold_s: float,
    cancel: bool,
    then: Request | None = None,
) -> dict[str, Any]:
    """Return the record that asks for a task, and for another one that starts from the same state once it is done."""
    record = {
        "op": "ask",
        **asdict(request),
        "digest": digest,
        "bytes": payload_bytes,
        "hold_s": hold_s,
        "cancel": cancel,
    }
    return record if then is None else {**record, "then": asdict(then)}
