"""The lines of a history as people read them: the table's headings and cells, and the numbers of a picture."""

import math
from collections.abc import Sequence
from typing import Any

from fedsplit.run.events import format_bytes
from fedsplit.run.history import Line, is_number
from fedsplit.run.time_account import update_bytes

# What a round is judged by is called test; a strategy may judge it on the server too.
PHASES = {"evaluate": "test", "central": "server", "train": "train"}
_LOSSES = [("train", "loss"), ("evaluate", "loss")]
_ACCURACY = ("evaluate", "accuracy")
_ORDER = {"loss": 0, "accuracy": 1}
# Of a model that is cut.
_STEPS = ("split", "steps_per_second")


def metrics_at(line: Line, phase: str, rank: str | None = None) -> dict[str, Any]:
    """Return what a round measured in a phase of `PHASES`: a rank's numbers, or the means over all."""
    row: dict[str, Any] = line if rank is None else line.get("clients", {}).get(rank, {})
    # A rank's training metrics stand in its row itself, where one of them may have the name of a phase.
    found = row if rank is not None and phase == "train" else row.get(phase)
    return found if isinstance(found, dict) else {}


def value(line: Line, phase: str, name: str, rank: str | None = None) -> float:
    """Return one of `metrics_at`, NaN if there is none."""
    number: Any = metrics_at(line, phase, rank).get(name)
    return float(number) if is_number(number) else math.nan


def judged(lines: Sequence[Line], name: str, rank: str | None = None) -> list[tuple[int, float]]:
    """Return round and test metric, a rank's or the mean, of each round that has it."""
    return [(line["round"], found) for line in lines if not math.isnan(found := value(line, "evaluate", name, rank))]


def metrics_of(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """Return phase and name of every mean: the losses first, then accuracies, then the user's own as they came."""
    named = ((phase, metrics_at(line, phase)) for phase in PHASES for line in lines)
    found = dict.fromkeys((phase, name) for phase, row in named for name in row if is_number(row[name]))
    return sorted(found, key=lambda metric: _ORDER.get(metric[1], 2))


def ranks_of(lines: Sequence[Line]) -> list[str]:
    """Return every rank that answered, counted or not, in order."""
    found = {rank for line in lines for rank in (*line.get("clients", {}), *line.get("refused", {}))}
    return sorted(found, key=lambda rank: (len(rank), rank))


def refusals(lines: Sequence[Line]) -> list[tuple[int, str, str]]:
    """Return round, rank and reason of each answer that was not counted."""
    return [(line["round"], rank, reason) for line in lines for rank, reason in line.get("refused", {}).items()]


def columns(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """Return the metrics that the table shows besides the losses: the test accuracy always, and first."""
    steps = [_STEPS] if any(line.get("split") for line in lines) else []
    return [_ACCURACY, *steps, *(metric for metric in metrics_of(lines) if metric not in (*_LOSSES, _ACCURACY))]


def headings(metrics: Sequence[tuple[str, str]]) -> list[str]:
    """Return the headings of the table."""
    own = {_ACCURACY: "accuracy", _STEPS: "steps/s"}
    names = [own.get(metric) or f"{PHASES[metric[0]]} {metric[1]}" for metric in metrics]
    return ["round", "clients", "train loss", "test loss", *names, "seconds", "bytes"]


def cells(line: Line, metrics: Sequence[tuple[str, str]]) -> list[str]:
    """Return the cells of a round, in the order of the headings."""
    size = update_bytes(line)
    named = (*_LOSSES, *metrics)
    numbers = [_format(value(line, *metric), 1 if metric == _STEPS else 4) for metric in named]
    counted = f"{line.get('accepted', '?')}/{line.get('asked', '?')}"
    return [str(line["round"]), counted, *numbers, _format(line.get("seconds"), 2), format_bytes(size) if size else "–"]


def _format(number: Any, digits: int) -> str:
    return f"{number:.{digits}f}" if is_number(number) and math.isfinite(number) else "–"
