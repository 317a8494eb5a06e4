"""Dashboards that people already have: what a run measures goes to TensorBoard or MLflow, round by round.

Each tracker is one class with three methods (`Tracker`) and an optional extra of the package. It works in a thread of
its own, off the round's path: a slow or broken one delays nothing, is named in the log, and the run goes on without it.

What arrives, under the same names everywhere: ``train/loss``, ``evaluate/accuracy`` and so on for the means,
``rank-1/train/loss``, ``rank-1/evaluate/accuracy`` for each trainer's, ``seconds/round``, ``seconds/training`` and the
other stages, ``clients/accepted``, ``clients/asked``, ``clients/bytes``; the step is the round.
"""

from __future__ import annotations

from fedsplit.watch.trackers.base import (
    TRACKERS,
    BackgroundTracker,
    Tracker,
    TrackerChoice,
    open_tracker,
    parse_tracker,
    scalars_of,
)

__all__ = [
    "TRACKERS",
    "BackgroundTracker",
    "Tracker",
    "TrackerChoice",
    "open_tracker",
    "parse_tracker",
    "scalars_of",
]
