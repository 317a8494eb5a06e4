"""The decisions of the hand-off, case by case as in the tables of `fedsplit.exchange.decisions`: no files, no locks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedsplit.exchange.decisions import Offer, is_past, is_wanted, what_is_next, what_to_offer
from fedsplit.exchange.records import FinishedRecord, PayloadRecord, Request, ResultRecord, TaskRecord

DIGEST, OTHER_DIGEST = "a" * 64, "b" * 64
ASKED = Request(run_id="run", kind="train", server_round=2, total_rounds=9, split=(("head.*", True),))


def task(version: int = 5, digest: str = DIGEST, **fields: Any) -> TaskRecord:
    payload = PayloadRecord(file=f"task-{version}.safetensors", bytes=80, digest=digest)
    return TaskRecord(**{**vars(ASKED), "version": version, "payload": payload, **fields})


def result(version: int = 5, status: str = "ok", **fields: Any) -> ResultRecord:
    asked = {"run_id": "run", "kind": "train", "server_round": 2}
    return ResultRecord(**{**asked, "version": version, "status": status, **fields})


def end(version: int) -> FinishedRecord:
    return FinishedRecord(version=version, run_id="run", outcome="stopped")


RENEW, WAIT, TAKE = Offer.RENEW, Offer.WAIT, Offer.TAKE

OFFERS: dict[str, tuple[Offer, dict[str, Any]]] = {
    "no task": (RENEW, {"task": None}),
    "no task, but an answer": (RENEW, {"task": None, "result": result()}),
    "a cancelled task": (RENEW, {"task": task(cancelled=True)}),
    "a cancelled task that was answered": (RENEW, {"task": task(cancelled=True), "result": result()}),
    "a task of another run": (RENEW, {"task": task(run_id="other"), "result": result(run_id="other")}),
    "a task of another kind": (RENEW, {"task": task(kind="evaluate"), "result": result(kind="evaluate")}),
    "a task of another round": (RENEW, {"task": task(server_round=1), "result": result(server_round=1)}),
    "a task with another split": (RENEW, {"task": task(split=())}),
    "a task from another state": (RENEW, {"task": task(digest=OTHER_DIGEST), "result": result()}),
    "a task from no state": (RENEW, {"task": task(payload=None)}),
    "in work": (WAIT, {}),
    "in work, and the answer before is there": (WAIT, {"result": result(4)}),
    "in work, with another config": (WAIT, {"task": task(config={"lr": 0.1}, total_rounds=12)}),
    "in work, after the end of an earlier run": (WAIT, {"end": end(4)}),
    "older than an end": (RENEW, {"end": end(6)}),
    "older than an end, and the answer before is there": (RENEW, {"end": end(6), "result": result(4)}),
    "answered": (TAKE, {"result": result()}),
    "answered, and still awaited": (TAKE, {"result": result(), "awaited": 5}),
    "answered before the run was stopped": (TAKE, {"result": result(), "end": end(6)}),
    "an error that is still awaited": (TAKE, {"result": result(status="error"), "awaited": 5}),
    "an error that was taken": (RENEW, {"result": result(status="error")}),
    "an error, while another version is awaited": (RENEW, {"result": result(status="error"), "awaited": 4}),
    "the version's answer is of another run": (RENEW, {"result": result(run_id="other"), "awaited": 5}),
    "the version's answer is of another kind": (RENEW, {"result": result(kind="evaluate"), "awaited": 5}),
    "the version's answer is of another round": (RENEW, {"result": result(server_round=3), "awaited": 5}),
    "an answer to a later version": (RENEW, {"result": result(6), "awaited": 5}),
}


@pytest.mark.parametrize(("expected", "given"), OFFERS.values(), ids=OFFERS.keys())
def test_what_the_client_does_about_a_request(expected, given):
    known = {"task": task(), "result": None, "end": None, "awaited": 0, **given}
    assert what_to_offer(ASKED, DIGEST, **known) is expected


def test_a_request_that_starts_from_no_state_is_found_again():
    asked = replace(ASKED, kind="initialize", server_round=0)
    stands = task(kind="initialize", server_round=0, payload=None)
    assert what_to_offer(asked, None, task=stands, result=None, end=None, awaited=5) is WAIT


NEXT: dict[str, tuple[Any, dict[str, Any]]] = {
    "nothing at all": (None, {"task": None}),
    "a task": (task(), {}),
    "a task, and the answer before": (task(), {"result": result(4)}),
    "a cancelled task": (None, {"task": task(cancelled=True)}),
    "an answered task": (None, {"result": result()}),
    "a task that failed": (None, {"result": result(status="error")}),
    "an answer to a later version": (None, {"result": result(6)}),
    "an end": (end(6), {"end": end(6)}),
    "an end without any task": (end(1), {"task": None, "end": end(1)}),
    "an end after a cancelled task": (end(6), {"task": task(cancelled=True), "end": end(6)}),
    "an end that was seen": (None, {"end": end(6), "left": end(6)}),
    "an end after one that was seen": (end(6), {"end": end(6), "left": end(3)}),
    "a task after an end": (task(), {"end": end(4)}),
    "a task after an end that was seen": (task(), {"end": end(4), "left": end(4)}),
}


@pytest.mark.parametrize(("expected", "given"), NEXT.values(), ids=NEXT.keys())
def test_what_the_trainer_does_next(expected, given):
    known = {"task": task(), "result": None, "end": None, "left": None, **given}
    assert what_is_next(**known) == expected


@pytest.mark.parametrize(
    ("expected", "newest", "over"),
    [
        (True, task(), None), (True, task(), end(4)), (False, task(), end(6)), (False, None, None),
        (False, task(6), None), (False, task(cancelled=True), None), (False, task(run_id="other"), None),
        (False, task(digest=OTHER_DIGEST), None), (False, task(server_round=3), None),
    ],
    ids=["newest", "after an end", "over", "lost", "later", "cancelled", "other run", "other state", "other round"],
)  # fmt: skip
def test_whether_an_answer_is_still_wanted(expected, newest, over):
    assert is_wanted(task(), newest=newest, end=over) is expected


def test_an_end_is_past_every_task_that_is_older():
    assert not is_past(task(), None) and not is_past(None, None)
    assert is_past(None, end(1)) and is_past(task(), end(6)) and not is_past(task(), end(5))
