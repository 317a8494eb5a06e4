"""Which updates wait to be merged, when a merge is due, and what it takes: the decisions, without threads or tensors.

A rank does one thing at a time: it is asked to train, then its update waits in the buffer, and only after the merge
that took it is the rank asked again. So no merge has two updates of one rank, and what a robust rule or `dp` promises
of one rank holds for a merge as it does for a round.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Work(Protocol):
    """What a rank was asked for: a training from the state of a round."""

    rank: int
    base_round: int


AnyWork = TypeVar("AnyWork", bound=Work)


@dataclass(kw_only=True)
class Buffer(Generic[AnyWork]):
    """The ranks at work, and the updates that arrived, in that order.

    A merge is due once `size` updates are there, whatever state they started from; with `fresh`, once there are `size`
    that started from the newest one. Ranks that are gone are not waited for: if all others have handed in, it is due
    with what there is.
    """

    size: int
    fresh: bool = False
    at_work: dict[int, AnyWork] = field(default_factory=dict)
    arrived: dict[int, AnyWork] = field(default_factory=dict)

    def begin(self, work: AnyWork) -> None:
        """Note that a rank was asked; raises ValueError if it still does, or has, something else."""
        if work.rank in self.at_work or work.rank in self.arrived:
            raise ValueError(f"rank {work.rank} is at work already")
        self.at_work[work.rank] = work

    def end(self, work: AnyWork, *, counts: bool) -> None:
        """Note that a rank is done; ``counts`` if there is an update to be merged."""
        if self.at_work.get(work.rank) is not work:
            raise ValueError(f"rank {work.rank} was not asked for this")
        del self.at_work[work.rank]
        if counts:
            self.arrived[work.rank] = work

    def too_old(self, newest: int, most: int | None) -> list[AnyWork]:
        """Take out the updates whose state is more than ``most`` merges older than that of round ``newest``."""
        found = [work for work in self.arrived.values() if most is not None and newest - work.base_round > most]
        for work in found:
            del self.arrived[work.rank]
        return found

    def is_due(self, newest: int, is_gone: Callable[[AnyWork], bool]) -> bool:
        """Tell whether to merge now, ``newest`` being the round of the state that ranks are given."""

        def counts(work: AnyWork) -> bool:
            return not self.fresh or work.base_round == newest

        if sum(map(counts, self.arrived.values())) >= self.size:
            return True
        if any(counts(work) and not is_gone(work) for work in self.at_work.values()):
            return False
        # With nothing to merge the round goes on for as long as somebody is at work, or it ends as it is.
        return bool(self.arrived) or all(map(is_gone, self.at_work.values()))

    def take(self) -> list[AnyWork]:
        """Return what the merge takes, the oldest arrivals first, and forget it."""
        taken = list(self.arrived.values())[: None if self.fresh else self.size]
        for work in taken:
            del self.arrived[work.rank]
        return taken
