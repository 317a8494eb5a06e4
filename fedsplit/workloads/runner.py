"""Answers every task of a run with a workload: load the task's state, train or evaluate, reply."""

import copy
import logging
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fedsplit.errors import (
    ExchangeError,
    RecordError,
    RunFailedError,
    RunStoppedError,
    StateMismatchError,
    TaskOverError,
)
from fedsplit.trainer.progress import Progress
from fedsplit.trainer.task import Task
from fedsplit.trainer.trainer import Trainer
from fedsplit.workloads import StatefulWorkload, Workload

log = logging.getLogger("fedsplit")


def run_workload(trainer: Trainer, workload: Workload, progress: Progress) -> None:
    """Answer every task of a run with a workload; see `run_tasks`."""
    initial = copy.deepcopy(workload.local_state()) if isinstance(workload, StatefulWorkload) else None
    if hasattr(workload, "on_batch"):
        workload.on_batch = progress.update
    run_tasks(trainer, progress, partial(_answer, workload=workload, initial=initial))


def run_tasks(trainer: Trainer, progress: Progress, answer: Callable[[Task], None]) -> None:
    """Answer every task of a run; raises RunStoppedError or RunFailedError if it was not complete.

    A task that fails is reported with its traceback, and the next one is waited for. A model that cannot take the
    federation's state ends the trainer: no later task could go better.
    """
    for task in trainer:
        try:
            with progress.task(task):
                answer(task)
        except TaskOverError as exc:
            log.info("%s", exc)
        except StateMismatchError as exc:
            task.fail(exc)
            raise
        except Exception as exc:  # the workload is the user's; whatever it raises is reported whole
            if isinstance(exc, ExchangeError) and not isinstance(exc, RecordError):
                # The exchange cannot be used: no fault of the workload, and no way to report anything.
                raise
            text = "".join(traceback.format_exception(exc)).rstrip()
            log.error("%s of round %d failed; it is reported to the server\n%s", task.kind, task.server_round, text)
            task.fail(exc)
    outcome = trainer.outcome
    if outcome and outcome.outcome != "complete":
        kind = RunStoppedError if outcome.outcome == "stopped" else RunFailedError
        raise kind(f"the run ended before it was complete: {outcome.reason or outcome.outcome}")


def _answer(task: Task, workload: Workload, initial: Any) -> None:
    task.load_into(workload.model)
    stateful = workload if isinstance(workload, StatefulWorkload) else None
    # For an evaluation too: a personal model is evaluated as it was left.
    if stateful and task.restore:
        stateful.load_local_state(copy.deepcopy(initial) if task.local_state is None else task.local_state)
    if task.kind == "evaluate":
        found = workload.evaluate(task)
        task.reply(loss=found.loss, num_examples=found.num_examples, metrics=found.metrics)
        log.info("round %d: evaluated%s", task.server_round, _format({"loss": found.loss, **found.metrics}))
        return
    trained = workload.train(task)
    state = stateful.local_state() if stateful else None
    task.reply(
        workload.model, num_examples=trained.num_examples, metrics=trained.metrics, local_state=state,
        extra=trained.extra,
    )  # fmt: skip
    log.info("round %d: trained%s", task.server_round, _format(trained.metrics))


def _format(metrics: Mapping[str, object]) -> str:
    return "".join(f", {name} {value:.4f}" for name, value in metrics.items() if isinstance(value, int | float))
