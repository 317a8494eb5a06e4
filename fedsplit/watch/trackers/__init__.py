"""Dashboards that people already have: what a run measures goes to TensorBoard or MLflow, round by round.

A tracker is one module of this package, named in `TRACKERS`, with one class::

    class Tracker:
        def __init__(self, place: str, run_id: str, first_round: int, settings: Mapping[str, Any]) -> None: ...
        def log(self, scalars: Mapping[str, float], server_round: int) -> None: ...
        def close(self, *, complete: bool) -> None: ...

``place`` is where to write or the service's address, ``first_round`` the round that comes next (above 1 when a run is
resumed), ``settings`` the server's. It is made and used in a thread of its own: a slow or broken tracker delays no
round, the log names it, and the run goes on without it.

All of them get the same names: ``train/loss``, ``evaluate/accuracy`` and so on for the means, ``rank-1/train/loss``,
``rank-1/evaluate/accuracy`` for each trainer's, ``seconds/round``, ``seconds/training`` and the other stages,
``clients/accepted``, ``clients/asked``, ``clients/bytes``; the step is the round.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.errors import MissingPackageError, UsageError
from fedsplit.run.history import Line, is_number
from fedsplit.run.time_account import account, update_bytes
from fedsplit.server.observer import Observer
from fedsplit.watch.rounds import PHASES

if TYPE_CHECKING:
    from fedsplit.run.directory import Run

log = logging.getLogger("fedsplit")

# The name, which is its module's too, and what has to be importable for it.
TRACKERS = {"tensorboard": ("tensorboard",), "mlflow": ("mlflow", "sqlalchemy")}

# At its end a run waits this long for a tracker that is behind.
FLUSH_S = 30.0


def parse_tracker(text: str) -> tuple[str, str | None]:
    """Read ``NAME`` or ``NAME:PLACE``; the place is a directory or an address, None without one.

    Raises
    ------
    UsageError
        If there is no such tracker.
    MissingPackageError
        If its package is not installed.
    """
    name, _, place = text.partition(":")
    if name not in TRACKERS:
        raise UsageError(f"--tracker {text}: there is no {name!r}; expected {' or '.join(TRACKERS)}, or NAME:PLACE")
    if missing := [package for package in TRACKERS[name] if importlib.util.find_spec(package) is None]:
        raise MissingPackageError(f"--tracker {name}", " and ".join(missing), name)
    return name, place or None


@contextmanager
def open_tracker(text: str, run: Run) -> Iterator[Observer]:
    """Open a tracker for the length of a block: ``text`` is what ``--tracker`` was given."""
    name, place = parse_tracker(text)
    feeder = _Feeder(name, place or str(run.directory.parent / name), run)
    try:
        yield feeder
    finally:
        feeder.close()


class _Feeder(Observer):
    """Feeds a tracker from a thread of its own."""

    def __init__(self, name: str, place: str, run: Run) -> None:
        self._name, self._place = name, place
        self._run = (run.run_id, run.history.last_round() + 1, dict(run.settings))
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
            log.warning("tracker %s: still writing %.0f s after the end of the run; left behind", self._name, FLUSH_S)

    def _work(self) -> None:
        try:
            tracker = _open(self._name, self._place, *self._run)
            while (line := self._lines.get()) is not None:
                tracker.log(scalars_of(line), line["round"])
            tracker.close(complete=self._complete)
        except Exception as exc:  # noqa: BLE001  (the libraries raise what they like; the run goes on without it)
            log.warning(
                "tracker %s: gave up at %s (%s: %s); the run goes on, history.jsonl has it all",
                self._name, self._place, type(exc).__name__, str(exc).partition("\n")[0],
            )  # fmt: skip


def _open(name: str, place: str, *run: Any) -> Any:
    if "://" not in place:
        Path(place).mkdir(parents=True, exist_ok=True)
    return importlib.import_module(f"{__name__}.{name}").Tracker(place, *run)


def scalars_of(line: Line) -> dict[str, float]:
    """Return the numbers of a round by their names in a dashboard; what is not finite is left out."""
    found: dict[str, Any] = {"seconds/round": line.get("seconds"), "clients/bytes": update_bytes(line)}
    found |= {f"seconds/{stage}": seconds for stage, seconds in account(line).items()}
    found |= {f"clients/{name}": line.get(name) for name in ("asked", "accepted")}
    for prefix, row in [("", line), *((f"rank-{rank}/", row) for rank, row in line.get("clients", {}).items())]:
        # A rank's own training metrics stand in its row itself.
        phases = {phase: row if prefix and phase == "train" else row.get(phase, {}) for phase in PHASES}
        for phase, metrics in phases.items():
            found |= {f"{prefix}{phase}/{name}": value for name, value in metrics.items()}
    found |= {f"privacy/{name}": value for name, value in (line.get("privacy") or {}).items()}
    return {name: float(value) for name, value in found.items() if is_number(value) and math.isfinite(value)}
