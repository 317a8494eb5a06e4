"""Balanced work, `--balance`: a slow rank does a share of a task, so that all are done at the same time.

The idea is that of FedCompass (Li et al., ICLR 2024, https://arxiv.org/abs/2309.14675), which gives each client as many
local steps as its measured speed allows. Here the fastest rank does all of its work, and every other the share that it
does in the same time. Before it is measured a rank does a small share, as the slowest would hold up the first round.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from fedsplit.exchange.work import WORK_SHARE
from fedsplit.run.history import Line, is_number

# The share before a rank was measured, and the least there is.
_FIRST, _LEAST = 0.25, 0.02


class Balance:
    """Measures how long the ranks take for all of their work; ``lines`` are the rounds so far, of a resumed run."""

    def __init__(self, lines: Iterable[Line] = ()) -> None:
        self._seconds: dict[int, float] = {}
        for line in lines:
            for rank, row in line.get("clients", {}).items():
                self.note(int(rank), row)

    def note(self, rank: int, row: Mapping[str, Any]) -> None:
        """Take a rank's measured ``seconds`` for its ``work_share``."""
        seconds: Any = row.get("seconds")
        share: Any = row.get(WORK_SHARE)
        if is_number(seconds) and is_number(share) and share > 0 and seconds > 0:
            self._seconds[rank] = seconds / share

    def share(self, rank: int) -> float:
        """Return the share of its usual work that a rank is to do now."""
        if rank not in self._seconds:
            return _FIRST
        return max(_LEAST, min(self._seconds.values()) / self._seconds[rank])
