"""The two sides of the hand-off: what a client and what a trainer may do in an exchange directory.

``ClientSide`` offers tasks and takes results, ``TrainerSide`` takes tasks and answers them. Each assumes that its own
role's lock is held, so there is one writer of ``task.json`` and one of ``result.json``.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from fedsplit.disk.files import (
    Buffer,
    check_space,
    link_or_copy,
    open_regular,
    remove,
    write_chunks,
    write_hashed,
    write_json,
)  # fmt: skip
from fedsplit.errors import RecordError, SchemaError
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import FinishedRecord, PayloadRecord, Request, ResultRecord, Scalar, TaskRecord

log = logging.getLogger("fedsplit")
Record = TypeVar("Record")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a task's payload comes from: bytes that were received, or a finished file to link."""

    digest: str
    bytes: int
    content: Buffer | Path


class ClientSide:
    """What the client does in the exchange.

    Parameters
    ----------
    exchange
        The directory; the caller holds its client role.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._highest = 0
        self._awaited = 0
        self._has_told = False

    def offer(self, request: Request, digest: str | None, fetch: Callable[[str], Source | None]) -> int | None:
        """Put a request before the trainer, unless it is there already.

        A request that the trainer has answered, or is working on, keeps its version: nothing is trained twice because
        a client or the server died in between. A request that was answered with an error is offered anew.

        Parameters
        ----------
        request
            What is asked.
        digest
            SHA-256 of the state it starts from; None if it needs none.
        fetch
            Called with the digest if the exchange does not hold that state; may return None.

        Returns
        -------
        version
            The version to wait for; None if the state is nowhere to be had.
        """
        # Without the lock: this side alone counts up, and an answer that comes meanwhile has no higher version.
        task, result = _forgiving(self.exchange.read_task), _forgiving(self.exchange.read_result)
        finished = self._read_finished()
        version = self._next_version(task, result, finished)
        if task and _asks(task, request, digest) and self._is_whole(task):
            if result is None or result.version < task.version:
                # A trainer never begins what is older than the end of a run, also if that run was resumed since.
                if finished is None or finished.version < task.version:
                    self._awaited = task.version
                    return task.version
            elif result.version == self._awaited and _answers(result, task) and self._is_whole(result):
                # It came since this client last looked: also an error is told once before it is asked for anew.
                return task.version
            elif result.status == "ok" and _answers(result, task) and self._is_whole(result):
                return task.version
        self._has_told = False
        payload = None
        if digest is not None:
            payload = self._place(task, digest, fetch, version)
            if payload is None:
                return None
        record = TaskRecord(version=version, request=request, payload=payload)
        with self.exchange.handoff():
            write_json(self.exchange.task_path, record.to_json())
        self._highest = self._awaited = version
        # Up to what it answered the trainer has moved on; a newer one it may be about to open.
        self.exchange.remove_payloads("task", below=min(version, result.version + 1 if result else 0))
        return version

    def result(self, version: int) -> ResultRecord | None:
        """Return the answer to a version, or None while there is none; raises RecordError if it cannot be believed."""
        record = self.exchange.read_result()
        if record is None or record.version != version:
            return None
        if record.payload:
            self.exchange.check_payload(record.payload)
        if self._awaited == version:
            self._awaited = 0
        return record

    def cancel(self, version: int) -> None:
        """Tell the trainer that nobody waits for a version any more; one that it has answered stays answered."""
        with self.exchange.handoff():
            task, result = _forgiving(self.exchange.read_task), _forgiving(self.exchange.read_result)
            answered = result is not None and result.version >= version
            if task and task.version == version and not task.cancelled and not answered:
                write_json(self.exchange.task_path, replace(task, cancelled=True).to_json())

    def finish(self, run_id: str, outcome: str, reason: str = "") -> None:
        """Tell the trainer that the run is over; told twice, it is the same end.

        Unless it was told to another one, and a trainer is here now: it follows one that was killed on its way out, and
        has not been told.
        """
        with self.exchange.handoff():
            task, result = _forgiving(self.exchange.read_task), _forgiving(self.exchange.read_result)
            past, left = self._read_finished(), _forgiving(self.exchange.read_left)
            is_told = (
                past is not None
                and (past.run_id, past.outcome) == (run_id, outcome)
                and past.version > (task.version if task else 0)
            )
            was_left = past is not None and left is not None and left.version >= past.version
            # A client that told it itself saw no other trainer come: what is here is the one that leaves.
            is_anew = was_left and not self._has_told and self.exchange.is_held("trainer")
            self._has_told = True
            if is_told and not is_anew:
                return
            version = self._next_version(task, result, past)
            record = FinishedRecord(version=version, run_id=run_id, outcome=outcome, reason=reason)
            write_json(self.exchange.finished_path, record.to_json())
            self._highest = version

    def held_digest(self) -> str | None:
        """Return the digest of the state that the exchange holds, or None."""
        task = _forgiving(self.exchange.read_task)
        return task.payload.digest if task and task.payload and self._is_whole(task) else None

    def exchange_id(self) -> str:
        """Return a name of this directory that no other has: it tells the server that a client came back."""
        name = _forgiving(self.exchange.read_exchange_id)
        if name is None:
            name = uuid.uuid4().hex
            write_chunks(self.exchange.exchange_id_path, [name.encode()])
        return name

    def _place(
        self, task: TaskRecord | None, digest: str, fetch: Callable[[str], Source | None], version: int
    ) -> PayloadRecord | None:
        target = self.exchange.payload_path("task", version)
        if task and task.payload and task.payload.digest == digest and self._is_whole(task):
            link_or_copy(self.exchange.directory / task.payload.file, target)
            return replace(task.payload, file=target.name)
        source = fetch(digest)
        if source is None:
            return None
        check_space(self.exchange.directory, 0 if isinstance(source.content, Path) else source.bytes)
        if isinstance(source.content, Path):
            link_or_copy(source.content, target)
        else:
            write_chunks(target, [source.content])
        payload = PayloadRecord(file=target.name, bytes=source.bytes, digest=digest)
        try:
            path = self.exchange.check_payload(payload)
            # What was placed for this task before did not last: then its bytes are looked at too, so that a source
            # that is itself damaged is named instead of placed again and again.
            if task and task.payload and task.payload.digest == digest:
                _check_digest(path, digest)
        except RecordError:
            remove(target)
            raise
        return payload

    def _read_finished(self) -> FinishedRecord | None:
        """Read one's own note of an end; one that cannot be believed is removed, or the trainer would wait for it."""
        try:
            return self.exchange.read_finished()
        except SchemaError:
            raise
        except RecordError as exc:
            log.warning("%s; removed", exc)
            remove(self.exchange.finished_path)
            return None

    def _next_version(
        self, task: TaskRecord | None, result: ResultRecord | None, finished: FinishedRecord | None
    ) -> int:
        records = [record.version for record in (task, result, finished, _forgiving(self.exchange.read_left)) if record]
        # The payloads' names count too: a record that was lost or mangled must not make the counter go back.
        payloads = [*self.exchange.payload_versions("task"), *self.exchange.payload_versions("result")]
        return max([self._highest, *records, *payloads]) + 1

    def _is_whole(self, record: TaskRecord | ResultRecord) -> bool:
        try:
            if record.payload:
                self.exchange.check_payload(record.payload)
        except RecordError as exc:
            log.warning("%s; doing it again", exc)
            return False
        return True


