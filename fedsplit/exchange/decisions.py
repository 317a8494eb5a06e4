"""What each side of the hand-off does with the records that it finds: the protocol's decisions, and nothing else.

The functions here open no file and take no lock. `fedsplit.exchange.client_side` and `fedsplit.exchange.trainer_side`
read the records, ask one of these functions, and do what it says. A record that is missing, or that cannot be believed,
is None. `end` is the newest ``finished.json``: a run is over.

**The client** wants the answer to a request (`what_to_offer`). The first line that fits decides:

=============================  ================================  ====================  =============================
newest task                    newest result                     newest end            the client
=============================  ================================  ====================  =============================
none, or cancelled, or it      any                               any                   ``RENEW``
asks for something else
asks for this                  none, or older than the task      older than the task,  ``WAIT``: it is in work, or
                                                                 or none               the next thing to be begun
asks for this                  none, or older than the task      newer than the task   ``RENEW``: a trainer begins no
                                                                                       task that is older than an end
asks for this                  its answer, ``ok`` or ``step``    any                   ``TAKE``: nothing is trained
                                                                                       twice
asks for this                  its answer, ``error``, and this   any                   ``TAKE``: each error is
                               client still waits for it                               reported once
asks for this                  its answer, ``error``, and it     any                   ``RENEW``: ask again
                               was taken before
asks for this                  anything else                     any                   ``RENEW``
=============================  ================================  ====================  =============================

``WAIT`` and ``TAKE`` rely on payloads: of the task, and of the result. If one of them is damaged, the client renews.

**The trainer** looks for work (`what_is_next`). The first line that fits decides:

====================================================  =============================================================
what is there                                         the trainer
====================================================  =============================================================
an end newer than the task, not yet seen              leaves: the run is over
an end newer than the task, seen by a trainer before  waits for the next run
no task, or a cancelled one                           waits
a task with an answer under its version, or a higher  waits: an answer is never made twice
a task                                                begins it
====================================================  =============================================================
"""

from enum import Enum

from fedsplit.exchange.records import FinishedRecord, Request, ResultRecord, TaskRecord


class Offer(Enum):
    """What the client does about a request."""

    WAIT = "the task is there: wait for its answer"
    TAKE = "the answer is there: take it"
    RENEW = "write a new task"


def what_to_offer(
    request: Request, digest: str | None, *, task: TaskRecord | None, result: ResultRecord | None,
    end: FinishedRecord | None, awaited: int,
) -> Offer:  # fmt: skip
    """Decide what the client does about a request from the state with a digest; see the table above.

    `awaited` is the version that this client waits for and whose answer it has not taken yet; 0 if there is none.
    """
    if task is None or not asks(task, request, digest):
        return Offer.RENEW
    if result is None or result.version < task.version:
        return Offer.RENEW if is_past(task, end) else Offer.WAIT
    if answers(result, task) and (result.status in ("ok", "step") or result.version == awaited):
        return Offer.TAKE
    return Offer.RENEW


def what_is_next(
    *, task: TaskRecord | None, result: ResultRecord | None, end: FinishedRecord | None, left: FinishedRecord | None
) -> TaskRecord | FinishedRecord | None:
    """Return the task to begin, the end of the run, or None if there is nothing to do; see the table above.

    `left` is the end that the last trainer of this rank has seen and left for.
    """
    if end and is_past(task, end):
        return None if left and left.version >= end.version else end
    if task is None or task.cancelled or (result and result.version >= task.version):
        return None
    return task


def is_wanted(task: TaskRecord, *, newest: TaskRecord | None, end: FinishedRecord | None) -> bool:
    """Tell whether somebody still waits for the answer to a task, given the newest task and the newest end."""
    if newest is None or is_past(task, end):
        return False
    # Not by the version alone: if somebody empties the directory under a live trainer, the counter begins anew.
    return newest.version == task.version and asks(newest, task, task.digest)


def is_past(task: TaskRecord | None, end: FinishedRecord | None) -> bool:
    """Tell whether a run ended after a task was written, or with no task at all."""
    return end is not None and end.version > (task.version if task else 0)


def asks(task: TaskRecord, request: Request, digest: str | None) -> bool:
    """Tell whether a task, if it was not cancelled, asks for this request from this state."""
    return (
        not task.cancelled
        and (task.run_id, task.kind, task.server_round) == (request.run_id, request.kind, request.server_round)
        and (task.split, task.step, task.secure) == (request.split, request.step, request.secure)
        and task.digest == digest
    )


def answers(result: ResultRecord, task: TaskRecord) -> bool:
    """Tell whether a result answers a task, and no other one that had the same version."""
    return (result.version, result.run_id, result.kind, result.server_round, result.step) == (
        task.version, task.run_id, task.kind, task.server_round, task.step,
    )  # fmt: skip
