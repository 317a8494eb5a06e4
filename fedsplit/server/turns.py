"""Ranks at work at the same time, whose results are taken in the order of their ranks."""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Turns:
    """Lets ranks pass one at a time, in rank order, each as early as that order allows.

    Whoever waits is woken when it may pass and not before: to wake all at each turn would be quadratic in their number.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self._left = sorted(ranks)
        self._waiting: dict[int, tuple[int, threading.Event]] = {}
        self._lock = threading.Lock()

    def wait(self, rank: int, *, ahead: int = 0) -> None:
        """Wait until every lower rank is done but ``ahead`` of them."""
        with self._lock:
            if rank in self._left[: ahead + 1]:
                return
            may_pass = threading.Event()
            self._waiting[rank] = (ahead, may_pass)
        may_pass.wait()

    def done(self, rank: int) -> None:
        """Let the next rank pass; also called by a rank that failed before its turn."""
        with self._lock:
            self._left.remove(rank)
            for place, other in enumerate(self._left):
                if other in self._waiting and place <= self._waiting[other][0]:
                    self._waiting.pop(other)[1].set()


def in_parallel(job: Callable[[Item], None], items: Sequence[Item]) -> None:
    """Run a job for every item at the same time, however few cores there are; raises what the first failing one did."""
    outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run(item: Item) -> None:
        error: BaseException | None = None
        try:
            job(item)
        except BaseException as exc:  # noqa: BLE001  (raised again in the main thread)
            error = exc
        outcomes.put(error)

    for item in items:
        # Daemons: a client that is silent in the middle of a question must not keep the process from ending.
        threading.Thread(target=run, args=(item,), daemon=True).start()
    for _ in items:
        if exc := outcomes.get():
            raise exc
