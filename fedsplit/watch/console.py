"""The server's terminal: the split, a table of rounds that grows in place, and below it who is waited for.

What is logged scrolls by above the table. Without a terminal none of this is used: the log has the same facts.
"""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fedsplit.run.events import format_bytes
from fedsplit.run.history import Line, PartRow
from fedsplit.run.time_account import describe_privacy
from fedsplit.server.observer import Observer
from fedsplit.watch.rounds import cells, columns, headings

log = logging.getLogger("fedsplit")

# The tables' frames, the line below them, and a few lines of what was in the terminal before.
_LINES_AROUND = 12
_COLUMN_WIDTH = 13
_DOING = {"train": "training", "evaluate": "evaluating"}
_MERGED_NEXT = "waiting for a merge"
_SHOWN_IN_TABLES = ("split", "round")


@dataclass(frozen=True)
class _Work:
    """What a rank does, from the state of which round, and what it lacks, if anything."""

    doing: str
    base_round: int
    lacks: str | None = None


class LiveConsole(Observer):
    """Shows a run on a terminal for the length of a block; takes the place of the log's handler meanwhile.

    The `title` stands above the rounds; `lines` are the history so far, of a run that is resumed. Of `asynchronous`
    rounds every rank is shown with what it does, and how many merges its state is behind.
    """

    def __init__(self, console: Console, title: str, lines: Sequence[Line] = (), *, asynchronous: bool = False) -> None:
        self._console, self._title, self._lines = console, title, list(lines)
        self._asynchronous, self._newest = asynchronous, 0
        self._split: list[PartRow] = []
        self._activity, self._since = "starting", time.monotonic()
        self._ranks: dict[int, _Work] = {}
        self._lock = threading.Lock()
        self._handlers: list[logging.Handler] = []
        self._spinner = Spinner("dots")
        self._live = Live(console=console, refresh_per_second=8, get_renderable=self.render)

    def __enter__(self) -> Self:
        self._handlers = log.handlers[:]
        log.handlers[:] = [_ConsoleHandler(self._console, self._handlers)]
        self._live.start()
        # A terminal whose program was killed must not be left without its cursor.
        self._console.show_cursor(True)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        with self._lock:
            self._activity = ""
        self._live.stop()
        log.handlers[:] = self._handlers

    def split_resolved(self, rows: Sequence[PartRow]) -> None:
        with self._lock:
            self._split = list(rows)

    def clients_awaited(self, ranks: Sequence[int], needed: int) -> None:
        here = f" (rank {', '.join(map(str, ranks))})" if ranks else ""
        self._begin(f"waiting for clients: {len(ranks)} of {needed} are here{here}")

    def asked(self, kind: str, server_round: int, total_rounds: int, ranks: Sequence[int]) -> None:
        doing, newest = _DOING[kind], server_round - (kind == "train")
        with self._lock:
            self._newest = newest
            self._ranks |= {rank: _Work(doing, newest) for rank in ranks}
        self._begin(f"round {server_round} of {total_rounds}" + ("" if self._asynchronous else f": {doing}"))

    def waiting(self, rank: int, what: str | None) -> None:
        with self._lock:
            if rank in self._ranks:
                self._ranks[rank] = replace(self._ranks[rank], lacks=what)

    def answered(self, rank: int, refused: str | None) -> None:
        with self._lock:
            work = self._ranks.pop(rank, None)
            if work and self._asynchronous and work.doing == _DOING["train"] and refused is None:
                self._ranks[rank] = replace(work, doing=_MERGED_NEXT, lacks=None)

    def round_ended(self, line: Line, total_rounds: int) -> None:
        with self._lock:
            self._lines.append(line)
            self._newest = line["round"]
            for rank in map(int, line.get("clients", {})):
                if rank in self._ranks and self._ranks[rank].doing == _MERGED_NEXT:
                    del self._ranks[rank]
        is_last = line["round"] >= total_rounds
        self._begin("the last round is done: writing its checkpoint" if is_last else "starting the next round")

    def render(self) -> RenderableType:
        """Return all that is shown."""
        with self._lock:
            shown: list[RenderableType] = []
            room = self._console.height - _LINES_AROUND
            if self._split:
                shown += [Text(), _split_table(self._split), Text()]
                room -= len(self._split) + 4
            if self._lines:
                shown.append(rounds_table(self._lines, self._title, width=self._console.width, room=room))
            else:
                shown.append(Text(self._title, "bold"))
            if self._activity:
                self._spinner.update(text=Text(self._describe()))
                shown.append(self._spinner)
            return Group(*shown)

    def _begin(self, activity: str) -> None:
        with self._lock:
            if activity != self._activity:
                self._since = time.monotonic()
            self._activity = activity

    def _describe(self) -> str:
        text, seconds = self._activity, time.monotonic() - self._since
        groups: dict[str, list[str]] = {}
        for rank, work in sorted(self._ranks.items()):
            behind = self._newest - work.base_round if self._asynchronous else 0
            notes = [f"no {work.lacks}"] * bool(work.lacks) + [f"{behind} behind"] * bool(behind)
            what = f"{work.doing}:" if self._asynchronous else "waiting for"
            groups.setdefault(what, []).append(f"{rank} ({', '.join(notes)})" if notes else str(rank))
        text += "".join(f", {what} rank {', '.join(ranks)}" for what, ranks in groups.items())
        return text + (f", {seconds:.0f} s" if seconds >= 1 else "")


def _split_table(rows: Sequence[PartRow]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("part", "rule", "entries", "bytes"):
        table.add_column(heading, justify="right" if heading in ("entries", "bytes") else "left", overflow="fold")
    for row in rows:
        table.add_row(Text(row.part), Text(row.rule, "bold"), f"{row.entries:,}", format_bytes(row.bytes))
    return table


def rounds_table(lines: Sequence[Line], title: str, *, width: int, room: int) -> Table:
    """Return as many of the newest rounds as there is `room` for; metrics that do not fit the `width` are left out."""
    room = max(3, room)
    metrics = columns(lines)[: max(1, width // _COLUMN_WIDTH - 5)]
    names = headings(metrics)
    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for name in names:
        # As text: what a trainer calls its metrics must not be read as markup.
        table.add_column(Text(name), justify="right")
    if len(lines) > room:
        table.add_row(*["…"] * len(names), style="dim")
    if lines and (spent := describe_privacy(lines[-1])):
        table.caption, table.caption_justify = spent, "left"
    for line in lines[-room:]:
        table.add_row(*cells(line, metrics), style="yellow" if line.get("refused") else None)
    return table


class _ConsoleHandler(logging.Handler):
    """Prints records above the table, but for those that are in it."""

    def __init__(self, console: Console, replaced: Sequence[logging.Handler]) -> None:
        super().__init__()
        self._console = console
        if replaced:
            self.setFormatter(replaced[0].formatter)

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "event", None) not in _SHOWN_IN_TABLES:
            style = "red" if record.levelno >= logging.ERROR else "yellow" if record.levelno >= logging.WARNING else ""
            self._console.print(Text(self.format(record), style), soft_wrap=True)
