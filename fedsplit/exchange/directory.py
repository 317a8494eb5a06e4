"""The exchange directory: how a client and the trainer of its rank hand state to each other.

One directory a rank, ``<exchange_dir>/rank-<k>/``; this module owns every path in it. The protocol:

- ``client.lock`` and ``trainer.lock`` are held for life. The kernel drops a lock the moment its owner dies and never
  before, so a lock, and nothing else, says who is alive.
- A task or result is a payload file, written first, and a small record naming it, renamed into place last. ``version``
  only grows, across restarts of either side, and a result answers exactly one version.
- A payload file is never overwritten, so a reader may map it. It is removed once the other side has moved on; its
  memory is used again only when nobody has it open or mapped (`fedsplit.disk.spares`).
- A record is believed when its payload has the stated length and its header parses; else it is not there yet.

Not promised: that a hand-off survives the death of the machine (nothing is fsynced; a lost one is simply redone), and
any order by time stamps (there are none).
"""

import errno
import fcntl
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

from filelock import FileLock, Timeout

from fedsplit.disk import files, turn
from fedsplit.disk.digest import file_digest
from fedsplit.disk.identity import Identity, Verify, identity_of
from fedsplit.disk.spares import Spares
from fedsplit.errors import DirectoryLostError, ExchangeError, RecordError, RoleTakenError, SchemaError, UsageError
from fedsplit.exchange import records
from fedsplit.exchange.records import AnyRecord, FinishedRecord, PayloadRecord, Record, ResultRecord, TaskRecord
from fedsplit.states.header import read_header

log = logging.getLogger("fedsplit")

Role = Literal["client", "trainer"]
# A rank, or the upper part of a model that is cut.
Place = int | Literal["upper"]
Found = TypeVar("Found")

