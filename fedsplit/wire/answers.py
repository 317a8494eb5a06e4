"""The gate: what a client says, as typed and bounded records, before anything else of the server sees it.

A client may be wrong or hostile. What does not have the form that is written here is a `RecordError` that names the
field, and costs that client its part in the round. Texts are cut and shown without anything that a terminal obeys.
What a state holds is checked where it is read (`fedsplit.server.strategy`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from fedsplit.disk.identity import Identity
from fedsplit.exchange import records
from fedsplit.exchange.records import Count, Digest, LocalEntries, Metrics, NumExamples, Scalar, Seconds, printable

Rank = Annotated[int, Meta(ge=1, le=2**31 - 1)]
WaitingFor = Literal["trainer", "space"] | None
ExchangeId = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
# What a client says of itself in a text of its own; a traceback is the longest.
_MESSAGE, _TRACEBACK = 2_000, 50_000


@dataclass(frozen=True, kw_only=True)
class Said:
    """What any answer may have: ``error``, a mapping with ``type``, ``message`` and ``traceback``."""

    error: Mapping[str, str] = field(default_factory=dict)

    @property
    def failure(self) -> str | None:
        """The error in one line; None without one."""
        kind, message = self.error.get("type"), self.error.get("message", "")
        return printable(f"{kind}: {message}" if kind else message, _MESSAGE) or None

    @property
    def traceback(self) -> str:
        """The trainer's traceback; empty without one."""
        return printable(self.error.get("traceback", ""), _TRACEBACK, lines=True)


@dataclass(frozen=True, kw_only=True)
class Joined(Said):
    """The answer to ``join``: a challenge back, and the proof; without a ``proof`` the client has no token."""

    rank: Rank
    exchange_id: ExchangeId | None = None
    nonce: Digest | None = None
    proof: Digest | None = None


@dataclass(frozen=True, kw_only=True)
class Greeted(Said):
    """The answer to ``hello``: who it is, what its exchange directory holds, what it read in the payload store."""

    rank: Rank
    exchange_id: ExchangeId | None = None
    held: Digest | None = None
    nonce: Annotated[str, Meta(max_length=200)] | None = None
    leaving: str | None = None


@dataclass(frozen=True, kw_only=True)
class Taken(Said):
    """The answer to ``push``: how many bytes of the state are there, and whether the rest waits for space."""

    have: Count = 0
    waiting_for: WaitingFor = None


@dataclass(frozen=True, kw_only=True)
class Told(Said):
    """The answer to ``finish``, ``refuse`` and ``ping``."""


@dataclass(frozen=True, kw_only=True)
class ResultPayload:
    """Where the state of a result is: in the payload store, in this message, or to be pulled."""

    digest: Digest
    bytes: Annotated[int, Meta(ge=8, le=2**63 - 1)]
    via: Literal["store", "inline", "pull"]
    # Of the file in the store, as its trainer gave it.
    identity: Identity | None = None


@dataclass(frozen=True, kw_only=True)
class Answer(Said):
    """The answer to ``ask``."""

    # ``step`` and ``again``: see `fedsplit.exchange.records`.
    status: Literal["ok", "error", "step", "again", "working", "cancelled", "need"]
    num_examples: NumExamples = 0
    loss: float | None = None
    metrics: Metrics = field(default_factory=dict)
    seconds: Seconds = 0.0
    payload: ResultPayload | None = None
    local_entries: LocalEntries = field(default_factory=dict)
    # The state that its trainer holds, which the next one may be sent as a difference from.
    holds: Digest | None = None
    # Of a task that is ``working``: who is missing.
    waiting_for: WaitingFor = None
    # How the task that was asked for next ended, and for how long the answer was held for it.
    then: Answer | None = None
    # Of a step: how long it was with the client, and of that in the exchange directory or with the trainer.
    held_s: Seconds = 0.0
    handed_s: Seconds = 0.0

    @property
    def failure(self) -> str | None:
        return super().failure or "an error" if self.status == "error" else None

    @property
    def shown_metrics(self) -> dict[str, Scalar]:
        """The metrics, with names and texts that can be shown."""
        return {
            printable(name, records.MOST_NAME): printable(value, records.MOST_TEXT) if isinstance(value, str) else value
            for name, value in self.metrics.items()
        }
