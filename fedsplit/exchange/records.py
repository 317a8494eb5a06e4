"""The small JSON records of the exchange: what is in them, and what a reader and a writer check.

Either side may be a newer version or another program. So unknown keys are ignored, another ``schema`` is refused, and
every field is checked before it is used. A writer checks its own record in the same way: what no reader would take is
an error where it was made. Nothing here opens a file.
"""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from msgspec import Meta, ValidationError, convert, to_builtins
from msgspec.json import Decoder

from fedsplit.disk.identity import Identity
from fedsplit.errors import RecordError, SchemaError

SCHEMA = "fedsplit/1"
# A record is small. The limit keeps a reader from being made to read for ever.
RECORD_BYTES = 4_000_000
_LIMIT = 2**63 - 1

Kind = Annotated[str, Meta(pattern=r"^(initialize|train|evaluate)\Z")]
# ``step``: what the other half of a model needs, and the task goes on. ``again``: this process did not do the steps
# before this one, or does not hold the state that the task's payload differs from.
Status = Annotated[str, Meta(pattern=r"^(ok|error|step|again)\Z")]
# What a metric may be, on the way from a trainer to the history: limits that a trainer meets at once, by name.
MOST_METRICS, MOST_NAME, MOST_TEXT = 1_000, 200, 10_000
Scalar = bool | Annotated[int, Meta(ge=-_LIMIT - 1, le=_LIMIT)] | float | Annotated[str, Meta(max_length=MOST_TEXT)]
Metrics = Annotated[Mapping[Annotated[str, Meta(max_length=MOST_NAME)], Scalar], Meta(max_length=MOST_METRICS)]
# As weights of a mean, numbers of examples must be exact in float64.
NumExamples = Annotated[int, Meta(ge=0, le=2**53)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Count = Annotated[int, Meta(ge=0, le=_LIMIT)]
Version = Annotated[int, Meta(ge=1, le=_LIMIT)]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
# Name to (dtype as torch names it, shape).
_Shape = Annotated[tuple[Annotated[int, Meta(ge=0, le=2**40)], ...], Meta(max_length=64)]
LocalEntries = Mapping[str, tuple[Annotated[str, Meta(max_length=20)], _Shape]]
Checked = TypeVar("Checked")

_looked_at: set[type] = set()
_looking = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class PayloadRecord:
    """A payload on the exchange: its file name there, its length, and the SHA-256 of its bytes in hex.

    The identity is that of the file that was digested. Without one, as from an older version, its reader does it again.
    """

    file: str
    # No payload is shorter than the length of its header.
    bytes: Annotated[int, Meta(ge=8, le=_LIMIT)]
    digest: Digest
    identity: Identity | None = None


@dataclass(frozen=True, kw_only=True)
class SecureTerms:
    """How the updates of a round are summed so that the server sees none of them; see `fedsplit.secure`."""

    # Which patterns of the split are summed so, and how far an entry of each may move in one round.
    ranges: Mapping[str, Annotated[float, Meta(gt=0)]]
    # As in `fedsplit.secure.protocol.Group`.
    threshold: Annotated[float, Meta(gt=0)]
    neighbours: Count = 0


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the server asks of a rank: everything about a task but its version and its payload."""

    run_id: str
    kind: Kind
    server_round: Count
    total_rounds: Count
    config: Mapping[str, Scalar] = field(default_factory=dict)
    # ``(pattern, local)`` in the order of the server's rules: a key whose first matching pattern is local never leaves
    # the trainer.
    split: tuple[tuple[str, bool], ...] = ()
    # Why the rank's last answer did not count; None if it did.
    refused: Annotated[str, Meta(max_length=MOST_TEXT)] | None = None
    # Of a task that is done in steps, with the other half of the model: how many were answered before this one. The
    # payload is then what the other half gave, but for step 0. None for a task that is answered once.
    step: Count | None = None
    # What the answer may travel as: the server's ``--wire``. Empty where payloads travel as they are.
    wire: tuple[Annotated[str, Meta(max_length=MOST_NAME)], ...] = ()
    # Of a training whose update is summed securely: step 0 is the training, the others are the stages after it.
    secure: SecureTerms | None = None


@dataclass(frozen=True, kw_only=True)
class TaskRecord(Request):
    """``task.json``: the newest request, under the version that its result must answer."""

    version: Version
    payload: PayloadRecord | None = None
    cancelled: bool = False

    def __post_init__(self) -> None:
        _check_name(self.payload, f"task-{self.version}.safetensors")

    @property
    def digest(self) -> str | None:
        """SHA-256 of the state that the task starts from; None if it needs none."""
        return self.payload.digest if self.payload else None


@dataclass(frozen=True, kw_only=True)
class ResultRecord:
    """``result.json``: the answer to exactly one version."""

    version: Version
    run_id: str
    kind: Kind
    server_round: Count
    status: Status
    step: Count | None = None
    payload: PayloadRecord | None = None
    num_examples: NumExamples = 0
    loss: float | None = None
    metrics: Metrics = field(default_factory=dict)
    # Of ``initialize``: the entries that stay with the trainer, so that the server can show and check the split.
    local_entries: LocalEntries = field(default_factory=dict)
    error: Mapping[str, str] | None = None
    seconds: Seconds = 0.0
    # SHA-256 of the state that the trainer holds: the next task's payload need not be more than what differs from it.
    holds: Digest | None = None

    def __post_init__(self) -> None:
        _check_name(self.payload, f"result-{self.version}.safetensors")


@dataclass(frozen=True, kw_only=True)
class FinishedRecord:
    """``finished.json``: the run is over. ``outcome`` is ``complete``, ``stopped`` or ``failed``."""

    version: Version
    run_id: str
    outcome: str = "complete"
    reason: str = ""


Record = TaskRecord | ResultRecord | FinishedRecord
AnyRecord = TypeVar("AnyRecord", TaskRecord, ResultRecord, FinishedRecord)


def encode(record: Record, where: str) -> bytes:
    """Return the text of a record; raises RecordError if no reader would take it."""
    fields = to_builtins(record)
    read(fields, type(record), where)
    text = json.dumps({"schema": SCHEMA, **fields}).encode()
    if len(text) > RECORD_BYTES:
        raise RecordError(
            f"{where} would have {len(text):,} bytes, at most {RECORD_BYTES:,} are allowed; shorten the texts in it"
        )
    return text


def decode(text: bytes, kind: type[AnyRecord], where: str) -> AnyRecord:
    """Read a record from its text; raises RecordError."""
    return read(parse(text, where), kind, where)


def parse(text: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; raises RecordError if it is none, and SchemaError, naming both, if its schema is another."""
    if len(text) > RECORD_BYTES:
        raise RecordError(f"{where} has {len(text):,} bytes, at most {RECORD_BYTES:,} are allowed")
    try:
        # Decoded here, because json would also take UTF-16 and lone surrogates. Python's json and not msgspec's: a loss
        # that is NaN or infinite is written as such, and must be read again.
        fields = json.loads(text.decode())
    except (ValueError, RecursionError) as exc:
        raise RecordError(f"{where} is not JSON ({exc})") from exc
    if not isinstance(fields, dict):
        raise RecordError(f"{where} holds a JSON {type(fields).__name__}, expected an object")
    if fields.get("schema") != SCHEMA:
        raise SchemaError(
            f"{where} has schema {printable(repr(fields.get('schema')), 100)}, this version of fedsplit reads "
            f"{SCHEMA!r}; use the same version of fedsplit on both sides"
        )
    return fields


def read(fields: Mapping[str, Any], kind: type[Checked], where: str) -> Checked:
    """Check parsed fields and make them one of the types here; raises RecordError that names the field."""
    if kind not in _looked_at:
        # msgspec looks at the fields of a type once; a second thread that finds it half done ends the process.
        with _looking:
            Decoder(kind)
            _looked_at.add(kind)
    try:
        return convert(fields, kind)
    except ValidationError as exc:
        # It quotes what was found, whatever that is; the path is at its end.
        problem, found, path = str(exc).rpartition(" - at `$.")
        said = f"{path.rstrip('`')}: {printable(problem, 300)}" if found else printable(path, 300)
        raise RecordError(f"{where}: {said}") from exc
    except UnicodeError as exc:
        raise RecordError(f"{where} has a key that is no text ({exc})") from exc


def scalars(values: Mapping[str, Any], where: str) -> dict[str, Scalar]:
    """Return a mapping as plain bool, int, float and str; raises RecordError naming the key of anything else."""
    if len(values) > MOST_METRICS:
        raise RecordError(f"{where}: {len(values):,} are given, at most {MOST_METRICS:,} are allowed")
    found: dict[str, Scalar] = {}
    for key, value in values.items():
        kind = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)
        if kind is None or not isinstance(key, str):
            raise RecordError(f"{where}: {key!r} is a {type(value).__name__}, expected bool, int, float or str")
        if len(key) > MOST_NAME:
            name = f"the name {key[:20]!r}… has {len(key):,} characters"
            raise RecordError(f"{where}: {name}, at most {MOST_NAME} are allowed")
        try:
            found[key] = convert(kind(value), Scalar)
        except ValidationError as exc:
            raise RecordError(f"{where}: {key!r} cannot be sent: {exc}") from exc
    return found


def printable(text: str, most: int = 2_000, *, lines: bool = False) -> str:
    """Return a text of somebody else's as it may be shown: at most so many characters, and none that a terminal obeys.

    Line breaks and tabs stay if `lines` is set; else they are escaped like all that does not print.
    """
    cut = text if len(text) <= most else text[:most] + "…"
    if cut.isprintable():
        return cut
    kept = "\n\t" if lines else ""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in cut)


def _check_name(payload: PayloadRecord | None, expected: str) -> None:
    # The only name that goes with this version. So a record can never lead a reader out of the directory, nor to the
    # state of another task.
    if payload and payload.file != expected:
        raise ValueError(f"the payload is called {payload.file!r}, expected {expected!r}")
