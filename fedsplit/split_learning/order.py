"""Whose step the upper part does next.

``sfl-v1`` (Thapa et al., "SplitFed: When Federated Learning Meets Split Learning", 2022): each rank has a copy of the
upper part, so the order changes nothing. ``sfl-v2`` (ibid.): one upper part; each rank gives one batch in each turn, in
an order drawn anew for every turn. ``sequential`` (Gupta and Raskar, "Distributed learning of deep neural network over
multiple agents", 2018): one rank trains after the other, and the lower part goes from rank to rank.

The order follows from the seed, the round, and how many batches each rank has: never from who was faster.
"""

import random
import threading
from collections.abc import Callable, Sequence

MODES = ("sfl-v1", "sfl-v2", "sequential")
# How many batches a rank may hand over at once.
MOST_WINDOW = 100
_LOOK_S = 0.2


class Order:
    """Lets the ranks of one round pass in the order of a mode; ``free`` is no order at all."""

    def __init__(self, mode: str, ranks: Sequence[int], seed: str) -> None:
        self._mode, self._ranks, self._seed = mode, sorted(ranks), seed
        self._active, self._done, self._turn = set(ranks), set[int](), 0
        self._changed = threading.Condition()

    def wait(self, rank: int, check: Callable[[], None]) -> None:
        """Wait until a rank may do its next step; `check` is called meanwhile, and may raise."""
        with self._changed:
            while not self._may(rank):
                check()
                self._changed.wait(_LOOK_S)

    def done(self, rank: int) -> None:
        """Note that a rank's step is done."""
        with self._changed:
            self._done.add(rank)
            self._advance()

    def leave(self, rank: int) -> bool:
        """Note that a rank does no further step; returns whether it was the last one."""
        with self._changed:
            was_last = self._active == {rank}
            self._active.discard(rank)
            self._advance()
            return was_last

    def _may(self, rank: int) -> bool:
        if self._mode == "sequential":
            return rank == min(self._active)
        if self._mode == "sfl-v2":
            order = random.Random(f"{self._seed}/{self._turn}").sample(self._ranks, len(self._ranks))
            return rank == next(each for each in order if each in self._active and each not in self._done)
        return True

    def _advance(self) -> None:
        if not self._active - self._done:
            self._turn, self._done = self._turn + 1, set()
        self._changed.notify_all()
