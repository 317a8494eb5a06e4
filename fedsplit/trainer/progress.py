"""A trainer's progress: a bar where there is a terminal, nothing where there is none (the log has a line a task)."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from fedsplit.trainer.task import Task


class Progress:
    """Shows how far the current task of a rank is; of several processes only one does, the others are not `shown`.

    ``with progress.task(task):`` is put around the work, and `update` is called after each batch.
    """

    def __init__(self, rank: int, *, shown: bool = True) -> None:
        self._rank = rank
        self._shown = shown
        self._bar: RichProgress | None = None
        self._console = Console(stderr=True)

    @contextmanager
    def task(self, task: Task) -> Iterator[None]:
        """Show a bar for the length of a task; what is logged or printed meanwhile appears above it.

        Until `update` is called it only shows that something is going on, and for how long.
        """
        stderr = sys.stderr
        if not (self._shown and stderr.isatty() and self._console.is_interactive):
            yield
            return
        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[batches]}"),
                   TimeElapsedColumn(), TextColumn("{task.fields[note]}")]  # fmt: skip
        # What is printed into a file goes on going there.
        redirect_stdout = sys.stdout.isatty()
        bar = RichProgress(*columns, console=self._console, transient=True, redirect_stdout=redirect_stdout)
        loggers = (logging.getLogger("fedsplit"), logging.getLogger())
        found = [each for logger in loggers for each in logger.handlers if isinstance(each, logging.StreamHandler)]
        handlers = [each for each in found if each.stream is stderr]
        try:
            with bar:
                # Meanwhile sys.stderr is rich's, which writes above the bar: handlers have kept the terminal itself.
                for handler in handlers:
                    handler.setStream(sys.stderr)
                # A terminal whose program was killed must not be left without its cursor.
                self._console.show_cursor(True)
                title = f"rank {self._rank} {task.kind} {task.server_round}/{task.total_rounds}"
                bar.add_task(title, total=None, batches="", note="")
                self._bar = bar
                yield
        finally:
            self._bar = None
            for handler in handlers:
                handler.setStream(stderr)

    def update(self, done: int, total: int, loss: float, epochs: int = 1) -> None:
        """Show that a batch is done, and its loss: `done` of `total` over all `epochs`, which are equally long."""
        if self._bar:
            epoch = f"epoch {(done - 1) * epochs // total + 1}/{epochs}, " if epochs > 1 else ""
            batches, note = f"{done}/{total}", f"{epoch}loss {loss:.4f}"
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, batches=batches, note=note)
