"""MLflow: one of its runs for each of ours, in the experiment ``fedsplit``.

``PLACE`` is a directory, which gets a ``mlflow.db`` (``mlflow ui --backend-store-uri sqlite:///PLACE/mlflow.db``), or
any tracking URI: ``http://…``, ``sqlite:///…``. MLflow's old store of plain files is in maintenance, and MLflow itself
refuses it.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EXPERIMENT = "fedsplit"
_TAG = "fedsplit.run_id"
_MOST_IN_A_BATCH = 1000
# It refuses a whole batch for one name with any other character.
_REFUSED = re.compile(r"[^\w\-./ :]")

# Nothing leaves the machine unless the user's environment asks for it; MLflow reads this when it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow.entities import Metric, Param, Run  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402


class Tracker:
    """Writes to an MLflow store; see `fedsplit.watch.trackers`."""

    def __init__(self, place: str, run_id: str, first_round: int, settings: Mapping[str, Any]) -> None:
        # Its lines about making a database are no lines of ours.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        directory = None if "://" in place else Path(place).resolve()
        self._client = MlflowClient(place if directory is None else f"sqlite:///{directory / 'mlflow.db'}")
        experiment = self._experiment(None if directory is None else (directory / "artifacts").as_uri())
        known = self._client.search_runs([experiment], f"tags.`{_TAG}` = '{run_id}'", max_results=1)
        self._run: Run = known[0] if known else self._begin(experiment, run_id, settings)
        if known:
            self._client.update_run(self._run.info.run_id, status="RUNNING")

    def log(self, scalars: Mapping[str, float], server_round: int) -> None:
        """Write a round."""
        now = round(time.time() * 1000)
        metrics = [Metric(_REFUSED.sub("_", name), value, now, server_round) for name, value in scalars.items()]
        for start in range(0, len(metrics), _MOST_IN_A_BATCH):
            self._client.log_batch(self._run.info.run_id, metrics[start : start + _MOST_IN_A_BATCH])

    def close(self, *, complete: bool) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self._run.info.run_id, "FINISHED" if complete else "KILLED")

    def _experiment(self, artifacts: str | None) -> str:
        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found is not None:
            return str(found.experiment_id)
        return str(self._client.create_experiment(EXPERIMENT, artifact_location=artifacts))

    def _begin(self, experiment: str, run_id: str, settings: Mapping[str, Any]) -> Run:
        run = self._client.create_run(experiment, run_name=run_id, tags={_TAG: run_id})
        params = [Param(name, str(value)[:500]) for name, value in settings.items()]
        self._client.log_batch(run.info.run_id, params=params)
        return run
