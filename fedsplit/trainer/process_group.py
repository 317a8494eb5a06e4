"""One trainer in several processes: DistributedDataParallel, or anything else on an initialised process group.

Only process 0 uses the exchange. Whatever the training's own backend is, this uses two gloo groups of its own: one for
tasks, states and answers, one for errors. Nothing is pickled: messages are JSON, a state is the bytes of one tensor.

After an error in any process no collective can be trusted. The error is reported once, and the processes end; whatever
started them (``torchrun --max-restarts N``) starts them again, and the next task is done. A process that is killed is
not reported as an error: the task stays there, and the processes that are started next do it again.

Not covered: models whose state_dict is sharded, unless `reply` is given the whole one; and that process 0 and its
machine die without closing their connections. Then the launcher's own time limits hold.
"""

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from fedsplit import errors
from fedsplit.codecs.held import Part
from fedsplit.errors import FedSplitError, TrainingError
from fedsplit.exchange.records import FinishedRecord, Scalar, TaskRecord, read
from fedsplit.states.state_dict import StateDict, decode, encode
from fedsplit.trainer.channel import Answer, Channel

log = logging.getLogger("fedsplit")

_STEPS = ("enter", "next task", "state", "should_stop()", "reply()", "agree")
# A process may wait for slower ones, or for the server, for as long as it takes; a dead one is noticed anyway.
_FOREVER = timedelta(days=365)
# When a process is killed, the others fail because of it. Within this time its closed connection has told why.
_DEATH_NOTICE_S = 1.0
_ACKNOWLEDGE = timedelta(seconds=15)
_PART_S = 60.0


