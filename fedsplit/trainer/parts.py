"""An update that is given in parts: each is packed while the other side fetches the one before.

It is `fedsplit.server.parts` from the trainer's side. What was packed stays in memory until the next task: a server
that is started again asks for the first part once more, and nothing is trained twice.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from fedsplit.codecs.held import Part
from fedsplit.codecs.packed import DESCRIPTION
from fedsplit.exchange.decisions import asks
from fedsplit.exchange.records import FinishedRecord, TaskRecord
from fedsplit.states.state_dict import StateDict
from fedsplit.trainer.channel import Answer, Channel


class Parts:
    """The parts of an answer to a task, at least two; `jobs` pack them."""

    def __init__(self, task: TaskRecord, answer: Answer, jobs: Sequence[Callable[[], Part]]) -> None:
        self._task, self._answer, self._jobs, self._count = task, answer, list(jobs), len(jobs)
        self._packed: list[StateDict] = []
        # What was asked for last.
        self.newest = task
        self._residual = StateDict()

    def are_asked_for(self, found: TaskRecord | FinishedRecord) -> bool:
        """Tell whether a record asks for one of the parts."""
        return (
            isinstance(found, TaskRecord)
            and asks(found, replace(self._task, step=found.step), self._task.digest)
            and (found.step or 0) < self._count
        )

    def give(self, channel: Channel, record: TaskRecord) -> TaskRecord | FinishedRecord:
        """Give what is asked for, beginning with a record, until the last part is; returns what was found last."""
        found: TaskRecord | FinishedRecord = record
        while isinstance(found, TaskRecord) and self.are_asked_for(found):
            self.newest = found
            if (at := found.step or 0) == self._count - 1:
                break
            channel.answer(found, replace(self._answer, state=self._pack(at), status="step"))
            with suppress(Exception):
                # An error comes once more when that part is asked for, and then there is a task to report it to.
                self._pack(at + 1)
            found = channel.next()
        return found

    def last(self) -> Answer:
        """Return the answer with the last part."""
        return replace(self._answer, state=self._pack(self._count - 1))

    def take_residual(self) -> StateDict:
        """Return what all parts lack, once."""
        residual, self._residual = self._residual, StateDict()
        return residual

    def can_stay(self) -> bool:
        """Tell whether it may be given again later: all is packed, and nothing is the model's own memory."""
        return all(DESCRIPTION in state for state in self._packed)

    def _pack(self, at: int) -> StateDict:
        while len(self._packed) <= at:
            state, lacks = self._jobs[0]()
            del self._jobs[0]
            self._packed.append(state)
            self._residual |= lacks
            if not self._jobs:
                # The rest of the answer is small.
                self._answer = replace(self._answer, state=None)
        return self._packed[at]
