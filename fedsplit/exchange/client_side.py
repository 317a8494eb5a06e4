"""The client's side of the hand-off: it offers tasks and takes the answers.

What to do with the records that are there is decided in `fedsplit.exchange.decisions`; this module reads and writes.
Only the holder of the client's role writes ``task.json`` and ``finished.json``.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fedsplit.disk import files
from fedsplit.disk.identity import Identity
from fedsplit.errors import RecordError, SchemaError
from fedsplit.exchange.decisions import Offer, is_past, what_to_offer
from fedsplit.exchange.directory import Exchange, forgive
from fedsplit.exchange.records import FinishedRecord, PayloadRecord, Request, ResultRecord, TaskRecord

log = logging.getLogger("fedsplit")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a task's payload comes from: bytes that were received and digested, or a finished file to link."""

    bytes: int
    content: files.Buffer | Path
    # Of that file, as whoever digested its bytes gave it.
    identity: Identity | None = None


Fetch = Callable[[str], Source | None]


class ClientSide:
    """What the client does in the exchange; the caller holds its client role."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._highest = 0
        self._awaited = 0
        self._has_told = False

    def offer(self, request: Request, digest: str | None, fetch: Fetch) -> int | None:
        """Put a request before the trainer, unless it is there already; returns the version to wait for.

        It starts from the state with this SHA-256, or from none; `fetch` is called with it if the exchange does not
        hold that state. Returns None if the state is nowhere to be had. Raises RecordError if what was fetched is no
        payload, or is damaged.
        """
        # Without the lock: only this side counts up, and an answer that comes meanwhile has no higher version.
        task, result = forgive(self.exchange.read_task), forgive(self.exchange.read_result)
        end = self._read_finished()
        what = what_to_offer(request, digest, task=task, result=result, end=end, awaited=self._awaited)
        # Waiting relies on the task's payload, taking the answer on both.
        needed = {Offer.RENEW: (), Offer.WAIT: (task,), Offer.TAKE: (task, result)}[what]
        if task and needed and all(record and self._is_whole(record) for record in needed):
            if what is Offer.WAIT:
                self._awaited = task.version
            return task.version
        self._has_told = False
        version = self._next_version(task, result, end)
        payload = None if digest is None else self._place(task, digest, fetch, version)
        if digest is not None and payload is None:
            return None
        record = TaskRecord(
            version=version, run_id=request.run_id, kind=request.kind, server_round=request.server_round,
            total_rounds=request.total_rounds, config=request.config, split=request.split, refused=request.refused,
            payload=payload, step=request.step, wire=request.wire, secure=request.secure,
        )  # fmt: skip
        with self.exchange.handoff():
            self.exchange.write(self.exchange.task_path, record)
        self._highest = self._awaited = version
        # The trainer has moved on from what it has answered. A newer payload it may be about to open.
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
            task, result = forgive(self.exchange.read_task), forgive(self.exchange.read_result)
            answered = result is not None and result.version >= version
            if task and task.version == version and not task.cancelled and not answered:
                self.exchange.write(self.exchange.task_path, replace(task, cancelled=True))

    def finish(self, run_id: str, outcome: str, reason: str = "") -> None:
        """Tell the trainer that the run is over. Told twice, it stays the same end.

        There is one exception. A trainer may note that it has seen the end and be killed before it exits; the next one
        then waits for another run. So a new client that finds the end noted as seen, and a trainer still there, tells
        it once more.
        """
        with self.exchange.handoff():
            task, result = forgive(self.exchange.read_task), forgive(self.exchange.read_result)
            end, left = self._read_finished(), forgive(self.exchange.read_left)
            is_told = end is not None and (end.run_id, end.outcome) == (run_id, outcome) and is_past(task, end)
            was_seen = end is not None and left is not None and left.version >= end.version
            # If this client told it before, the trainer that is there is the one on its way out.
            is_follower = was_seen and not self._has_told and self.exchange.is_held("trainer")
            self._has_told = True
            if is_told and not is_follower:
                return
            version = self._next_version(task, result, end)
            record = FinishedRecord(version=version, run_id=run_id, outcome=outcome, reason=reason)
            self.exchange.write(self.exchange.finished_path, record)
            self._highest = version

    def held_digest(self) -> str | None:
        """Return the digest of the state that the exchange holds, or None."""
        task = forgive(self.exchange.read_task)
        return task.digest if task and self._is_whole(task) else None

    def _place(self, task: TaskRecord | None, digest: str, fetch: Fetch, version: int) -> PayloadRecord | None:
        """Put a state's payload into the exchange; returns None if it is nowhere to be had."""
        target = self.exchange.payload_path("task", version)
        was_here = task is not None and task.digest == digest
        if task and task.payload and was_here and self._is_whole(task):
            files.link_or_copy(self.exchange.directory / task.payload.file, target)
            identity = task.payload.identity if self.exchange.trusts else None
            return replace(task.payload, file=target.name, identity=identity)
        if (source := fetch(digest)) is None:
            return None
        if isinstance(source.content, Path):
            files.link_or_copy(source.content, target)
            identity = source.identity if self.exchange.trusts else None
        else:
            files.check_space(self.exchange.directory, source.bytes)
            files.write_chunks(target, [source.content], mode=files.UNWRITABLE)
            identity = self.exchange.identity(target)
        payload = PayloadRecord(file=target.name, bytes=source.bytes, digest=digest, identity=identity)
        try:
            self.exchange.check_payload(payload)
            # This state was here before and got damaged. The source may be damaged too: look at its bytes, or it would
            # be placed again and again.
            if was_here:
                self.exchange.check_digest(payload)
        except RecordError:
            files.remove(target)
            raise
        return payload

    def _read_finished(self) -> FinishedRecord | None:
        """Read the newest end of a run. One that cannot be believed is removed, or the trainer would wait for it."""
        try:
            return self.exchange.read_finished()
        except SchemaError:
            raise
        except RecordError as exc:
            log.warning("%s; removed", exc)
            files.remove(self.exchange.finished_path)
            return None

    def _next_version(self, task: TaskRecord | None, result: ResultRecord | None, end: FinishedRecord | None) -> int:
        records = [record.version for record in (task, result, end, forgive(self.exchange.read_left)) if record]
        # The payloads' names count too: if a record is lost or damaged, the counter must not go back.
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