class TrainerSide:
    """What the trainer does in the exchange.

    Parameters
    ----------
    exchange
        The directory; the caller holds its trainer role.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._verified: tuple[str, tuple[int, ...]] | None = None

    def next(self) -> TaskRecord | FinishedRecord | None:
        """Return the newest task without an answer, or the end of the run, or None while there is neither.

        Raises
        ------
        RecordError
            If what is there cannot be believed: wait for it to become whole.
        SchemaError
            If it never will.
        """
        task, finished = self.exchange.read_task(), self.exchange.read_finished()
        left = _forgiving(self.exchange.read_left)
        if finished and finished.version > (task.version if task else 0):
            # Nobody trains on for a run that is over, whether or not a trainer was there to see its end.
            return finished if left is None or left.version < finished.version else None
        if task is None or task.cancelled:
            return None
        result = _forgiving(self.exchange.read_result)
        if result and result.version >= task.version:
            return None
        if task.payload:
            self._verify(task.payload)
        return task

    def is_wanted(self, task: TaskRecord) -> bool:
        """Tell whether somebody still waits for the answer to a task."""
        try:
            newest, finished = self.exchange.read_task(), self.exchange.read_finished()
        except RecordError:
            return True
        if finished and finished.version > task.version:
            return False
        # By more than the version: whoever empties the directory under a live trainer makes the counter begin anew.
        return newest is not None and newest.version == task.version and _asks(newest, task.request, _digest_of(task))

    def answer(
        self,
        task: TaskRecord,
        chunks: Iterable[Buffer] | None = None,
        *,
        num_examples: int = 0,
        loss: float | None = None,
        metrics: Mapping[str, Scalar] | None = None,
        error: Mapping[str, str] | None = None,
        seconds: float = 0.0,
    ) -> bool:
        """Answer a task; returns False if it was not wanted any more or has an answer, then nothing is offered."""
        # Looked at before a large payload is written, and again under the lock.
        if chunks is not None and not self._is_open(task):
            return False
        payload = None if chunks is None else self._write(task.version, chunks)
        record = ResultRecord(
            version=task.version, run_id=task.request.run_id, kind=task.request.kind,
            server_round=task.request.server_round, status="ok" if error is None else "error", payload=payload,
            num_examples=num_examples, loss=loss, metrics=metrics or {}, error=error, seconds=seconds,
        )  # fmt: skip
        with self.exchange.handoff():
            if not self._is_open(task):
                if payload:
                    remove(self.exchange.directory / payload.file)
                return False
            write_json(self.exchange.result_path, record.to_json())
        # The client asked for this version, so it has moved on from the answers before.
        self.exchange.remove_payloads("result", below=task.version)
        return True

    def leave(self, finished: FinishedRecord) -> None:
        """Note that this end of a run was seen: the next trainer of the rank waits for another run."""
        write_json(self.exchange.left_path, finished.to_json())

    def _is_open(self, task: TaskRecord) -> bool:
        result = _forgiving(self.exchange.read_result)
        if result and result.version >= task.version:
            # The client may have it already: an answer never changes under its version, nor does its payload.
            log.warning("version %d has an answer; another one is dropped", task.version)
            return False
        if not self.is_wanted(task):
            log.warning(
                "the answer to %s of round %d (version %d) came too late: nobody waits for it; dropped",
                task.request.kind, task.request.server_round, task.version,
            )  # fmt: skip
            return False
        return True

    def _write(self, version: int, chunks: Iterable[Buffer]) -> PayloadRecord:
        path = self.exchange.payload_path("result", version)
        digest, size = write_hashed(path, chunks)
        return PayloadRecord(file=path.name, bytes=size, digest=digest)

    def _verify(self, payload: PayloadRecord) -> None:
        path = self.exchange.check_payload(payload)
        # A state that serves several tasks is one file under several names: it is looked at once.
        if self._verified == (payload.digest, identity := _identity(path)):
            return
        try:
            _check_digest(path, payload.digest)
        except RecordError:
            # Its length and header are right, so only this side knows; gone, the client sees it and places it anew.
            remove(path)
            raise
        self._verified = (payload.digest, identity)


def _asks(task: TaskRecord, request: Request, digest: str | None) -> bool:
    asked = task.request
    return (
        not task.cancelled
        and (asked.run_id, asked.kind, asked.server_round) == (request.run_id, request.kind, request.server_round)
        and asked.split == request.split
        and _digest_of(task) == digest
    )


def _answers(result: ResultRecord, task: TaskRecord) -> bool:
    asked = task.request
    return (result.version, result.run_id, result.kind, result.server_round) == (
        task.version, asked.run_id, asked.kind, asked.server_round,
    )  # fmt: skip


def _digest_of(task: TaskRecord) -> str | None:
    return task.payload.digest if task.payload else None


def _identity(path: Path) -> tuple[int, ...]:
    try:
        status = path.lstat()
    except OSError as exc:
        raise RecordError(f"cannot read the payload {path}: {exc.strerror or exc}") from exc
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _check_digest(path: Path, digest: str) -> None:
    try:
        with open_regular(path) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise RecordError(f"cannot read the payload {path}: {exc.strerror or exc}") from exc
    if found != digest:
        raise RecordError(f"{path} has digest {found[:12]}…, its record says {digest[:12]}…")


def _forgiving(read: Callable[[], Record | None]) -> Record | None:
    """Read one's own or a past record: what cannot be believed is not there."""
    try:
        return read()
    except SchemaError:
        raise
    except RecordError as exc:
        log.warning("%s; taken as not there", exc)
        return None
