"""The trainer's side of the hand-off: it takes tasks and answers them.

What to do with the records that are there is decided in `fedsplit.exchange.decisions`; this module reads and writes.
Only the holder of the trainer's role writes ``result.json`` and ``left.json``.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from fedsplit.disk import files
from fedsplit.disk.spares import Spares
from fedsplit.errors import RecordError
from fedsplit.exchange import decisions
from fedsplit.exchange.directory import Exchange, forgive
from fedsplit.exchange.records import FinishedRecord, LocalEntries, PayloadRecord, ResultRecord, Scalar, TaskRecord

log = logging.getLogger("fedsplit")


class TrainerSide:
    """What the trainer does in the exchange; the caller holds its trainer role."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._verified: tuple[str, tuple[int, ...]] | None = None
        self._spares = Spares(exchange.directory, "result")

    def next(self) -> TaskRecord | FinishedRecord | None:
        """Return the newest task without an answer, or the end of the run, or None while there is neither.

        Raises RecordError if what is there cannot be believed. Waiting may mend that, but not a SchemaError.
        """
        found = decisions.what_is_next(
            task=self.exchange.read_task(), end=self.exchange.read_finished(),
            result=forgive(self.exchange.read_result), left=forgive(self.exchange.read_left),
        )  # fmt: skip
        if isinstance(found, TaskRecord) and found.payload:
            self._verify(found.payload)
        return found

    def is_wanted(self, task: TaskRecord) -> bool:
        """Tell whether somebody still waits for the answer to a task."""
        try:
            newest, end = self.exchange.read_task(), self.exchange.read_finished()
        except RecordError:
            return True
        return decisions.is_wanted(task, newest=newest, end=end)

    def answer(
        self, task: TaskRecord, chunks: Iterable[files.Buffer] | None = None, *, num_examples: int = 0,
        loss: float | None = None, metrics: Mapping[str, Scalar] | None = None,
        local_entries: LocalEntries | None = None, error: Mapping[str, str] | None = None, seconds: float = 0.0,
        status: Literal["ok", "step", "again"] = "ok", holds: str | None = None,
    ) -> bool:  # fmt: skip
        """Answer a task; False if it has an answer, or nobody waits for one any more: then nothing is offered.

        Raises RecordError if the client could not read the answer: a number is out of range, or the texts are too long.
        """
        payload = None
        if chunks is not None:
            # Looked at before a large payload is written, and again under the lock.
            if not self._is_open(task):
                return False
            # The client asked for this version, so it has moved on from the answers before.
            self.exchange.remove_payloads("result", below=task.version, spares=self._spares)
            path = self.exchange.payload_path("result", task.version)
            digest, size = files.write_hashed(path, chunks, mode=files.UNWRITABLE, spares=self._spares)
            payload = PayloadRecord(file=path.name, bytes=size, digest=digest, identity=self.exchange.identity(path))
        record = ResultRecord(
            version=task.version, run_id=task.run_id, kind=task.kind, server_round=task.server_round,
            status=status if error is None else "error", step=task.step, payload=payload, num_examples=num_examples,
            loss=loss, metrics=metrics or {}, local_entries=local_entries or {}, error=error, seconds=seconds,
            holds=holds,
        )  # fmt: skip
        try:
            with self.exchange.handoff():
                is_open = self._is_open(task)
                if is_open:
                    self.exchange.write(self.exchange.result_path, record)
        except RecordError:
            self._drop(payload)
            raise
        if not is_open:
            self._drop(payload)
            return False
        self.exchange.remove_payloads("result", below=task.version, spares=self._spares)
        return True

    def leave(self, end: FinishedRecord) -> None:
        """Note that this end of a run was seen: the next trainer of the rank waits for another run."""
        self.exchange.write(self.exchange.left_path, end)

    def _is_open(self, task: TaskRecord) -> bool:
        result = forgive(self.exchange.read_result)
        if result and result.version >= task.version:
            # The client may have it already: an answer never changes under its version, nor does its payload.
            log.warning("version %d has an answer; another one is dropped", task.version)
            return False
        if not self.is_wanted(task):
            log.warning(
                "the answer to %s of round %d (version %d) came too late: nobody waits for it; dropped",
                task.kind, task.server_round, task.version,
            )  # fmt: skip
            return False
        return True

    def _drop(self, payload: PayloadRecord | None) -> None:
        if payload:
            files.remove(self.exchange.directory / payload.file)

    def _verify(self, payload: PayloadRecord) -> None:
        path = self.exchange.check_payload(payload)
        if payload.identity is not None and payload.identity == self.exchange.identity(path):
            return
        # A state that serves several tasks is one file under several names: its bytes are read once.
        if self._verified == (payload.digest, identity := _identity(path)):
            return
        try:
            self.exchange.check_digest(payload)
        except RecordError:
            # Its length and header are right, so the client cannot see the damage. Removed, it is placed again.
            files.remove(path)
            raise
        self._verified = (payload.digest, identity)


def _identity(path: Path) -> tuple[int, ...]:
    with files.explained(path, "read the payload", RecordError):
        status = path.lstat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
