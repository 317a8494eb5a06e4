"""Who watches a server's run: the terminal, the trackers, and the plot that is drawn as it ends."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import TYPE_CHECKING

from fedsplit.errors import MissingPackageError
from fedsplit.watch.plot import write_plot
from fedsplit.watch.trackers import TrackerThread

if TYPE_CHECKING:
    from fedsplit.server.server import Server

log = logging.getLogger("fedsplit")

_PACKAGES = ("fedsplit", "flwr", "torch", "numpy", "safetensors", "grpcio", "filelock")


@contextmanager
def watching(
    server: Server, *, live: bool, rounds: int, trackers: Sequence[str] = (), command: Sequence[str] = ()
) -> Iterator[None]:
    """Watch a server, whose run is open, for the length of a block.

    With `live` there is a table of the rounds, of which the last has the number `rounds`, if there is a terminal. The
    `trackers` are as given to ``--tracker``. What the server was started with, `command`, is noted for the report.
    """
    run = server.run
    run.note_session(command=shlex.join(command), software=_software())
    with ExitStack() as stack:
        for text in trackers:
            server.observe(stack.enter_context(closing(TrackerThread(text, run))))
        if live:
            from rich.console import Console

            from fedsplit.watch.console import LiveConsole

            console = Console(stderr=True, highlight=False)
            if console.is_terminal and not console.is_dumb_terminal:
                title = f"fedsplit run {run.run_id}, {rounds} round{'' if rounds == 1 else 's'}"
                server.observe(stack.enter_context(LiveConsole(console, title, run.history.lines)))
        yield
    server.end_at_signals()
    lines = run.history.lines
    if server.failure is not None or not lines:
        return
    try:
        # The clients have been told of the end by now: matplotlib takes a second to import.
        write_plot(lines, run.places.final_plot)
    except MissingPackageError as exc:
        log.info("no plot is drawn: %s", exc)
    except Exception as exc:  # noqa: BLE001  (a picture is no reason for a run to have failed)
        log.warning("no plot was drawn (%s: %s); see python -m fedsplit plot", type(exc).__name__, exc)


def _software() -> dict[str, str]:
    """Return the versions that a run depends on."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