_LOCK_POLL_S = 0.001
_HANDOFF_SAY_S, _HANDOFF_TIMEOUT_S = 2.0, 30.0
_LEAST_SPACE_BYTES = 1_000_000
_PAYLOAD_NAME = re.compile(r"(task|result)-([1-9][0-9]{0,18})\.safetensors")
_EXCHANGE_ID = re.compile(rb"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a role, or was the last to hold it. For messages only: the lock itself says who is alive."""

    pid: int
    host: str
    started: str

    def __str__(self) -> str:
        stopped = ", stopped by a signal" if self.is_stopped else ""
        return f"process {self.pid} on {self.host}, started {self.started}{stopped}"

    @property
    def is_stopped(self) -> bool:
        """Whether it is a process of this machine that SIGSTOP or a debugger has stopped; Linux only."""
        if self.host != socket.gethostname():
            return False
        try:
            status = Path(f"/proc/{self.pid}/stat").read_bytes()
        except OSError:
            return False
        return status.rpartition(b") ")[2][:1] in (b"T", b"t")


class Exchange:
    """Paths, locks and records of ``<exchange_dir>/rank-<rank>/``; a rank is a positive integer.

    Or of ``<exchange_dir>/upper/``, where the server is the client, and the upper part of a model has its trainer. With
    `verify` at ``always`` no payload's identity is given or believed (`fedsplit.disk.identity`).
    """

    def __init__(self, exchange_dir: Path | str, rank: Place, verify: Verify = "auto") -> None:
        if rank != "upper" and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise UsageError(f"the rank must be a positive integer, not {rank!r}")
        self.rank = 0 if rank == "upper" else rank
        self.verify = verify
        self.trusts = verify == "auto"
        # Whose directory it is, for messages.
        self.who = "the upper part" if rank == "upper" else f"rank {rank}"
        self.directory = Path(exchange_dir) / place_name(rank)
        self.task_path = self.directory / "task.json"
        self.result_path = self.directory / "result.json"
        self.finished_path = self.directory / "finished.json"
        self.left_path = self.directory / "left.json"
        self.fetched_path = self.directory / "fetched.safetensors"
        self.exchange_id_path = self.directory / "exchange-id"
        self._handoff_path = self.directory / "handoff.lock"
        self._in_turn = threading.local()
        self._parsed: dict[Path, tuple[bytes, Record]] = {}
        self._own_lock: tuple[Path, os.stat_result] | None = None

    def payload_path(self, of: Literal["task", "result"], version: int) -> Path:
        """Return the path of the payload of a version."""
        return self.directory / f"{of}-{version}.safetensors"

    def lock_path(self, role: Role) -> Path:
        """Return the path of a role's lock."""
        return self.directory / f"{role}.lock"

    # -- roles ---------------------------------------------------------------------------------------------------

    @contextmanager
    def hold(self, role: Role) -> Iterator[None]:
        """Make the directory and hold a role of it for the length of the block; raises RoleTakenError."""
        files.make_private_directory(self.directory)
        files.check_space(self.directory, _LEAST_SPACE_BYTES)
        path, lock = self.lock_path(role), self.lock_of(role)
        with ExitStack() as stack:
            with self.handoff():
                if not _take(lock, 0.0):
                    raise RoleTakenError(
                        f"{self.who} already has a {role}: {self.owner(role)} holds {path}; "
                        "stop that one, or take another rank or --exchange-dir"
                    )
                stack.callback(lock.release)
                self._own_lock = (path, path.stat())
                stack.callback(setattr, self, "_own_lock", None)
                me = Owner(pid=os.getpid(), host=socket.gethostname(), started=time.strftime("%Y-%m-%d %H:%M:%S"))
                files.overwrite_in_place(path, json.dumps(asdict(me)))
            # Half-written files of a dead predecessor, and spare ones. Nobody else writes these while the lock is held.
            self._clean(role)
            stack.callback(self._clean, role)
            yield

    def _clean(self, role: Role) -> None:
        mine = ("task", "finished", "exchange-id", "fetched") if role == "client" else ("result", "left")
        for written in mine:
            files.remove_leftovers(self.directory, written)

    def is_held(self, role: Role) -> bool:
        """Tell whether a live process holds a role.

        The probe takes the role's lock for a moment. It does so under the hand-off lock, which a starting process takes
        too, so a probe never makes a starting process fail.
        """
        if not self.directory.is_dir():
            self.check_is_there()
            return False
        with self.handoff(), files.explained(self.lock_path(role), "lock"):
            return _is_locked(self.lock_path(role))

    def is_near(self, role: Role) -> bool:
        """Tell whether who holds a role, or was the last to, is on this machine."""
        owner = self.owner(role)
        return owner is not None and owner.host == socket.gethostname()

    def owner(self, role: Role) -> Owner | None:
        """Return the process that last wrote its name into a role's lock, or None."""
        try:
            found = json.loads(self._read(self.lock_path(role)) or b"")
            return Owner(pid=int(found["pid"]), host=str(found["host"]), started=str(found["started"]))
        except (RecordError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return None

    @contextmanager
    def handoff(self) -> Iterator[None]:
        """Hold the lock that guards reading and bumping the counters; for microseconds only."""
        if getattr(self._in_turn, "now", False):
            yield
            return
        self.check_is_there()
        with files.explained(self._handoff_path, "lock"):
            if (lock := turn.take(self._handoff_path, _HANDOFF_SAY_S)) is None:
                log.warning("%s; waiting", self._describe_wait(_HANDOFF_SAY_S))
                lock = turn.take(self._handoff_path, _HANDOFF_TIMEOUT_S - _HANDOFF_SAY_S)
        if lock is None:
            raise ExchangeError(f"{self._describe_wait(_HANDOFF_TIMEOUT_S)}; continue or end it")
        try:
            self._in_turn.now = True
            yield
        finally:
            self._in_turn.now = False
            turn.give_up(lock)

    def check_is_there(self) -> None:
        """Raise DirectoryLostError if the directory of the role that this process holds is no longer at its path."""
        if self._own_lock is None:
            return
        path, mine = self._own_lock
        with suppress(OSError):
            if os.path.samestat(path.stat(), mine):
                return
        raise DirectoryLostError(
            f"{self.directory} was removed or replaced while it was in use; start the client and the trainer of "
            f"{self.who} again"
        )

    def _describe_wait(self, seconds: float) -> str:
        owners = [(role, self.owner(role)) for role in get_args(Role)]
        others = [(role, owner) for role, owner in owners if owner and owner.pid != os.getpid()]
        stopped = [(role, owner) for role, owner in others if owner.is_stopped]
        who = " or ".join(f"the {role} ({owner})" for role, owner in stopped or others)
        return f"{self._handoff_path} has been held for {seconds:.0f} s, by {who or 'another process'}"

    # -- records -------------------------------------------------------------------------------------------------

    def read_task(self) -> TaskRecord | None:
        """Return the newest task, or None; raises RecordError if it cannot be believed."""
        return self._record(self.task_path, TaskRecord)

    def read_result(self) -> ResultRecord | None:
        """Return the newest result, or None; raises RecordError if it cannot be believed."""
        return self._record(self.result_path, ResultRecord)

    def read_finished(self) -> FinishedRecord | None:
        """Return the newest end of a run, or None; raises RecordError if it cannot be believed."""
        return self._record(self.finished_path, FinishedRecord)

    def read_left(self) -> FinishedRecord | None:
        """Return the end of a run that a trainer has seen and left for, or None; raises RecordError."""
        return self._record(self.left_path, FinishedRecord)

    def write(self, path: Path, record: Record) -> None:
        """Put a record into place; raises RecordError, and writes nothing, if no reader would take it."""
        files.write_chunks(path, [records.encode(record, str(path))])

    def exchange_id(self) -> str:
        """Return this directory's id, which no other one has; the client makes it. By it the server knows it again."""
        text = forgive(lambda: self._read(self.exchange_id_path)) or b""
        if not _EXCHANGE_ID.fullmatch(text):
            text = uuid.uuid4().hex.encode()
            files.write_chunks(self.exchange_id_path, [text])
        return text.decode()

    def check_payload(self, payload: PayloadRecord) -> Path:
        """Return the path of a payload if its length matches and its header parses; else raises RecordError."""
        path = self.directory / payload.file
        read_header(path, payload.bytes)
        return path

    def identity(self, path: Path) -> Identity | None:
        """Return the identity of a payload file that is there; None if it has none, or none is believed."""
        with files.explained(path, "read the payload", RecordError):
            return identity_of(path.lstat()) if self.trusts else None

    def check_digest(self, payload: PayloadRecord) -> None:
        """Read all bytes of a payload; raises RecordError if they have another digest than its record says."""
        path = self.directory / payload.file
        with files.explained(path, "read the payload", RecordError):
            found = file_digest(path)
        if found != payload.digest:
            raise RecordError(f"{path} has digest {found[:12]}…, its record says {payload.digest[:12]}…")

    def payload_versions(self, of: Literal["task", "result"]) -> list[int]:
        """Return the versions of which a payload file is there."""
        with files.explained(self.directory, "list"):
            matches = map(_PAYLOAD_NAME.fullmatch, os.listdir(self.directory))  # noqa: PTH208  (several times a task)
        return sorted(int(match[2]) for match in matches if match and match[1] == of)

    def remove_payloads(self, of: Literal["task", "result"], *, below: int, spares: Spares | None = None) -> None:
        """Remove the payload files of lower versions, once the other side has moved on; their writer gives `spares`."""
        for version in self.payload_versions(of):
            if version < below:
                path = self.payload_path(of, version)
                files.retire(path, spares) if spares else files.remove(path)

    def _record(self, path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
        text = self._read(path)
        if text is None:
            return None
        # Each record is read several times before the next one comes: the same text is not parsed twice.
        known = self._parsed.get(path)
        if known and known[0] == text and isinstance(known[1], kind):
            return known[1]
        try:
            record = records.decode(text, kind, str(path))
        except SchemaError as exc:
            raise SchemaError(f"{exc}; if an earlier version left that file there, remove it") from exc
        self._parsed[path] = (text, record)
        return record

    def lock_of(self, name: str) -> FileLock:
        """Return a lock of this directory that is not held yet."""
        # A soft lock, the library's fallback where flock is missing, would outlive its owner.
        return FileLock(self.directory / f"{name}.lock", fallback_to_soft=False, mode=0o600, poll_interval=_LOCK_POLL_S)

    @staticmethod
    def _read(path: Path) -> bytes | None:
        try:
            text = files.read_regular(path, records.RECORD_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError:
            with files.explained(path, "read the record", RecordError):
                raise
        if len(text) > records.RECORD_BYTES:
            raise RecordError(f"{path} is over {records.RECORD_BYTES:,} bytes; a record is small")
        return text


def place_name(rank: Place) -> str:
    """Return what the directories of a rank are called, or those of the upper part."""
    return "upper" if rank == "upper" else f"rank-{rank}"


def forgive(read: Callable[[], Found | None]) -> Found | None:
    """Read a record that can be written again, or that is past: one that cannot be believed counts as missing.

    SchemaError is raised all the same: writing a record again does not make both sides the same version.
    """
    try:
        return read()
    except SchemaError:
        raise
    except RecordError as exc:
        log.warning("%s; taken as not there", exc)
        return None


def _is_locked(path: Path) -> bool:
    # Opened for reading only: to close what could be written to would wake whoever waits for the owner to close it.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return True
    finally:
        os.close(descriptor)
    return False


def _take(lock: FileLock, timeout_s: float) -> bool:
    with files.explained(Path(lock.lock_file), "lock"):
        try:
            lock.acquire(timeout=timeout_s)
        except Timeout:
            return False
        except NotImplementedError as exc:  # there is no flock here
            raise OSError(str(exc)) from exc
    return True
