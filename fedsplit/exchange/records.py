"""The small JSON records of the exchange: what is in them, and how a reader checks them.

Both sides read what the other wrote, and either may be a newer version or another program: unknown keys are ignored, a
``schema`` other than ours is refused, and every field that is used is checked for its type. Nothing here opens a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import UnionType
from typing import Any, Literal, get_args

from fedsplit.errors import RecordError, SchemaError

SCHEMA = "fedsplit/1"
Kind = Literal["initialize", "train", "evaluate"]
KINDS: tuple[str, ...] = get_args(Kind)
Scalar = bool | int | float | str

_DIGEST = re.compile(r"[0-9a-f]{64}")
_LIMIT = 2**63


@dataclass(frozen=True, kw_only=True)
class PayloadRecord:
    """A payload on the exchange: its file name there, its length, and the SHA-256 of its bytes in hex."""

    file: str
    bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the server asks of a rank: everything about a task but its version and its payload.

    Attributes
    ----------
    split
        ``(pattern, local)`` in the order of the server's rules: a key whose first matching pattern is local never
        leaves the trainer.
    """

    run_id: str
    kind: str
    server_round: int
    total_rounds: int
    config: Mapping[str, Scalar] = field(default_factory=dict)
    split: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """``task.json``: the newest request, under the version that its result must answer."""

    version: int
    request: Request
    payload: PayloadRecord | None
    cancelled: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the record as it stands in the file."""
        return {"schema": SCHEMA, "version": self.version, **asdict(self.request),
                "payload": asdict(self.payload) if self.payload else None, "cancelled": self.cancelled}  # fmt: skip

    @classmethod
    def from_json(cls, record: dict[str, Any], where: str) -> TaskRecord:
        """Check a record and read it; raises RecordError."""
        return cls(
            version=_version(record, where),
            request=request_from_json(record, where),
            payload=_payload(record, where, "task"),
            cancelled=_get(record, "cancelled", bool, where, False),
        )


@dataclass(frozen=True, kw_only=True)
class ResultRecord:
    """``result.json``: the answer to exactly one version."""

    version: int
    run_id: str
    kind: str
    server_round: int
    status: str
    payload: PayloadRecord | None = None
    num_examples: int = 0
    loss: float | None = None
    metrics: Mapping[str, Scalar] = field(default_factory=dict)
    error: Mapping[str, str] | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the record as it stands in the file."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, record: dict[str, Any], where: str) -> ResultRecord:
        """Check a record and read it; raises RecordError."""
        status = _get(record, "status", str, where)
        if status not in ("ok", "error"):
            raise RecordError(f"{where}: status is {status!r}, expected 'ok' or 'error'")
        loss = _get(record, "loss", int | float | None, where, None)
        error = _get(record, "error", dict | None, where, None)
        return cls(
            version=_version(record, where),
            run_id=_get(record, "run_id", str, where),
            kind=_kind(record, where),
            server_round=_count(record, "server_round", where),
            status=status,
            payload=_payload(record, where, "result"),
            num_examples=_count(record, "num_examples", where, 0),
            loss=None if loss is None else float(loss),
            metrics=scalars(_get(record, "metrics", dict, where, {}), f"{where}: metrics"),
            error=None if error is None else _texts(error, f"{where}: error"),
            seconds=float(_get(record, "seconds", int | float, where, 0.0)),
        )


@dataclass(frozen=True, kw_only=True)
class FinishedRecord:
    """``finished.json``: the run is over. ``outcome`` is ``complete``, ``stopped`` or ``failed``."""

    version: int
    run_id: str
    outcome: str
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the record as it stands in the file."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, record: dict[str, Any], where: str) -> FinishedRecord:
        """Check a record and read it; raises RecordError."""
        return cls(
            version=_version(record, where),
            run_id=_get(record, "run_id", str, where),
            outcome=_get(record, "outcome", str, where, "complete"),
            reason=_get(record, "reason", str, where, ""),
        )


def loads(text: bytes, where: str) -> dict[str, Any]:
    """Parse a record and check its schema.

    Raises
    ------
    RecordError
        If it is not a JSON object, or of another schema; names both schemas.
    """
    try:
        # Decoded here: given bytes, json would also take UTF-16 and lone surrogates.
        record = json.loads(text.decode())
    except (ValueError, RecursionError) as exc:
        raise RecordError(f"{where} is not JSON ({exc})") from exc
    if not isinstance(record, dict):
        raise RecordError(f"{where} holds a JSON {type(record).__name__}, expected an object")
    if record.get("schema") != SCHEMA:
        raise SchemaError(
            f"{where} has schema {record.get('schema')!r}, this version of fedsplit reads {SCHEMA!r}; "
            "use the same version of fedsplit on both sides"
        )
    return record


def request_from_json(record: dict[str, Any], where: str) -> Request:
    """Read the part of a record that says what is asked; raises RecordError."""
    split = _get(record, "split", list, where, [])
    if not all(
        isinstance(row, list) and len(row) == 2 and type(row[0]) is str and type(row[1]) is bool for row in split
    ):
        raise RecordError(f"{where}: split must be a list of [pattern, local]")
    return Request(
        run_id=_get(record, "run_id", str, where),
        kind=_kind(record, where),
        server_round=_count(record, "server_round", where),
        total_rounds=_count(record, "total_rounds", where),
        config=scalars(_get(record, "config", dict, where, {}), f"{where}: config"),
        split=tuple((pattern, local) for pattern, local in split),
    )


def scalars(values: Mapping[str, Any], where: str) -> dict[str, Scalar]:
    """Check that a mapping holds only bool, int, float and str; raises RecordError naming the key."""
    for key, value in values.items():
        if not isinstance(key, str) or not isinstance(value, bool | int | float | str):
            raise RecordError(f"{where}: {key!r} is a {type(value).__name__}, expected bool, int, float or str")
    return dict(values)


def is_digest(text: object) -> bool:
    """Tell whether this is a SHA-256 in lower-case hex: the only file name that a payload store opens."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def _get(record: dict[str, Any], key: str, kind: type | UnionType, where: str, default: Any = ...) -> Any:
    value = record.get(key, default)
    if value is ...:
        raise RecordError(f"{where} lacks {key!r}")
    # bool is an int to isinstance, and never what a counter should be.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RecordError(f"{where}: {key!r} is a {type(value).__name__}, expected {getattr(kind, '__name__', kind)}")
    if isinstance(value, int) and not -_LIMIT <= value < _LIMIT:
        raise RecordError(f"{where}: {key!r} does not fit 64 bits")
    return value


