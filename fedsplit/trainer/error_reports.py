"""How an error in one of several processes reaches process 0, and how process 0 notices that another one died.

Process 0 has a thread for each other process, blocked in a receive on a gloo group of its own. So an error arrives even
while every main thread is stuck in a collective that will never end. And the kernel closes the connections of a process
that is killed, so its death is known at once and is not reported as an error of the training.

Not covered: that process 0 and its machine die without closing their connections. Then the launcher's own time limits
hold.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fedsplit.errors import FedSplitError, TrainingError
from fedsplit.exchange.records import TaskRecord
from fedsplit.trainer.channel import Channel

log = logging.getLogger("fedsplit")

# A process may wait for slower ones, or for the server, for as long as it takes; a dead one is noticed anyway.
_FOREVER = timedelta(days=365)
# When a process is killed, the others fail because of it. Within this time its closed connection has told why.
_DEATH_NOTICE_S = 1.0
_ACKNOWLEDGE_S = 15.0
_PART_S = 60.0
_BYE, _REPORT = 0, 1


class ErrorReports:
    """The way of errors to process 0 of the default process group, and from there to the client.

    Parameters
    ----------
    inner
        The channel to the client. Only process 0's is ever used.
    """

    def __init__(self, inner: Channel) -> None:
        self._inner = inner
        self._process, self._processes = dist.get_rank(), dist.get_world_size()
        self._newest: TaskRecord | None = None
        self._lost = threading.Event()
        self._reporting = threading.Lock()
        self._reported = 0
        self._listeners: list[threading.Thread] = []

    def open(self) -> None:
        """Make the group, in every process."""
        self._group = new_group()

    def listen(self) -> None:
        """Begin to listen to the other processes; called in process 0."""
        for peer in range(1, self._processes):
            listener = threading.Thread(target=self._listen, args=(peer,), daemon=True, name=f"process-{peer}")
            listener.start()
            self._listeners.append(listener)

    def begin(self, record: TaskRecord) -> None:
        """Note the newest task: errors of older ones are not reported any more."""
        self._newest = record

    def report(self, record: TaskRecord, error: Mapping[str, str], seconds: float) -> None:
        """Report an error of this process, unless another process died or an error was reported already."""
        if self._process == 0:
            self._pass_on(0, record, error, seconds)
            return
        message = {"version": record.version, "error": dict(error), "seconds": seconds}
        try:
            self._send(_REPORT, as_tensor(message))
            acknowledged = dist.irecv(torch.empty(1, dtype=torch.int64), src=0, group=self._group)
            if acknowledged is not None:
                acknowledged.wait(timedelta(seconds=_ACKNOWLEDGE_S))
        except RuntimeError as exc:  # process 0 is gone, or stuck where no thread of it runs
            reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
            log.warning("process %d could not report its error to process 0: %s", self._process, reason)

    def close(self) -> None:
        """Tell process 0 that this process has left the loop as it should, and give the group back."""
        if self._process:
            # If process 0 has gone by now, its run is over too.
            with suppress(RuntimeError):
                self._send(_BYE)
        for listener in self._listeners:
            listener.join(_PART_S)
        dist.destroy_process_group(self._group)
        # The group's threads are joined when the last reference goes. A thread that still holds a tensor while the
        # interpreter shuts down aborts the process.
        del self._group

    def _send(self, what: int, content: torch.Tensor | None = None) -> None:
        size = 0 if content is None else content.numel()
        dist.send(torch.tensor([what, size], dtype=torch.int64), dst=0, group=self._group)
        if content is not None:
            dist.send(content, dst=0, group=self._group)

    def _listen(self, peer: int) -> None:
        """Take a process's errors until it says goodbye or dies; runs in a thread of process 0."""
        header = torch.empty(2, dtype=torch.int64)
        try:
            while True:
                dist.recv(header, src=peer, group=self._group)
                what, size = header.tolist()
                if what == _BYE:
                    return
                content = torch.empty(size, dtype=torch.uint8)
                dist.recv(content, src=peer, group=self._group)
                message = from_tensor(content)
                record = self._newest
                if record is not None and record.version == message["version"]:
                    self._pass_on(peer, record, message["error"], message["seconds"])
                dist.send(torch.ones(1, dtype=torch.int64), dst=peer, group=self._group)
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
                where = f"process {process} of {self._processes}: {error['message']}"
                self._inner.fail(record, {**error, "message": where}, seconds)
        if is_lost:
            log.error(
                "a process of this trainer is gone; %s of round %d stays unanswered, and is done again when the "
                "trainer is started again", record.kind, record.server_round,
            )  # fmt: skip


def new_group() -> dist.ProcessGroup:
    """Make a gloo group of all processes, whatever the training's own backend is."""
    group = dist.new_group(backend="gloo", timeout=_FOREVER)
    if not isinstance(group, dist.ProcessGroup):
        raise TrainingError("this process is not in the process group that it was asked to join")
    return group


def as_tensor(message: Mapping[str, Any]) -> torch.Tensor:
    """Return a message as a tensor of its JSON text's bytes: nothing is pickled."""
    return torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)


def from_tensor(content: torch.Tensor) -> Any:
    """Return the message in such a tensor."""
    return json.loads(content.numpy().tobytes())
