"""Trainings that go on when the test says so: what has to happen in the middle of a round happens there on any machine.

A test says with `allow` up to which round trainings may end; before it has said anything, none may. Who holds looks at
a file in the directory that the programs were started in. A training that nobody waits for any more is held no longer.
"""

from __future__ import annotations

import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedsplit.workloads import WorkloadContext, create_workload

_ALLOWED = "allowed"
# How many batches of a model that is cut are done before it is held.
_BATCHES = 3


def allow(directory: Path, rounds: int) -> None:
    """Let the trainings of all rounds up to this one end."""
    new = directory / f"{_ALLOWED}.new"
    new.write_text(str(rounds))
    new.replace(directory / _ALLOWED)


def is_allowed(server_round: int) -> bool:
    """Tell whether the trainings of a round may end."""
    try:
        return int(Path(_ALLOWED).read_text()) >= server_round
    except FileNotFoundError:
        return False


def hold(task: Any) -> None:
    """Wait until the training of a task may end, or nobody waits for it any more."""
    while not is_allowed(task.server_round) and not task.should_stop():
        time.sleep(0.01)


def held(workload: Any) -> Any:
    """Return a workload that is held at the end of each training."""
    train = workload.train

    def train_and_hold(task: Any) -> Any:
        result = train(task)
        hold(task)
        return result

    workload.train = train_and_hold
    return workload


def digits(context: WorkloadContext) -> Any:
    """The digits, held at the end of each training; with ``held-seed=N`` only in a run with that seed."""
    options = dict(context.options)
    seed = options.pop("held-seed", "")
    workload = create_workload("digits", WorkloadContext(**{**vars(context), "options": options}))
    return held(workload) if seed in ("", str(context.seed)) else workload


def scaffold(context: WorkloadContext) -> Any:
    """The example of SCAFFOLD, held at the end of each training."""
    return held(create_workload("examples.algorithms.scaffold:Scaffold", context))


def cut_digits(context: WorkloadContext) -> Any:
    """The digits for a model that is cut: rank 1 is held after some batches of a training, and a file says that it is.

    The file is ``held-ROUND`` in the working directory.
    """
    workload: Any = create_workload("digits", context)
    batches = workload.batches

    def some(task: Any) -> Iterator[Any]:
        for number, batch in enumerate(batches(task)):
            if task.kind == "train" and number == _BATCHES and not is_allowed(task.server_round):
                Path(f"held-{task.server_round}").touch()
                hold(task)
            yield batch

    if context.rank == 1:
        workload.batches = some
    return workload


def main() -> None:
    """Run a script, ``python -m tests.held SCRIPT FLAG...``, each of whose trainings is held before its answer.

    A file ``held-RANK-ROUND`` says that one is.
    """
    from fedsplit import Task

    reply = Task.reply

    def hold_and_reply(self: Task, *given: Any, **named: Any) -> None:
        if self.kind == "train":
            Path(f"held-{self._trainer.exchange.rank}-{self.server_round}").touch()
            hold(self)
        reply(self, *given, **named)

    Task.reply = hold_and_reply  # type: ignore[method-assign]
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
