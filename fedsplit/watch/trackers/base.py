"""What a tracker is, how one is chosen, and the thread that feeds it."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedsplit.errors import UsageError
from fedsplit.run.history import Line
from fedsplit.run.time_account import account, update_bytes
from fedsplit.server.observer import Observer

if TYPE_CHECKING:
    from fedsplit.run.directory import Run

log = logging.getLogger("fedsplit")

# At its end a run waits this long for a tracker that is behind.
FLUSH_S = 30.0

# Name, as in --tracker: its module, and what has to be importable for it.
TRACKERS = {
    "tensorboard": ("fedsplit.watch.trackers.tensorboard:TensorBoardTracker", ("tensorboard",)),
    "mlflow": ("fedsplit.watch.trackers.mlflow:MlflowTracker", ("mlflow", "sqlalchemy")),
}


class Tracker(Protocol):
    """One dashboard. Made in the tracker's own thread, and used in no other.

    A class is made with ``(place, run_id, first_round, settings)``: where to write or the service's address, the run,
    the round that comes next (above 1 when a run is resumed), and the server's settings.
    """

    def log(self, scalars: Mapping[str, float], server_round: int) -> None:
        """Take the numbers of a round."""

    def close(self, *, complete: bool) -> None:
        """Write what is left; ``complete`` tells whether the run was."""


@dataclass(frozen=True, kw_only=True)
class TrackerChoice:
    """A tracker as chosen by a flag.

    Attributes
    ----------
    place : str or None
        A directory or an address; None for the tracker's own place beside the checkpoints.
    """

    name: str
    place: str | None = None


def parse_tracker(text: str) -> TrackerChoice:
    """Read ``NAME`` or ``NAME:PLACE``.

    Raises
    ------
    UsageError
        If there is no such tracker, or its package is not installed.
    """
    name, _, place = text.partition(":")
    if name not in TRACKERS:
        raise UsageError(f"--tracker {text}: there is no {name!r}; expected {' or '.join(TRACKERS)}, or NAME:DIR")
    missing = [package for package in TRACKERS[name][1] if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(
            f"--tracker {name} needs {', '.join(missing)}, which is not installed: pip install 'fedsplit[{name}]'"
        )
    return TrackerChoice(name=name, place=place or None)


@contextmanager
def open_tracker(choice: TrackerChoice, run: Run) -> Iterator[Observer]:
    """Open a tracker for the length of a block; what it could not take is in the log."""
    place = choice.place or str(run.directory.parent / choice.name)
    tracker = BackgroundTracker(choice.name, place, run)
    try:
        yield tracker
    finally:
        tracker.close()


class BackgroundTracker(Observer):
    """Feeds a tracker from a thread of its own.

    Parameters
    ----------
    name
        A key of `TRACKERS`.
    place
        Where it writes.
    run
        The run; its settings go along.
    """

    def __init__(self, name: str, place: str, run: Run) -> None:
        self._name = name
        self._place = place
        self._run_id = run.run_id
        self._first_round = run.history.last_round() + 1
        self._settings = dict(run.settings)
        self._complete = False
        self._lines: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        # A daemon: a service that does not answer must not keep the server from ending.
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def round_ended(self, line: Line, total_rounds: int) -> None:
        """Hand a round over."""
        self._complete = line["round"] >= total_rounds
        self._lines.put(line)

    def close(self) -> None:
        """Wait until everything is written, at most `FLUSH_S` seconds."""
        self._lines.put(None)
        self._thread.join(FLUSH_S)
        if self._thread.is_alive():
            log.warning("tracker %s: not done %.0f s after the end of the run; left behind", self._name, FLUSH_S)

    def _work(self) -> None:
        try:
            tracker = _make(self._name, self._place, self._run_id, self._first_round, self._settings)
            while (line := self._lines.get()) is not None:
                tracker.log(scalars_of(line), line["round"])
            tracker.close(complete=self._complete)
        except Exception as exc:  # noqa: BLE001  (the libraries raise what they like; the run goes on without it)
            log.warning(
                "tracker %s: gave up at %s (%s: %s); the run goes on, history.jsonl has it all",
                self._name, self._place, type(exc).__name__, str(exc).partition("\n")[0],
            )  # fmt: skip


def scalars_of(line: Line) -> dict[str, float]:
    """Return the numbers of a round by their names in a dashboard; what is not finite is left out."""
    found: dict[str, Any] = {"seconds/round": line.get("seconds"), "clients/bytes": update_bytes(line)}
    found |= {f"seconds/{stage}": seconds for stage, seconds in account(line).items()}
    found |= {f"clients/{name}": line.get(name) for name in ("asked", "accepted")}
    for phase in ("train", "evaluate"):
        found |= {f"{phase}/{name}": value for name, value in (line.get(phase) or {}).items()}
    for rank, row in line.get("clients", {}).items():
        own = {f"train/{name}": value for name, value in row.items()}
        own |= {f"evaluate/{name}": value for name, value in (row.get("evaluate") or {}).items()}
        found |= {f"rank-{rank}/{name}": value for name, value in own.items()}
    found |= {f"privacy/{name}": value for name, value in (line.get("privacy") or {}).items()}
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _make(name: str, place: str, run_id: str, first_round: int, settings: Mapping[str, Any]) -> Tracker:
    module, _, attribute = TRACKERS[name][0].partition(":")
    factory = getattr(importlib.import_module(module), attribute)
    if "://" not in place:
        Path(place).mkdir(parents=True, exist_ok=True)
    tracker: Tracker = factory(place, run_id, first_round, settings)
    return tracker
