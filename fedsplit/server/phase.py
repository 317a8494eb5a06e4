"""One phase of a round: a number of ranks asked for one kind of task at the same time, and where the seconds went."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedsplit.run.events import format_bytes
from fedsplit.run.time_account import describe_privacy, update_bytes
from fedsplit.server.conversation import Answer


class Stages:
    """Accounts for the seconds of a round, or of one rank in it: every second belongs to exactly one stage."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def end(self, stage: str, **within: float) -> None:
        """End a stage, or one more part of it; of what is known where its seconds went stands under other names."""
        now = time.monotonic()
        left = now - self._last
        for name, seconds in within.items():
            self.seconds[name] = round(min(seconds, left), 6)
            left -= self.seconds[name]
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + max(0.0, left), 6)
        self._last = now

    def total(self) -> float:
        """Return the seconds since the beginning."""
        return round(self._last - self._began, 6)


@dataclass(kw_only=True)
class Phase:
    """What came of asking a number of ranks for one kind of task."""

    answers: dict[int, Answer] = field(default_factory=dict)
    stages: dict[int, Stages] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)

    def good(self) -> dict[int, Answer]:
        """Return the answers that count, by rank in order."""
        return {rank: answer for rank, answer in sorted(self.answers.items()) if rank not in self.refused}


def in_parallel(job: Callable[[int], None], ranks: Sequence[int], stop: threading.Event) -> None:
    """Run a job for every rank at the same time, however few cores there are.

    Raises what the first failing one did, and sets ``stop`` for the others.
    """
    outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run(rank: int) -> None:
        try:
            job(rank)
        except BaseException as exc:  # noqa: BLE001  (raised again in the main thread)
            outcomes.put(exc)
        else:
            outcomes.put(None)

    for rank in ranks:
        # Daemons: a client that is silent in the middle of a question must not keep the process from ending.
        threading.Thread(target=run, args=(rank,), name=f"rank-{rank}", daemon=True).start()
    for _ in ranks:
        if exc := outcomes.get():
            stop.set()
            raise exc


def describe_round(line: Mapping[str, Any], total_rounds: int) -> str:
    """Return a round's line for people."""
    parts = [f"round {line['round']}/{total_rounds}", f"{line['accepted']}/{line['asked']} updates"]
    for phase, metrics in (("train", line["train"]), ("test", line["evaluate"])):
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if value is not None)
        if shown:
            parts.append(f"{phase} {shown}")
    if spent := describe_privacy(line):
        parts.append(spent)
    if line["refused"]:
        parts.append("not counted: rank " + ", ".join(line["refused"]))
    return " | ".join([*parts, f"{line['seconds']:.2f} s", f"updates {format_bytes(update_bytes(line))}"])


def with_loss(answer: Answer) -> dict[str, Any]:
    """Return an answer's metrics, its loss among them."""
    return ({} if answer.loss is None else {"loss": answer.loss}) | answer.metrics
