"""What server and client say to each other: JSON records inside Flower's own messages.

============  ====================  ==============================================================================
operation     travels as            meaning
============  ====================  ==============================================================================
``hello``     ``get_properties``    who are you? The rank, the exchange directory's id, the state held there, and
                                    whether the server's payload store can be seen (proved by reading back a nonce)
``ask``       ``fit`` for           do this task. Answered within ``hold_s`` seconds, with the result or with
              ``initialize`` and    ``working``; asked again until it is done. So a dead link is noticed, the server
              ``train``,            can stop or cancel at any time, and an hour of training is no hour of silence
              ``evaluate``
``pull``      ``get_parameters``    send the payload of a result, when the merge has come to it
``finish``    ``get_properties``    the run is over; tell the trainer
``refuse``    ``get_properties``    you cannot take part, and why
``ping``      ``get_properties``    are you still there?
============  ====================  ==============================================================================

Each record stands as a string under the key ``fedsplit`` of Flower's ``config``, ``properties`` or ``metrics``. The bytes
of a state travel in Flower's ``Parameters`` as one safetensors blob, and only when the other side does not hold them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fedsplit.errors import RecordError
from fedsplit.records import SCHEMA, Request, loads

KEY = "fedsplit"
TENSOR_TYPE = "safetensors"

# Results and states up to this size go along with the message; larger ones wait until they are wanted.
INLINE_BYTES = 1 << 20
# How long a client holds an unanswered question: long enough to cost nothing, short enough to stop a run at once.
HOLD_S = 1.0
# Flower's default, and what gRPC can do at most.
MAX_MESSAGE_BYTES = 2**31 - 1


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


def ask_record(request: Request, *, digest: str | None, payload_bytes: int, hold_s: float, cancel: bool) -> dict[str, Any]:
    """Return the record that asks for a task."""
    return {"op": "ask", **asdict(request), "digest": digest, "bytes": payload_bytes, "hold_s": hold_s, "cancel": cancel}
