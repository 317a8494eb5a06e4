"""A federation of one, inside the training process: for a debugger, and to try a script before anything is started.

The trainer's own model is the initial state. Each round asks for training and for evaluation, and the state of a reply
is the state of the next task. There is no exchange directory, no client and no server, and nothing is left on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

from fedsplit.exchange.records import FinishedRecord, TaskRecord
from fedsplit.states.state_dict import StateDict
from fedsplit.trainer.channel import Answer

log = logging.getLogger("fedsplit")

_RUN_ID = "standalone"


class StandaloneChannel:
    """Asks what a server with this one client would ask.

    Parameters
    ----------
    rounds
        How many rounds to ask for.
    """

    process = 0
    processes = 1

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._state: StateDict = {}
        self._tasks = self._ask()

    def hold(self) -> AbstractContextManager[None]:
        """Hold nothing: there is nobody else."""
        return nullcontext()

    def next(self) -> TaskRecord | FinishedRecord:
        """Return the next task at once."""
        return next(self._tasks)

    def read_state(self, record: TaskRecord) -> StateDict:
        """Return a copy of the state."""
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def is_wanted(self, record: TaskRecord) -> bool:
        """Always."""
        return True

    def answer(self, record: TaskRecord, answer: Answer) -> bool:
        """Take the answer as the next state."""
        if answer.state is not None:
            self._state = {name: tensor.detach().cpu().clone() for name, tensor in answer.state.items()}
        numbers = ({} if answer.loss is None else {"loss": answer.loss}) | dict(answer.metrics)
        if record.kind != "initialize":
            shown = "".join(f", {name} {value:.4g}" for name, value in numbers.items() if not isinstance(value, str))
            log.info(
                "standalone: %s of round %d/%d, %d examples%s",
                record.kind, record.server_round, self._rounds, answer.num_examples, shown,
            )  # fmt: skip
        return True

    def fail(self, record: TaskRecord, error: Mapping[str, str], seconds: float) -> None:
        """Show the error; the state stays as it was."""
        log.error("standalone: %s of round %d failed\n%s", record.kind, record.server_round,
                  error.get("traceback", ""))  # fmt: skip

    def share(self, value: int) -> int:
        """Return the value: there is one process."""
        return value

    def _ask(self) -> Iterator[TaskRecord | FinishedRecord]:
        tasks = [("initialize", 0)]
        tasks += [(kind, number) for number in range(1, self._rounds + 1) for kind in ("train", "evaluate")]
        for version, (kind, server_round) in enumerate(tasks, start=1):
            yield TaskRecord(
                version=version, run_id=_RUN_ID, kind=kind, server_round=server_round, total_rounds=self._rounds
            )
        while True:
            yield FinishedRecord(version=len(tasks) + 1, run_id=_RUN_ID, outcome="complete")
