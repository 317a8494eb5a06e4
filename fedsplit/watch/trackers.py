"""Dashboards that people already have: what a run measures goes to TensorBoard or MLflow, round by round.

A tracker is a class in `TRACKERS`, used in a thread of its own: a slow or broken one delays no round, the log names it,
and the run goes on without it. All of them get the same names: ``train/loss``, ``evaluate/accuracy`` and so on for the
means, ``rank-1/train/loss`` for each trainer's, ``seconds/round``, ``seconds/training`` and the other stages, and
``clients/accepted``, ``clients/asked``, ``clients/bytes``; the step is the round.
"""

import importlib.util
import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedsplit.errors import MissingPackageError, UsageError
from fedsplit.run.directory import Run
from fedsplit.run.history import Line, is_number
from fedsplit.run.time_account import account, update_bytes
from fedsplit.server.observer import Observer
from fedsplit.watch.rounds import PHASES, metrics_at

log = logging.getLogger("fedsplit")

# At its end a run waits this long for a tracker that is behind.
FLUSH_S = 30.0

EXPERIMENT = "fedsplit"
_TAG = "fedsplit.run_id"
_MOST_IN_A_BATCH = 1000
# MLflow refuses a whole batch for one name with any other character.
_REFUSED = re.compile(r"[^\w\-./ :]")


class TensorBoardTracker:
    """Event files under ``place/<run id>``; ``tensorboard --logdir place`` shows all runs side by side.

    `first_round` is the round that comes next, above 1 when a run is resumed; `settings` are the server's.
    """

    def __init__(self, place: str, run_id: str, first_round: int, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run does its last rounds again: what the dead server wrote of them is not shown any more.
        purge = first_round if first_round > 1 else None
        self._writer = SummaryWriter(str(Path(place) / run_id), purge_step=purge)
        table = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{table}", first_round)

    def log(self, scalars: Mapping[str, float], server_round: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, server_round)
        # So that a dashboard that is open shows it.
        self._writer.flush()

    def close(self, *, complete: bool) -> None:
        self._writer.close()


class MLflowTracker:
    """One of MLflow's runs for each of ours, in the experiment ``fedsplit``.

    A `place` that is a directory gets a ``mlflow.db``, as MLflow refuses its old store of plain files; else it is any
    tracking URI: ``http://…``, ``sqlite:///…``.
    """

    def __init__(self, place: str, run_id: str, first_round: int, settings: Mapping[str, Any]) -> None:
        # Nothing leaves the machine unless the user's environment asks for it; MLflow reads this when it is imported.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        # Its lines about making a database are no lines of ours.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        artifacts = None
        if "://" not in place:
            directory = Path(place).resolve()
            place, artifacts = f"sqlite:///{directory / 'mlflow.db'}", (directory / "artifacts").as_uri()
        self._client = client = MlflowClient(place)
        found = client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT, artifact_location=artifacts)
        if known := client.search_runs([experiment], f"tags.`{_TAG}` = '{run_id}'", max_results=1):
            self._run_id = known[0].info.run_id
            client.update_run(self._run_id, status="RUNNING")
        else:
            self._run_id = client.create_run(experiment, run_name=run_id, tags={_TAG: run_id}).info.run_id
            client.log_batch(self._run_id, params=[Param(name, str(value)[:500]) for name, value in settings.items()])

    def log(self, scalars: Mapping[str, float], server_round: int) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        metrics = [Metric(_REFUSED.sub("_", name), value, now, server_round) for name, value in scalars.items()]
        for start in range(0, len(metrics), _MOST_IN_A_BATCH):
            self._client.log_batch(self._run_id, metrics[start : start + _MOST_IN_A_BATCH])

    def close(self, *, complete: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if complete else "KILLED")


# By name the class, and what has to be importable for it.
TRACKERS: dict[str, Callable[..., Any]] = {"tensorboard": TensorBoardTracker, "mlflow": MLflowTracker}
PACKAGES = {"tensorboard": ("tensorboard",), "mlflow": ("mlflow", "sqlalchemy")}


def parse_tracker(text: str) -> tuple[str, str | None]:
    """Read ``NAME`` or ``NAME:PLACE``, of a tracker that there is and whose package is installed; else UsageError."""
    name, _, place = text.partition(":")
    if name not in TRACKERS:
        raise UsageError(f"--tracker {text}: there is no {name!r}; expected {' or '.join(TRACKERS)}, or NAME:PLACE")
    if missing := [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]:
        raise MissingPackageError(f"--tracker {name}", " and ".join(missing), name)
    return name, place or None


class TrackerThread(Observer):
    """Passes the rounds on to a tracker in a thread of its own; ``text`` is what ``--tracker`` was given."""

    def __init__(self, text: str, run: Run) -> None:
        name, place = parse_tracker(text)
        self._name, self._place = name, place or str(run.directory.parent / name)
        self._run = (run.run_id, run.history.last_round() + 1, dict(run.settings))
        self._complete = False
        self._lines: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        # A daemon: a service that does not answer must not keep the server from ending.
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def round_ended(self, line: Line, total_rounds: int) -> None:
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
            if "://" not in self._place:
                Path(self._place).mkdir(parents=True, exist_ok=True)
            tracker = TRACKERS[self._name](self._place, *self._run)
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
    groups: dict[str, Any] = {
        "seconds": {"round": line.get("seconds"), **account(line)},
        "clients": {"bytes": update_bytes(line), "asked": line.get("asked"), "accepted": line.get("accepted")},
        "privacy": line.get("privacy") or {},
    }
    for rank in (None, *line.get("clients", {})):
        prefix = f"rank-{rank}/" if rank else ""
        groups |= {f"{prefix}{phase}": metrics_at(line, phase, rank) for phase in PHASES}
    found = {f"{group}/{name}": value for group, row in groups.items() for name, value in row.items()}
    return {name: float(value) for name, value in found.items() if is_number(value) and math.isfinite(value)}
