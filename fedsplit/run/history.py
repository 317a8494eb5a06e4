"""What people and plots read of a run: ``history.jsonl``, one line a round, written as the round ends.

A line: ``{"round": 3, "seconds": 1.2, "train": {"loss": …}, "evaluate": {"loss": …, "accuracy": …},
"clients": {"1": {"num_examples": …, …}}, "refused": {"2": "reason"}}``; and with a strategy that evaluates the state on
the server ``"central": {"loss": …}``. Numbers that are not finite stand as null.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from fedsplit.disk import files
from fedsplit.errors import CheckpointError
from fedsplit.run.events import finite

log = logging.getLogger("fedsplit")

Line = dict[str, Any]

# What makes a round the best, the first one that there is: 1 where more is better.
JUDGED_BY = {"accuracy": 1, "loss": -1}


class PartRow(NamedTuple):
    """A part of the model and its rule, as the server prints it, notes it in ``run.json`` and shows it in its table."""

    part: str
    entries: int
    bytes: int
    rule: str


class History:
    """The lines of a run, in memory and in the file; a last line that a dying process left unfinished is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Line] = []
        self._best: dict[str, tuple[float, int]] = {}
        lines = read_history(path)
        keep_if_damaged(path, len(lines))
        self._take(lines)

    def append(self, line: Line) -> None:
        """Add a round."""
        line = finite(line)
        files.append_line(self.path, json.dumps(line, allow_nan=False))
        self._take([line])

    def keep_up_to(self, server_round: int) -> None:
        """Drop the rounds after one: a resumed run does them again, and each appears once."""
        lines, self.lines, self._best = self.lines, [], {}
        self._take(line for line in lines if line["round"] <= server_round)
        files.write_chunks(self.path, [(json.dumps(line) + "\n").encode() for line in self.lines])

    def last_round(self) -> int:
        """Return the number of the last round, 0 before the first."""
        return max((line["round"] for line in self.lines), default=0)

    def best_round(self) -> int | None:
        """Return the round with the highest accuracy, else the lowest evaluation loss; None before any evaluation."""
        return next((-self._best[name][1] for name in JUDGED_BY if name in self._best), None)

    def _take(self, lines: Iterable[Line]) -> None:
        for line in lines:
            self.lines.append(line)
            for name, sign in JUDGED_BY.items():
                value: Any = (line.get("evaluate") or line.get("central") or {}).get(name)
                if is_number(value):
                    # Of equal rounds the first.
                    score = (sign * value, -line["round"])
                    self._best[name] = max(self._best.get(name, score), score)


def is_damaged(path: Path, lines: int) -> bool:
    """Tell whether a file has more whole lines than could be read."""
    return path.exists() and path.read_bytes().count(b"\n") > lines


def keep_if_damaged(path: Path, lines: int) -> None:
    """Keep a second name of a file that has more whole lines than could be read: it is about to be written again."""
    if is_damaged(path, lines):
        kept = files.unreadable_name(path)
        files.link_or_copy(path, kept)
        log.warning("%s has lines that cannot be read; as it is it is kept as %s", path, kept)


def read_history(path: Path) -> list[Line]:
    """Return the lines of a history file that can be read; none if there is no file."""
    lines = []
    for text in path.read_bytes().decode(errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError, RecursionError):
            lines.append(json.loads(text))
    return [line for line in lines if _is_line(line)]


def read_rounds(path: Path) -> list[Line]:
    """Read a history file; raises CheckpointError if it has no round."""
    if lines := read_history(path):
        return lines
    raise CheckpointError(f"no rounds in {path} yet; is it the server's --checkpoint-dir?")


def _is_line(line: Any) -> bool:
    if not isinstance(line, dict) or not isinstance(line.get("round"), int):
        return False
    mappings = ("train", "evaluate", "central", "clients", "refused")
    return all(isinstance(line.get(name) or {}, dict) for name in mappings)


def weighted_mean(rows: Iterable[tuple[float, Mapping[str, Any]]]) -> dict[str, float]:
    """Average numeric metrics with weights; each metric over the rows that have it."""
    sums: dict[str, tuple[float, float]] = {}
    for weight, metrics in rows:
        for name, value in metrics.items():
            if is_number(value) and weight > 0:
                total, weights = sums.get(name, (0.0, 0.0))
                sums[name] = total + weight * value, weights + weight
    return {name: total / weights for name, (total, weights) in sums.items()}


def is_number(value: Any) -> bool:
    """Tell whether a value is a number, which a truth value is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)
