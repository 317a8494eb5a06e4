"""Ranks pass one at a time, in rank order."""

from __future__ import annotations

import random
import threading

from fedsplit.server.turns import Turns
from tests.bounds import BOUND_S


def test_ranks_pass_in_order_whatever_the_order_they_come_in() -> None:
    ranks = list(range(1, 41))
    turns, passed = Turns(ranks), []

    def pass_by(rank: int) -> None:
        turns.wait(rank, ahead=1)
        # Nobody comes this far while more than one lower rank is left.
        assert len([other for other in ranks if other < rank and other not in passed]) <= 1
        turns.wait(rank)
        passed.append(rank)
        turns.done(rank)

    threads = [
        threading.Thread(target=pass_by, args=(rank,), daemon=True) for rank in random.Random(3).sample(ranks, 40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND_S)
    assert passed == ranks


def test_a_rank_that_failed_before_its_turn_holds_nobody_up() -> None:
    turns, passed = Turns([1, 2, 3]), threading.Event()

    def last() -> None:
        turns.wait(3)
        passed.set()

    threading.Thread(target=last, daemon=True).start()
    turns.done(2)
    assert not passed.wait(0.05)
    turns.done(1)
    assert passed.wait(BOUND_S)
