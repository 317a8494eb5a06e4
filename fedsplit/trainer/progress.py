"""A trainer's progress: a bar where there is a terminal, nothing where there is none (the log has a line a task).

::

    progress = Progress(rank)
    for task in trainer:
        with progress.task(task):
            for done, batch in enumerate(batches, start=1):
                loss = step(batch)
                progress.update(done, len(batches), loss)
            task.reply(…)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

if TYPE_CHECKING:
    from fedsplit.trainer.trainer import Task


class Progress:
    """Shows how far the current task of a rank is; of several processes only one does, the others are not `shown`."""

    def __init__(self, rank: int, *, shown: bool = True) -> None:
        self._rank = rank
        self._shown = shown
        self._bar: RichProgress | None = None
        self._console = Console(stderr=True)

    @contextmanager
    def task(self, task: Task) -> Iterator[None]:
        """Show a bar for the length of a task."""
        if not self._shown or not sys.stderr.isatty():
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TextColumn("{task.fields[note]}"))  # fmt: skip
        with RichProgress(*columns, console=self._console, transient=True) as self._bar:
            title = f"rank {self._rank} {task.kind} {task.server_round}/{task.total_rounds}"
            self._bar.add_task(title, total=None, note="")
            yield
        self._bar = None

    def update(self, done: int, total: int, loss: float, epochs: int = 1) -> None:
        """Show that a batch is done, and its loss: `done` of `total` over all `epochs`, which are equally long."""
        if self._bar:
            epoch = f"epoch {(done - 1) * epochs // total + 1}/{epochs}, " if epochs > 1 else ""
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, note=f"{epoch}loss {loss:.4f}")