class ProcessGroupChannel(Channel):
    """Puts a channel to the client, `inner`, which process 0 uses, before all processes of the default group."""

    def __init__(self, inner: Channel) -> None:
        self.process = dist.get_rank()
        self.processes = dist.get_world_size()
        self._inner = inner
        self._count = 0
        self._newest: tuple[TaskRecord, StateDict] | None = None
        self._warned = False
        self._lost = threading.Event()
        self._reporting = threading.Lock()
        self._reported = 0

    @contextmanager
    def hold(self) -> Iterator[None]:
        self._data, self._control = _new_group(), _new_group()
        listeners = [
            threading.Thread(target=self._listen, args=(peer,), daemon=True, name=f"process-{peer}")
            for peer in range(1, self.processes if self.process == 0 else 1)
        ]
        with ExitStack() as stack:
            # Where the role cannot be had, every process raises the same error.
            self._lead("enter", lambda: {"held": stack.enter_context(self._inner.hold())})
            for listener in listeners:
                listener.start()
            # After an exception nothing is waited for: the connections close with the process.
            yield
            if self.process:
                # Goodbye: a message of no length. If process 0 has gone by now, its run is over too.
                with suppress(RuntimeError):
                    dist.send(torch.zeros(1, dtype=torch.int64), dst=0, group=self._control)
            for listener in listeners:
                listener.join(_PART_S)
            dist.destroy_process_group(self._control)
            dist.destroy_process_group(self._data)
            # A group's threads are joined when the last reference goes. A thread that still holds a tensor while the
            # interpreter shuts down aborts the process.
            del self._control, self._data

    def next(self) -> TaskRecord | FinishedRecord:
        message = self._lead("next task", self._find)
        if "finished" in message:
            return read(message["finished"], FinishedRecord, "process 0")
        record = read(message["task"], TaskRecord, "process 0")
        content = torch.empty(0, dtype=torch.uint8)
        if self._newest and self.process == 0:
            content = torch.frombuffer(bytearray().join(encode(self._newest[1])), dtype=torch.uint8)
        content = self._tell("state", content)
        if self.process:
            self._newest = (record, decode(content.numpy().data))
        return record

    def _find(self) -> dict[str, Any]:
        found = self._inner.next()
        if isinstance(found, FinishedRecord):
            return {"finished": asdict(found)}
        # Before anybody else has the task: a process may fail, and say so, while this one is still sending.
        self._newest = (found, self._inner.read_state(found))
        return {"task": asdict(found)}

    def read_state(self, record: TaskRecord) -> StateDict:
        return self._newest[1] if self._newest and self._newest[0].version == record.version else {}

    def pack(self, record: TaskRecord, state: StateDict, carried: Callable[[], StateDict]) -> list[Callable[[], Part]]:
        # In one part: each would be an answer that all processes give together.
        whole = replace(record, step=None)
        return self._inner.pack(whole, state, carried) if self.process == 0 else super().pack(whole, state, carried)

    def is_wanted(self, record: TaskRecord) -> bool:
        # A collective, like a gradient's all-reduce but tiny.
        return bool(self._step("should_stop()", int(self._inner.is_wanted(record)) if self.process == 0 else 0))

    def share(self, value: int) -> int:
        return self._step("agree", value)

    def answer(self, record: TaskRecord, answer: Answer) -> bool:
        """Offer one answer for all: process 0's state, the sum of the examples, the weighted means of the numbers."""
        self._step("reply()", 0)
        parts = self._gather({**vars(answer), "state": None})
        accepted = False
        if self.process == 0:
            self._compare([part["checksum"] for part in parts])
            accepted = self._inner.answer(record, merge(answer, parts))
        return bool(self._step("reply()", int(accepted)))

    def fail(self, record: TaskRecord, error: Mapping[str, str], seconds: float) -> None:
        """Report an error through process 0, once, unless another process died."""
        if self.process == 0:
            self._pass_on(0, record, error, seconds)
            return
        content = _as_tensor({"version": record.version, "error": dict(error), "seconds": seconds})
        try:
            dist.send(torch.tensor([content.numel()]), dst=0, group=self._control)
            dist.send(content, dst=0, group=self._control)
            acknowledged = dist.irecv(torch.empty(1, dtype=torch.int64), src=0, group=self._control)
            if acknowledged is not None:
                acknowledged.wait(_ACKNOWLEDGE)
        except RuntimeError as exc:  # process 0 is gone, or stuck where no thread of it runs
            reason = str(exc).strip().partition("\n")[0]
            log.warning("process %d could not report its error to process 0: %s", self.process, reason)

    # -- the data group: collectives that process 0 begins. Each names what it is about -------------------------------

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

    def _lead(self, step: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Make a message in process 0 and return it in every process; an error of ours is raised in every process."""
        content = torch.empty(0, dtype=torch.uint8)
        if self.process == 0:
            try:
                content = _as_tensor(make())
            except FedSplitError as exc:
                self._tell(step, _as_tensor({"error": [type(exc).__name__, str(exc)]}))
                raise
        message: dict[str, Any] = _from_tensor(self._tell(step, content))
        if "error" in message:
            name, text = message["error"]
            raise getattr(errors, name, FedSplitError)(text)
        return message

    def _tell(self, step: str, content: torch.Tensor) -> torch.Tensor:
        """Return process 0's content in every process."""
        size = self._step(step, content.numel())
        if self.process:
            content = torch.empty(size, dtype=torch.uint8)
        dist.broadcast(content, src=0, group=self._data)
        return content

    def _gather(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """Return every process's message in every process."""
        content = _as_tensor(message)
        longest = torch.tensor(content.numel())
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=self._data)
        # All of one length; JSON may end with spaces.
        padded = torch.full((int(longest),), ord(" "), dtype=torch.uint8)
        padded[: content.numel()] = content
        rows = [torch.empty_like(padded) for _ in range(self.processes)]
        dist.all_gather(rows, padded, group=self._data)
        return [_from_tensor(row) for row in rows]

    def _compare(self, checksums: Sequence[float | None]) -> None:
        first = checksums[0]
        for process, checksum in enumerate(checksums):
            if self._warned or first is None or checksum is None:
                continue
            if not math.isclose(first, checksum, rel_tol=1e-9, abs_tol=1e-12):
                self._warned = True
                log.warning(
                    "the parameters of process 0 and process %d differ after training: only process 0's reach the "
                    "server; is the model wrapped in DistributedDataParallel?", process,
                )  # fmt: skip

    # -- the control group: process 0 has a thread for each other process, blocked in a receive. So an error arrives
    # while every main thread is stuck in a collective that will never end. And the kernel closes the connections of a
    # process that is killed, so its death is known at once.

    def _listen(self, peer: int) -> None:
        """Take a process's errors, each after its length, until it says goodbye or dies; in a thread of process 0."""
        size = torch.empty(1, dtype=torch.int64)
        try:
            while True:
                dist.recv(size, src=peer, group=self._control)
                if not size:
                    return
                content = torch.empty(int(size), dtype=torch.uint8)
                dist.recv(content, src=peer, group=self._control)
                message = _from_tensor(content)
                newest = self._newest
                if newest and newest[0].version == message["version"]:  # older errors are not reported any more
                    self._pass_on(peer, newest[0], message["error"], message["seconds"])
                dist.send(torch.ones(1, dtype=torch.int64), dst=peer, group=self._control)
        except RuntimeError:
            self._lost.set()
        except FedSplitError as exc:
            log.error("an error of process %d could not be reported: %s", peer, exc)

    def _pass_on(self, process: int, record: TaskRecord, error: Mapping[str, str], seconds: float) -> None:
        is_lost = self._lost.wait(_DEATH_NOTICE_S)
        with self._reporting:
            if self._reported == record.version:
                return
            if not is_lost:
                self._reported = record.version
                where = f"process {process} of {self.processes}: {error['message']}"
                self._inner.fail(record, {**error, "message": where}, seconds)
        if is_lost:
            log.error(
                "a process of this trainer is gone; %s of round %d stays unanswered, and is done again when the "
                "trainer is started again", record.kind, record.server_round,
            )  # fmt: skip


def _new_group() -> dist.ProcessGroup:
    """Make a gloo group of all processes, whatever the training's own backend is."""
    # A number in place of the group is for processes that are not in it.
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_FOREVER))


def _as_tensor(message: Mapping[str, Any]) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)


def _from_tensor(content: torch.Tensor) -> Any:
    return json.loads(content.numpy().tobytes())


def merge(first: Answer, parts: Sequence[Mapping[str, Any]]) -> Answer:
    """Make one answer of all processes' answers: `first` with the sum of the examples and the means of the numbers.

    `parts` has ``num_examples``, ``loss`` and ``metrics`` of every process, in order. A number that differs between
    processes becomes its mean over the examples.
    """
    weights = [int(part["num_examples"]) for part in parts]
    metrics = {
        name: _mean([part["metrics"].get(name) for part in parts], weights, value)
        for name, value in first.metrics.items()
    }
    loss = first.loss if first.loss is None else float(_mean([part["loss"] for part in parts], weights, first.loss))
    return replace(first, num_examples=sum(weights), loss=loss, metrics=metrics)


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
