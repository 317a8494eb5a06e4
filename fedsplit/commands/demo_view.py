"""What the demo shows: a live table on a terminal, the same facts as plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from fedsplit.commands.status import format_seconds
from fedsplit.run.history import Line
from fedsplit.watch.console import cells, headings_of, metric_columns, rounds_table

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_REFUSALS_SHOWN = 5
# The table's frame, the line below it, and a few lines of what was in the terminal before.
_LINES_AROUND = 12


class View(AbstractContextManager["View"], Protocol):
    """Shows a run for the length of a block."""

    def show(self, activity: str, lines: Sequence[Line]) -> None:
        """Show what is going on and the rounds so far; called often."""


def make_view(title: str) -> View:
    """Return the view that suits stdout."""
    from rich.console import Console

    console = Console(highlight=False)
    return LiveView(console, title) if console.is_terminal else PlainView(title)


class PlainView:
    """Prints each round, and each change of what is going on, as a line."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._activity = ""
        self._printed = 0

    def __enter__(self) -> Self:
        print(self._title, flush=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Nothing is left to do."""

    def show(self, activity: str, lines: Sequence[Line]) -> None:
        """Print what is new."""
        metrics = metric_columns(lines)
        for line in lines[self._printed :]:
            pairs = zip(headings_of(metrics), cells(line, metrics), strict=True)
            print(" | ".join(f"{name} {cell}" for name, cell in pairs), flush=True)
            for text in refusals([line]):
                print(text, flush=True)
        self._printed = len(lines)
        if activity and activity != self._activity:
            self._activity = activity
            print(activity, flush=True)


class LiveView:
    """A table that grows in place, and below it what is going on and for how long."""

    def __init__(self, console: Console, title: str) -> None:
        from rich.live import Live
        from rich.spinner import Spinner

        self._console = console
        self._title = title
        self._live = Live(console=console, refresh_per_second=8)
        self._spinner = Spinner("dots")
        self._activity = ""
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._live.stop()

    def show(self, activity: str, lines: Sequence[Line]) -> None:
        """Bring the table up to date."""
        now = time.monotonic()
        if activity != self._activity:
            self._activity, self._since = activity, now
        self._live.update(self._render(lines, now - self._since))

    def _render(self, lines: Sequence[Line], seconds: float) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        room = self._console.height - _LINES_AROUND
        table = rounds_table(lines, self._title, width=self._console.width, room=room)
        notes = [Text(text, "yellow") for text in refusals(lines)[-_REFUSALS_SHOWN:]]
        if not self._activity:
            return Group(table, *notes)
        lasted = f" ({format_seconds(seconds)})" if seconds >= 1 else ""
        self._spinner.update(text=Text(self._activity + lasted))
        return Group(table, *notes, self._spinner)


def refusals(lines: Sequence[Line]) -> list[str]:
    """Return a line for each answer that was not counted."""
    return [
        f"round {line['round']}: rank {rank} was not counted: {reason}"
        for line in lines
        for rank, reason in line.get("refused", {}).items()
    ]
