"""One trainer in several processes: DistributedDataParallel, or anything else on an initialised process group.

`Trainer` puts this before its ordinary channel when a process group is there. Process 0 alone touches the exchange;
the others follow it. Whatever the training's own backend is, this uses two gloo groups of its own:

- *data*: tasks, states and answers, as collectives that process 0 begins. Each names what it is about, so that
  processes that are out of step say so instead of taking one thing for another. A state is broadcast as the bytes of
  one tensor, and nothing is pickled.
- *control*: one thread of process 0 for each other process, blocked in a receive. An error arrives there also while all
  main threads are stuck in a collective that will never end; and the kernel closes the connection of a process that is
  killed, so that its death is known at once and is not reported as an error of the training.

After an error in any process no collective can be trusted: the error is reported, once, and the processes end; whatever
started them (``torchrun --max-restarts N``) starts them again, and the next task is done. After a death nothing is
reported: the task keeps standing and the processes that are started next do it again.

Not covered: that process 0 and its machine die without closing their connections (then the launcher's own time limits
hold), and models whose state_dict is sharded, unless what is given to `reply` is the whole one.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fedsplit import errors
from fedsplit.errors import FedSplitError, TrainingError
from fedsplit.exchange.records import FinishedRecord, Scalar, TaskRecord
from fedsplit.states.state_dict import StateDict, decode, encode
from fedsplit.trainer.channel import Answer, Channel

log = logging.getLogger("fedsplit")

# A process may wait for its slower siblings, or for the server, for as long as it takes; a dead one is noticed anyway.
_FOREVER = timedelta(days=365)
# When a process is killed, others fail of it. Within this time its closed connection has said so.
_DEATH_NOTICE_S = 1.0
_ACKNOWLEDGE_S = 15.0
_PART_S = 60.0

_STEPS = ("enter", "next task", "should_stop()", "reply()", "agree")
_BYE, _REPORT = 0, 1


class ProcessGroupChannel:
    """Puts a channel, which process 0 uses, before all processes of the default process group.

    Parameters
    ----------
    inner
        The way to the other side. Only process 0's is ever used.
    """

    def __init__(self, inner: Channel) -> None:
        self.process: int = dist.get_rank()
        self.processes: int = dist.get_world_size()
        self._inner = inner
        self._count = 0
        self._states: tuple[int, StateDict] = (0, {})
        self._warned = False
        self._lost = threading.Event()
        self._reporting = threading.Lock()
        self._reported = 0
        self._newest: TaskRecord | None = None
        self._listeners: list[threading.Thread] = []

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the role in process 0; where it cannot be had, every process raises the same error."""
        self._data, self._control = _new_group(), _new_group()
        with ExitStack() as stack:
            self._lead("enter", lambda: stack.enter_context(self._inner.hold()) and None)
            if self.process == 0:
                for peer in range(1, self.processes):
                    listener = threading.Thread(target=self._listen, args=(peer,), daemon=True, name=f"process-{peer}")
                    listener.start()
                    self._listeners.append(listener)
            # After an exception nothing is awaited: the connections close with the process.
            yield
            self._part()

    def next(self) -> TaskRecord | FinishedRecord:
        """Wait in process 0, and give what it found, with its state, to all."""
        flat: torch.Tensor | None = None

        def find() -> dict[str, Any]:
            nonlocal flat
            found = self._inner.next()
            if isinstance(found, FinishedRecord):
                return {"finished": found.to_json()}
            state = self._inner.read_state(found)
            self._states = (found.version, state)
            # Before anybody else has it: a process may fail of it, and say so, while this one is still sending.
            self._newest = found
            flat = torch.frombuffer(bytearray().join(encode(state)), dtype=torch.uint8)
            return {"task": found.to_json(), "bytes": flat.numel()}

        message = self._lead("next task", find)
        if "finished" in message:
            return FinishedRecord.from_json(message["finished"], "process 0")
        record = TaskRecord.from_json(message["task"], "process 0")
        if flat is None:
            flat = torch.empty(message["bytes"], dtype=torch.uint8)
        dist.broadcast(flat, src=0, group=self._data)
        if self.process:
            self._states = (record.version, decode(flat.numpy().data))
        return record

    def read_state(self, record: TaskRecord) -> StateDict:
        """Return the state that came with the newest task."""
        version, state = self._states
        return state if version == record.version else {}

    def is_wanted(self, record: TaskRecord) -> bool:
        """Return what process 0 sees now, in every process: a collective, like a gradient's all-reduce but tiny."""
        return bool(self._step("should_stop()", int(self._inner.is_wanted(record)) if self.process == 0 else 0))

    def share(self, value: int) -> int:
        """Return process 0's value in every process."""
        return self._step("agree", value)

    def answer(self, record: TaskRecord, answer: Answer) -> bool:
        """Offer one answer for all: process 0's state, the sum of the examples, the weighted means of the numbers."""
        self._step("reply()", 0)
        parts = self._gather({**asdict(answer), "state": None})
        if self.process:
            return bool(self._step("reply()", 0))
        self._compare([part["checksum"] for part in parts])
        accepted = self._inner.answer(record, merge(answer, parts))
        return bool(self._step("reply()", int(accepted)))

    def fail(self, record: TaskRecord, error: Mapping[str, str], seconds: float) -> None:
        """Report an error through process 0, unless it comes of another process's death or one was reported already."""
        if self.process == 0:
            self._report(self.process, record, error, seconds)
            return
        message = {"version": record.version, "error": dict(error), "seconds": seconds}
        try:
            self._send_control(_REPORT, _bytes_of(message))
            acknowledged = dist.irecv(torch.empty(1, dtype=torch.int64), src=0, group=self._control)
            if acknowledged is not None:
                acknowledged.wait(timedelta(seconds=_ACKNOWLEDGE_S))
        except RuntimeError as exc:  # process 0 is gone, or stuck where no thread of it runs
            log.warning("process %d could not report its error to process 0: %s", self.process, _first_line(exc))

    # -- collectives that process 0 begins ------------------------------------------------------------------------

    def _step(self, step: str, value: int) -> int:
        """Begin a step in every process and return process 0's value; raises TrainingError if they are out of step."""
        self._count += 1
        header = torch.tensor([_STEPS.index(step), self._count, value], dtype=torch.int64)
        dist.broadcast(header, src=0, group=self._data)
        theirs, count, value = header.tolist()
        if (_STEPS[theirs], count) != (step, self._count):
            raise TrainingError(
                f"the processes are out of step: process {self.process} is at {step}, process 0 at {_STEPS[theirs]}; "
                "every process must take every task, and ask should_stop() and reply equally often"
            )
        return int(value)

    def _lead(self, step: str, make: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        """Make a message in process 0 and return it in every process; an error of ours is raised in every process."""
        content = torch.empty(0, dtype=torch.uint8)
        if self.process == 0:
            try:
                content = _bytes_of({"made": make()})
            except FedSplitError as exc:
                self._tell(step, _bytes_of({"error": [type(exc).__name__, str(exc)]}))
                raise
        message = json.loads(self._tell(step, content).numpy().tobytes())
        if "error" in message:
            name, text = message["error"]
            raise getattr(errors, name, FedSplitError)(text)
        made: dict[str, Any] = message["made"]
        return made

    def _tell(self, step: str, content: torch.Tensor) -> torch.Tensor:
        size = self._step(step, content.numel())
        if self.process:
            content = torch.empty(size, dtype=torch.uint8)
        dist.broadcast(content, src=0, group=self._data)
        return content

    def _gather(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """Return every process's message in every process."""
        content = _bytes_of(message)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.processes)]
        dist.all_gather(sizes, torch.tensor([content.numel()]), group=self._data)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: content.numel()] = content
        rows = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.processes)]
        dist.all_gather(rows, padded, group=self._data)
        return [json.loads(row[: int(size)].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def _compare(self, checksums: Sequence[float | None]) -> None:
        first = checksums[0]
        if first is None or self._warned:
            return
        for process, checksum in enumerate(checksums):
            if checksum is not None and not math.isclose(first, checksum, rel_tol=1e-9, abs_tol=1e-12):
                self._warned = True
                log.warning(
                    "the parameters of process 0 and process %d differ after training: only process 0's reach the "
                    "server; is the model wrapped in DistributedDataParallel?", process,
                )  # fmt: skip
                return

    # -- errors and deaths ------------------------------------------------------------------------------------------

    def _send_control(self, what: int, content: torch.Tensor | None = None) -> None:
        size = 0 if content is None else content.numel()
        dist.send(torch.tensor([what, size], dtype=torch.int64), dst=0, group=self._control)
        if content is not None:
            dist.send(content, dst=0, group=self._control)

    def _listen(self, peer: int) -> None:
        """Take a process's error reports until it says goodbye or dies; runs in a thread of process 0."""
        header = torch.empty(2, dtype=torch.int64)
        try:
            while True:
                dist.recv(header, src=peer, group=self._control)
                what, size = header.tolist()
                if what == _BYE:
                    return
                content = torch.empty(size, dtype=torch.uint8)
                dist.recv(content, src=peer, group=self._control)
                message = json.loads(content.numpy().tobytes())
                record = self._newest
                if record is not None and record.version == message["version"]:
                    self._report(peer, record, message["error"], message["seconds"])
                dist.send(torch.ones(1, dtype=torch.int64), dst=peer, group=self._control)
        except RuntimeError:
            self._lost.set()
        except FedSplitError as exc:
            log.error("an error of process %d could not be reported: %s", peer, exc)

    def _report(self, process: int, record: TaskRecord, error: Mapping[str, str], seconds: float) -> None:
        lost = self._lost.wait(_DEATH_NOTICE_S)
        with self._reporting:
            if self._reported == record.version:
                return
            if not lost:
                self._reported = record.version
                where = f"process {process} of {self.processes}: {error['message']}"
                self._inner.fail(record, {**error, "message": where}, seconds)
        if lost:
            log.error(
                "a process of this trainer is gone; %s of round %d stays unanswered, and is done again when the "
                "trainer is started again", record.kind, record.server_round,
            )  # fmt: skip

    def _part(self) -> None:
        """Let every process know that all have left the loop as they should, then give the groups back."""
        if self.process:
            # Process 0 waits for this, but not for ever; if it has gone by now, then because its run is over too.
            with suppress(RuntimeError):
                self._send_control(_BYE)
        for listener in self._listeners:
            listener.join(_PART_S)
        dist.destroy_process_group(self._control)
        dist.destroy_process_group(self._data)
        # The groups' threads are joined when the last reference goes. One that still lets go of a tensor while the
        # interpreter shuts down aborts the process.
        del self._control, self._data


def _new_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=_FOREVER)
    if not isinstance(group, dist.ProcessGroup):
        raise TrainingError("this process is not in the process group that it was asked to join")
    return group


def merge(first: Answer, parts: Sequence[Mapping[str, Any]]) -> Answer:
    """Make one answer of all processes' answers.

    Parameters
    ----------
    first
        Process 0's, whose state, time and texts stand for all.
    parts
        ``num_examples``, ``loss`` and ``metrics`` of every process, in order. A number that differs between processes
        becomes its mean over the examples.
    """
    weights = [int(part["num_examples"]) for part in parts]
    metrics = {
        name: _mean([part["metrics"].get(name) for part in parts], weights, value)
        for name, value in first.metrics.items()
    }
    losses = [part["loss"] for part in parts]
    loss = None if first.loss is None else float(_mean(losses, weights, first.loss))
    return Answer(state=first.state, num_examples=sum(weights), loss=loss, metrics=metrics, seconds=first.seconds)


def _mean(values: Sequence[Scalar | None], weights: Sequence[int], first: Scalar) -> Scalar:
    if isinstance(first, bool | str) or all(value == first for value in values):
        return first
    pairs = [
        (value, weight)
        for value, weight in zip(values, weights, strict=True)
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    if not any(weight for _, weight in pairs):
        pairs = [(value, 1) for value, _ in pairs]
    # A process without examples has no mean of them, whatever it says.
    return sum(value * weight for value, weight in pairs if weight) / sum(weight for _, weight in pairs)


def _bytes_of(message: Mapping[str, Any]) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)


def _first_line(exc: BaseException) -> str:
    return str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
