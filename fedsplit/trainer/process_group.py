"""One trainer in several processes: DistributedDataParallel, or anything else on an initialised process group.

`Trainer` puts this before its ordinary channel when a process group is there. Only process 0 uses the exchange; the
others follow it. Whatever the training's own backend is, this uses two gloo groups of its own:

- *data*: tasks, states and answers, as collectives that process 0 begins. Each names what it is about: processes that
  are out of step say so, instead of taking one thing for another. A state is broadcast as the bytes of one tensor, and
  nothing is pickled.
- *control*: errors and deaths, see `fedsplit.trainer.error_reports`.

After an error in any process no collective can be trusted. The error is reported once, and the processes end; whatever
started them (``torchrun --max-restarts N``) starts them again, and the next task is done. After a death nothing is
reported: the task stays there, and the processes that are started next do it again.

Not covered: models whose state_dict is sharded, unless `reply` is given the whole one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from fedsplit import errors
from fedsplit.errors import FedSplitError, TrainingError
from fedsplit.exchange.records import FinishedRecord, Scalar, TaskRecord, read
from fedsplit.states.state_dict import StateDict, decode, encode
from fedsplit.trainer.channel import Answer, Channel
from fedsplit.trainer.error_reports import ErrorReports, as_tensor, from_tensor, new_group

log = logging.getLogger("fedsplit")

_STEPS = ("enter", "next task", "should_stop()", "reply()", "agree")


class ProcessGroupChannel:
    """Puts a channel, which process 0 uses, before all processes of the default process group.

    Parameters
    ----------
    inner
        The channel to the client. Only process 0's is ever used.
    """

    def __init__(self, inner: Channel) -> None:
        self.process: int = dist.get_rank()
        self.processes: int = dist.get_world_size()
        self._inner = inner
        self._errors = ErrorReports(inner)
        self._count = 0
        self._states: tuple[int, StateDict] = (0, {})
        self._warned = False

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the role in process 0; where it cannot be had, every process raises the same error."""
        self._data = new_group()
        self._errors.open()
        with ExitStack() as stack:
            self._lead("enter", lambda: stack.enter_context(self._inner.hold()) and None)
            if self.process == 0:
                self._errors.listen()
            # After an exception nothing is waited for: the connections close with the process.
            yield
            self._errors.close()
            dist.destroy_process_group(self._data)
            del self._data  # see ErrorReports.close

    def next(self) -> TaskRecord | FinishedRecord:
        """Wait in process 0, and give what it found, with its state, to all."""
        flat: torch.Tensor | None = None

        def find() -> dict[str, Any]:
            nonlocal flat
            found = self._inner.next()
            if isinstance(found, FinishedRecord):
                return {"finished": asdict(found)}
            state = self._inner.read_state(found)
            self._states = (found.version, state)
            # Before anybody else has the task: a process may fail, and say so, while this one is still sending.
            self._errors.begin(found)
            flat = torch.frombuffer(bytearray().join(encode(state)), dtype=torch.uint8)
            return {"task": asdict(found), "bytes": flat.numel()}

        message = self._lead("next task", find)
        if "finished" in message:
            return read(message["finished"], FinishedRecord, "process 0")
        record = read(message["task"], TaskRecord, "process 0")
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
        parts = self._gather({**vars(answer), "state": None})
        if self.process:
            return bool(self._step("reply()", 0))
        self._compare([part["checksum"] for part in parts])
        accepted = self._inner.answer(record, merge(answer, parts))
        return bool(self._step("reply()", int(accepted)))

    def fail(self, record: TaskRecord, error: Mapping[str, str], seconds: float) -> None:
        """Report an error through process 0, once, unless another process died."""
        self._errors.report(record, error, seconds)

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
                content = as_tensor({"made": make()})
            except FedSplitError as exc:
                self._tell(step, as_tensor({"error": [type(exc).__name__, str(exc)]}))
                raise
        message = from_tensor(self._tell(step, content))
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
        content = as_tensor(message)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.processes)]
        dist.all_gather(sizes, torch.tensor([content.numel()]), group=self._data)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: content.numel()] = content
        rows = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.processes)]
        dist.all_gather(rows, padded, group=self._data)
        return [from_tensor(row[: int(size)]) for row, size in zip(rows, sizes, strict=True)]

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
