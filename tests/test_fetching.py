"""Updates that come in messages are fetched while others are still at work, and read one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsplit.aggregation import Update
from fedsplit.disk.payload_store import PayloadStore
from fedsplit.run.time_account import Stages
from fedsplit.server import round as rounds_module
from fedsplit.server.peer import Reply
from fedsplit.server.round import Rounds
from fedsplit.states.state_dict import StateDict, decode, encode
from fedsplit.wire.answers import ResultPayload
from tests.bounds import BOUND_S

RANKS = range(1, 9)
STATE = b"".join(encode({"weight": torch.ones(3)}))


class Gathering(Rounds):
    """The gathering of a round, of ranks that answer when they are told to; notes what is fetched, read and merged."""

    def __init__(self, store: PayloadStore, via: str, may_answer: Callable[[int], None]) -> None:
        self.run: Any = SimpleNamespace(payloads=store)
        self.strategy: Any = SimpleNamespace(reads_extra=False)
        self.observer: Any = SimpleNamespace(answered=lambda rank, reason: None)
        self._compression: Any = SimpleNamespace(reader=lambda task: lambda content, where: self._read(task, content))
        self._ahead, self._refused = {}, {}
        self._via, self._may_answer = via, may_answer
        self.changed = threading.Condition()
        self.fetched: list[int] = []
        self.read: list[int] = []
        self.merged: list[int] = []
        # How many lower ranks were still to be merged, at worst, when a rank was fetched, and read.
        self.most = {"fetched": 0, "read": 0}

    def gather(self) -> None:
        merge: Any = SimpleNamespace(at_once=1, retains=False, add=self._merge)
        self._gather(1, [self._task(rank) for rank in RANKS], merge)

    def _task(self, rank: int) -> Any:
        return SimpleNamespace(
            rank=rank, stages=Stages(), base=decode(STATE), base_round=0, update_bytes=0, refused=None,
            fetch=lambda reply: self._note("fetched", rank) or STATE,
        )  # fmt: skip

    def _await_training(self, task: Any) -> None:
        self._may_answer(task.rank)
        payload = ResultPayload(digest="0" * 64, bytes=len(STATE), via=self._via)  # type: ignore[arg-type]
        task.reply = Reply(status="ok", num_examples=1, payload=payload)

    def _read(self, task: Any, content: bytes) -> StateDict:
        self._note("read", task.rank)
        return decode(content)

    def _merge(self, update: Update) -> None:
        self._note("merged", update.rank)

    def _note(self, what: str, rank: int) -> None:
        with self.changed:
            if what in self.most:
                left = len([other for other in RANKS if other < rank and other not in self.merged])
                self.most[what] = max(self.most[what], left)
            getattr(self, what).append(rank)
            self.changed.notify_all()


@pytest.fixture
def store(tmp_path: Path) -> PayloadStore:
    store = PayloadStore(tmp_path / "payloads")
    store.open()
    return store


def test_the_next_three_are_fetched_while_the_first_is_at_work_and_one_of_them_is_read(store: PayloadStore) -> None:
    def may_answer(rank: int) -> None:
        if rank == 1:
            with rounds.changed:
                assert rounds.changed.wait_for(lambda: {2, 3, 4} <= set(rounds.fetched), BOUND_S)

    rounds = Gathering(store, "pull", may_answer)
    rounds.gather()
    assert rounds.merged == list(RANKS)
    assert rounds.most["fetched"] == 3
    assert rounds.most["read"] <= 1


def test_on_a_disk_with_little_room_none_is_fetched_before_its_turn_has_almost_come(
    store: PayloadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def may_answer(rank: int) -> None:
        if rank == 1:
            with rounds.changed:
                assert rounds.changed.wait_for(lambda: rounds.fetched, BOUND_S)

    usage = SimpleNamespace(free=3 * len(STATE))
    monkeypatch.setattr(rounds_module, "shutil", SimpleNamespace(disk_usage=lambda path: usage))
    rounds = Gathering(store, "pull", may_answer)
    rounds.gather()
    assert rounds.merged == list(RANKS)
    assert rounds.most["fetched"] == 1


def test_what_lies_in_the_payload_store_is_read_at_once(store: PayloadStore) -> None:
    def may_answer(rank: int) -> None:
        if rank == 1:
            with rounds.changed:
                assert rounds.changed.wait_for(lambda: set(rounds.read) == set(RANKS) - {1}, BOUND_S)

    rounds = Gathering(store, "store", may_answer)
    rounds.gather()
    assert rounds.merged == list(RANKS)
