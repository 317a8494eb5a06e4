"""The trainer's side: what a training script uses to take part in a federation, without importing Flower.

::

    with Trainer(rank=1, model=model) as trainer:
        for task in trainer:
            task.load_into(model)
            if task.kind == "evaluate":
                task.reply(loss=…, num_examples=…, metrics={"accuracy": …})
            else:
                task.reply(model, num_examples=…, metrics={"loss": …})

It may be started before or after its client. Killed at any moment and started again, it finds the task that has no
answer and does it again from the same state. Where a process group of torch.distributed is initialised, the same lines
run in every process and act as one trainer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from fedsplit.codecs.held import Held
from fedsplit.disk.identity import Verify
from fedsplit.errors import FedSplitError, RecordError, TrainingError, UsageError
from fedsplit.exchange.directory import Exchange, Place, place_name
from fedsplit.exchange.records import FinishedRecord, TaskRecord, printable
from fedsplit.states.module_types import ModuleTypes
from fedsplit.states.state_dict import ModelSource, StateDict, own_state
from fedsplit.trainer.channel import Answer, Channel, ExchangeChannel, StandaloneChannel
from fedsplit.trainer.keep import Kept
from fedsplit.trainer.local_state import LocalStates
from fedsplit.trainer.parts import Parts
from fedsplit.trainer.task import Task, describe_error

if TYPE_CHECKING:
    from fedsplit.trainer.secure_steps import SecureSteps

log = logging.getLogger("fedsplit")


class Trainer:
    """Takes part in a federation as the trainer of a rank.

    Parameters
    ----------
    rank
        The rank, a positive integer; the client of the same rank is its way to the server. Or ``"upper"``: the trainer
        of the upper part of a model that is cut, beside the server.
    model
        What answers ``initialize``: a module or state_dict (as it is on entering), or a function that returns one.
        Without it the federation needs another trainer to start from.
    exchange_dir, checkpoint_dir
        Where the hand-off takes place, and where the local state is kept (``<checkpoint_dir>/rank-<k>/``).
    state
        ``keep``: the local state goes on from round to round. ``reset``: each round starts fresh.
    client_wait_s
        Seconds to wait for a client to be there before PeerMissingError is raised; None waits for ever.
    verify
        ``auto``: a received state whose file nobody can have changed is not digested again. ``always``: each is.
    secure_only
        Send an update only into secure sums: one that the server asks for openly is refused with UsageError.
    standalone
        Take part in no federation: `standalone_rounds` rounds of training and evaluation are asked for in this
        process, each from what the reply before gave. Uses no directory.

    Attributes
    ----------
    process, processes : int
        Which of how many processes of this trainer this is: 0 of 1 without a process group.
    outcome : FinishedRecord or None
        How the run ended, once the loop is over.

    Raises RoleTakenError on entering if a live trainer of this rank uses the directory.
    """

    def __init__(
        self,
        rank: Place,
        model: ModelSource | None = None,
        *,
        exchange_dir: Path | str = "exchange",
        checkpoint_dir: Path | str = "checkpoints",
        state: Literal["keep", "reset"] = "keep",
        client_wait_s: float | None = None,
        verify: Verify = "auto",
        secure_only: bool = False,
        standalone: bool = False,
        standalone_rounds: int = 3,
    ) -> None:
        if state not in ("keep", "reset"):
            raise UsageError(f"state must be 'keep' or 'reset', not {state!r}")
        self.exchange = Exchange(exchange_dir, rank, verify)
        self.state, self.secure_only = state, secure_only
        self.outcome: FinishedRecord | None = None
        self._has_model = model is not None
        held = Held(Path(checkpoint_dir) / place_name(rank) / "held")
        own = (
            StandaloneChannel(standalone_rounds) if standalone else ExchangeChannel(self.exchange, held, client_wait_s)
        )
        self._channel = _for_all_processes(own)
        self.process, self.processes = self._channel.process, self._channel.processes
        self._stack = ExitStack()
        if standalone:
            checkpoint_dir = self._stack.enter_context(TemporaryDirectory(prefix="fedsplit-standalone-"))
        self._local = LocalStates(Path(checkpoint_dir) / place_name(rank), self._channel, model, reset=state == "reset")
        self._secure_directory = Path(checkpoint_dir) / place_name(rank) / "secure"
        self._types = ModuleTypes(model)
        self._current: Task | None = None
        # The newest update, if it was given in parts.
        self._parts: Parts | None = None
        # What came while a task waited for the other half of the model, or gave parts, and is not about that task.
        self._found: TaskRecord | FinishedRecord | None = None

    def __enter__(self) -> Self:
        self._stack.enter_context(self._channel.hold())
        self._local.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if isinstance(exc, Exception) and self._current and not self._current.answered:
                self._current.fail(exc)
            self._local.close()
        finally:
            self._stack.__exit__(kind, exc, tb)

    def __iter__(self) -> Iterator[Task]:
        while isinstance(record := self._found or self._channel.next(), TaskRecord):
            self._found = None
            if record.step and record.secure:
                self._do_secure_step(record)
                continue
            # The secrets of the round before are of no use any more, or would be those of another attempt.
            self._forget_secrets()
            if self._parts and self._parts.are_asked_for(record):
                # A server that was started again asks for an update that is still here.
                if self._give_parts(self._parts, record):
                    self._channel.answer(self._parts.newest, self._parts.last())
                continue
            self._parts = None
            if record.step:
                # This process did not do the steps before: the task has to begin anew.
                self._channel.answer(record, Answer(state=None, num_examples=0, status="again"))
                continue
            try:
                task = self._current = Task(self, record, self._local.begin(record))
            except FedSplitError as exc:
                # No loop body runs that could report this, and the client must hear of it too.
                self._channel.fail(record, describe_error(exc), 0.0)
                raise
            if task.refused and self.process == 0:
                why = printable(task.refused)
                log.warning("%s: the server did not count its last answer: %s", self.exchange.who, why)
            if task.kind == "initialize" and self._has_model:
                initial = self._local.initial()
                self._types.see(initial, record.split)
                task.reply(own_state(initial), num_examples=0)
                continue
            yield task
            if not task.answered:
                error = UsageError(f"the loop went on without task.reply() for {task.kind}, round {task.server_round}")
                task.fail(error)
                raise error
            if task.failed and self.processes > 1:
                # The other processes may be anywhere, most likely in a collective that this one never comes to.
                raise TrainingError(
                    f"{task.kind} of round {task.server_round} failed in process {self.process} of {self.processes}; "
                    "the processes are out of step and must be started again: torchrun --max-restarts does it"
                )
        if record.outcome == "complete":
            self._forget_secrets()
        self.outcome = record

    @cached_property
    def _secure(self) -> SecureSteps:
        # Late: only few runs need it.
        from fedsplit.trainer.secure_steps import SecureSteps

        return SecureSteps(self._secure_directory, self.exchange.rank)

    def _forget_secrets(self) -> None:
        if self._secure_directory.exists():
            self._secure.forget()

    def _do_secure_step(self, record: TaskRecord) -> None:
        """Answer a stage of a secure sum; what is wrong with it is the server's to know, and no end of the script."""
        began = time.monotonic()
        try:
            state = self._secure.answer(record, self._channel.read_state(record))
        except FedSplitError as exc:
            log.warning("%s: no answer to stage %s of the sum: %s", self.exchange.who, record.step, exc)
            self._channel.fail(record, describe_error(exc), time.monotonic() - began)
            return
        seconds = time.monotonic() - began
        self._channel.answer(record, Answer(state=state, num_examples=0, seconds=seconds, status="step"))

    def _answer(self, task: Task, answer: Answer, local_part: StateDict, local_state: Any) -> None:
        kept = local_state.state_after(task) if isinstance(local_state, Kept) else local_state
        residual = StateDict()
        if answer.state is not None:
            carried = dict if self.state == "reset" else task._base.load_residual
            jobs = self._channel.pack(task._record, answer.state, carried)
            if len(jobs) == 1:
                state, residual = jobs[0]()
                answer = replace(answer, state=state)
            else:
                parts = Parts(task._record, answer, jobs)
                try:
                    is_wanted = self._give_parts(parts, task._record)
                finally:
                    task._record = parts.newest
                if not is_wanted:
                    return
                answer, residual = parts.last(), parts.take_residual()
                self._parts = parts if parts.can_stay() else None
        saved = self._local.save(task._record, task._base, local_part, kept, residual)
        try:
            accepted = self._channel.answer(task._record, answer)
        except RecordError:  # nobody could read it, so nothing was offered
            self._local.settle(task._record, saved=saved, accepted=False)
            raise
        self._local.settle(task._record, saved=saved, accepted=accepted)

    def _give_parts(self, parts: Parts, record: TaskRecord) -> bool:
        """Give all parts of an update but the last; returns whether that one is asked for now."""
        found = parts.give(self._channel, record)
        if parts.are_asked_for(found):
            return True
        self._found = found
        return False


def _for_all_processes(channel: Channel) -> Channel:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return channel
    from fedsplit.trainer.process_group import ProcessGroupChannel

    return ProcessGroupChannel(channel)
