"""Masks on the updates of a trainer that knows nothing of secure sums: ``--mask-here``, and only with it.

The trainer is asked for an ordinary training, and its update stays in the exchange directory. What the server gets lies
in ``<exchange_dir>/masked/rank-<k>/``, beside the secrets of the round: keys, shares, the masked vector. So this is the
one place of the client that decodes tensors, with numpy. Nothing that a trainer gives may leave by another way but the
state that it begins with, and that only before its first training.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fedsplit.disk import files
from fedsplit.disk.digest import bytes_digest
from fedsplit.errors import RecordError, UsageError
from fedsplit.exchange.client_side import Source
from fedsplit.exchange.decisions import is_past
from fedsplit.exchange.directory import Exchange, forgive
from fedsplit.exchange.records import PayloadRecord, ResultRecord
from fedsplit.secure import messages
from fedsplit.secure.steps import Moved, Steps
from fedsplit.states.arrays import Array, Arrays, encode
from fedsplit.states.header import PREFIX
from fedsplit.states.local_keys import named
from fedsplit.wire.protocol import Ask

_WHO = "this client, by --mask-here,"


class Masks:
    """Takes a rank's part in secure sums for its trainer; the caller holds the client role of its exchange."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        # What is sent in place of the trainer's results.
        self.sent = Exchange(exchange.directory.parent / "masked", exchange.rank, exchange.verify)
        self._steps = Steps(self.sent.directory, exchange.rank)
        self.forget = self._steps.forget

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other question of this rank is being answered: an engine may start a process for each.

        So nothing is asked, trained or forgotten between what one of them finds and what it does.
        """
        self._exchange.check_is_there()
        lock = self._exchange.lock_of("masks")
        with files.explained(Path(lock.lock_file), "lock"):
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def for_trainer(self, ask: Ask) -> Ask:
        """Return what the trainer is asked; raises UsageError for what would let an update out openly."""
        if ask.kind == "train" and ask.secure is None:
            raise UsageError(f"the server asks for an update openly, and {_WHO} masks each: it needs a secure(…) rule")
        if ask.kind != "train" and ask.step is not None:
            raise UsageError(f"the server asks for a task in steps, and {_WHO} takes part in whole models only")
        directory = self.sent.directory
        if ask.kind == "initialize" and directory.exists():
            if not self._has_left():
                raise UsageError(
                    f"the server asks for a trainer's state openly, and by {directory} it has trained already; start "
                    "the server with --initial-checkpoint, or remove that directory before a new run with a new trainer"
                )
            shutil.rmtree(directory)
        if ask.kind == "train":
            files.make_private_directory(directory)
        found = forgive(self.sent.read_result)
        asked = (ask.run_id, ask.kind, ask.server_round)
        if found is None or (found.run_id, found.kind, found.server_round) != asked:
            self.forget()
        return replace(ask, step=None, secure=None, wire=())

    def mask(self, ask: Ask, result: ResultRecord) -> ResultRecord:
        """Return what is sent in place of a trainer's result."""
        if result.status == "error":
            return result
        if (result.kind, result.status) != (ask.kind, "ok") or (ask.kind == "train" and result.payload is None):
            raise RecordError(f"its trainer answered {ask.kind} with something else")
        if result.payload is None or ask.kind != "train":
            return result if ask.kind == "initialize" else replace(result, payload=None, holds=None)
        found = forgive(self.sent.read_result)
        # The server may not have got them.
        if found and (found.version, found.step) == (result.version, 0) and self._steps.is_unasked(ask):
            return found
        keys = self._steps.begin(ask, self._moved(ask, result.payload, result.version), result.num_examples)
        return self._send(replace(result, status="step", step=0, local_entries={}, holds=None), keys)

    def answer(self, ask: Ask, question: Source) -> ResultRecord:
        """Answer a stage, without the trainer; raises RecordError if no answer must be given."""
        began, content, found = time.monotonic(), question.content, self.sent.read_result()
        if found is None:
            raise RecordError("the secrets of this round are not here")
        payload = files.map_regular(content) if isinstance(content, Path) else content
        if bytes_digest(payload) != ask.digest:
            raise RecordError(f"what stage {ask.step} is asked with does not have the digest that was announced")
        self._steps.ask(ask, Arrays(payload, f"what stage {ask.step} is asked with"))
        if found.step == ask.step:
            return found
        answer = self._steps.answer(ask)
        seconds = time.monotonic() - began
        return self._send(replace(found, step=ask.step, num_examples=0, loss=None, metrics={}, seconds=seconds), answer)

    def _has_left(self) -> bool:
        """Tell whether the trainer has gone since its last task, as a run was complete: the next one is a new one."""
        left, task = forgive(self._exchange.read_left), forgive(self._exchange.read_task)
        return left is not None and left.outcome == "complete" and is_past(task, left)

    def _moved(self, ask: Ask, payload: PayloadRecord, version: int) -> Iterator[Moved]:
        """Yield what is summed of an update; raises UsageError unless that is all of it."""
        path = self._exchange.check_payload(payload)
        if payload.identity is None or payload.identity != self._exchange.identity(path):
            self._exchange.check_digest(payload)
        task = self._exchange.payload_path("task", version)
        ends, starts = (Arrays(files.map_regular(each), str(each)) for each in (path, task))
        if odd := sorted(ends.keys() ^ {name for name in starts if not name.startswith(PREFIX)}):
            raise UsageError(
                f"the trainer's answer and the state that it was given differ in {named(odd)}: only whole updates are "
                "summed, and extra tensors beside them would travel openly"
            )
        messages.check_nothing_is_open(ends, ask, _WHO)
        for name, most in messages.ranges_of(ends, ask.split, ask.secure).items() if ask.secure else ():
            yield name, most, ends[name], starts[name]

    def _send(self, record: ResultRecord, arrays: dict[str, Array]) -> ResultRecord:
        path = self.sent.payload_path("result", record.version)
        digest, size = files.write_hashed(path, encode(arrays), mode=files.UNWRITABLE)
        payload = PayloadRecord(file=path.name, bytes=size, digest=digest, identity=self.sent.identity(path))
        self.sent.write(self.sent.result_path, sent := replace(record, payload=payload))
        return sent