def _count(record: dict[str, Any], key: str, where: str, default: Any = ...) -> int:
    value: int = _get(record, key, int, where, default)
    if value < 0:
        raise RecordError(f"{where}: {key!r} is {value}, expected 0 or more")
    return value


def _texts(values: dict[str, Any], where: str) -> dict[str, str]:
    for key, value in values.items():
        if not isinstance(value, str):
            raise RecordError(f"{where}: {key!r} is a {type(value).__name__}, expected str")
    return values


def _version(record: dict[str, Any], where: str) -> int:
    version: int = _get(record, "version", int, where)
    if version < 1:
        raise RecordError(f"{where}: version is {version}, expected 1 or more")
    return version


def _kind(record: dict[str, Any], where: str) -> str:
    kind: str = _get(record, "kind", str, where)
    if kind not in KINDS:
        raise RecordError(f"{where}: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    return kind


def _payload(record: dict[str, Any], where: str, of: Literal["task", "result"]) -> PayloadRecord | None:
    fields = _get(record, "payload", dict | None, where, None)
    if fields is None:
        return None
    payload = PayloadRecord(
        file=_get(fields, "file", str, f"{where}: payload"),
        bytes=_get(fields, "bytes", int, f"{where}: payload"),
        digest=_get(fields, "digest", str, f"{where}: payload"),
    )
    # The only name that goes with this version: a record can never lead a reader out of the directory, nor to the
    # state of another task.
    if payload.file != (expected := f"{of}-{_version(record, where)}.safetensors"):
        raise RecordError(f"{where}: the payload is called {payload.file!r}, expected {expected!r}")
    if payload.bytes < 8 or not is_digest(payload.digest):
        raise RecordError(f"{where}: payload has no valid length and digest")
    return payload
