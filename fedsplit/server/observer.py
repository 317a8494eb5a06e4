"""What may watch a run: the server tells an `Observer` of each event; the live table and the trackers are observers.

An observer never decides anything. Its methods are called from several of the server's threads and must return at once.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence

from fedsplit.run.history import Line, PartRow

log = logging.getLogger("fedsplit")


class Observer:
    """Is told what a run does; every method does nothing here, so that one overrides what one needs."""

    def split_resolved(self, rows: Sequence[PartRow]) -> None:
        """Every entry has its rule."""

    def clients_awaited(self, ranks: Sequence[int], needed: int) -> None:
        """A round cannot begin: only ``ranks`` are connected. Told again every second."""

    def asked(self, kind: str, server_round: int, total_rounds: int, ranks: Sequence[int]) -> None:
        """Ranks are asked for a task, ``train`` or ``evaluate``."""

    def waiting(self, rank: int, what: str | None) -> None:
        """A rank's task stands still for want of a client or a trainer; None: it goes on."""

    def answered(self, rank: int, refused: str | None) -> None:
        """A rank's task has ended; ``refused`` says why its answer does not count."""

    def round_ended(self, line: Line, total_rounds: int) -> None:
        """A round is over, and its line is in the history."""


def _passing_on(event: str) -> Callable[..., None]:
    return lambda observers, *details: observers._tell(event, details)


class Observers(Observer):
    """Passes each event on to several observers. One that raises is logged and told nothing more: the run goes on."""

    def __init__(self) -> None:
        self._observers: list[Observer] = []

    def add(self, observer: Observer) -> None:
        """Tell one more."""
        self._observers.append(observer)

    split_resolved = _passing_on("split_resolved")
    clients_awaited = _passing_on("clients_awaited")
    asked = _passing_on("asked")
    waiting = _passing_on("waiting")
    answered = _passing_on("answered")
    round_ended = _passing_on("round_ended")

    def _tell(self, event: str, details: Sequence[object]) -> None:
        for observer in list(self._observers):
            try:
                getattr(observer, event)(*details)
            except Exception as exc:  # noqa: BLE001  (whatever it is, the run goes on without that observer)
                with contextlib.suppress(ValueError):  # another thread's event failed at the same time
                    self._observers.remove(observer)
                name = type(observer).__name__
                log.warning("%s failed and is told nothing more: %s: %s", name, type(exc).__name__, exc)
