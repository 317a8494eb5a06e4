"""Which updates wait to be merged, when a merge is due, and what it takes: the decisions, without threads or tensors.

A rank does one thing at a time: it is asked to train, then its update waits in the buffer, and only after the merge
that took it is the rank asked again. So no merge has two updates of one rank, and what a robust rule or `dp` promises
of one rank holds for a merge as it does for a round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsplit.server.round import Task


@dataclass(kw_only=True)
class Buffer:
    """The ranks at work, and the updates that arrived, in that order.

    A merge is due once `size` updates are there, whatever state they started from; with `fresh`, once there are `size`
    that started from the newest one. Ranks that are gone are not waited for: if all others have handed in, it is due
    with what there is.
    """

    size: int
    fresh: bool = False
    at_work: dict[int, Task] = field(default_factory=dict)
    arrived: dict[int, Task] = field(default_factory=dict)

    def begin(self, task: Task) -> None:
        """Note that a rank was asked; raises ValueError if it still does, or has, something else."""
        if task.rank in self.at_work or task.rank in self.arrived:
            raise ValueError(f"rank {task.rank} is at work already")
        self.at_work[task.rank] = task

    def end(self, task: Task, *, counts: bool) -> None:
        """Note that a rank is done; ``counts`` if there is an update to be merged."""
        if self.at_work.get(task.rank) is not task:
            raise ValueError(f"rank {task.rank} was not asked for this")
        del self.at_work[task.rank]
        if counts:
            self.arrived[task.rank] = task

    def too_old(self, newest: int, most: int | None) -> list[Task]:
        """Take out the updates whose state is more than ``most`` merges older than that of round ``newest``."""
        found = [task for task in self.arrived.values() if most is not None and newest - task.base_round > most]
        for task in found:
            del self.arrived[task.rank]
        return found

    def is_due(self, newest: int, is_gone: Callable[[Task], bool]) -> bool:
        """Tell whether to merge now, ``newest`` being the round of the state that ranks are given."""

        def counts(task: Task) -> bool:
            return not self.fresh or task.base_round == newest

        if sum(map(counts, self.arrived.values())) >= self.size:
            return True
        if any(counts(task) and not is_gone(task) for task in self.at_work.values()):
            return False
        # With nothing to merge the round goes on for as long as somebody is at work, or it ends as it is.
        return bool(self.arrived) or all(map(is_gone, self.at_work.values()))

    def take(self) -> list[Task]:
        """Return what the merge takes, the oldest arrivals first, and forget it."""
        taken = list(self.arrived.values())[: None if self.fresh else self.size]
        for task in taken:
            del self.arrived[task.rank]
        return taken
