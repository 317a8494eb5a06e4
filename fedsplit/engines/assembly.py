"""A server put together, for both engines, with those who watch it: the terminal, the trackers, the plot at its end."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.cli import count
from fedsplit.disk.files import Buffer, write_chunks
from fedsplit.disk.remote_store import open_remote
from fedsplit.errors import MissingPackageError
from fedsplit.run.directory import Run
from fedsplit.watch.plot import draw
from fedsplit.watch.trackers import TrackerThread, parse_tracker

if TYPE_CHECKING:
    from fedsplit.server.round import Rounds
    from fedsplit.server.server import Server
    from fedsplit.server.settings import ServerSettings
    from fedsplit.split_learning.uppers import Uppers
    from fedsplit.wire.protocol import Engine

log = logging.getLogger("fedsplit")

_PACKAGES = ("fedsplit", "flwr", "torch", "numpy", "safetensors", "grpcio", "filelock")


@contextmanager
def open_server(
    settings: ServerSettings, engine: Engine, *, join_key: bytes | None = None, live: bool = False,
    command: Sequence[str] = (), uppers: Uppers | None = None, rounds: Callable[..., Rounds] | None = None,
) -> Iterator[Server]:  # fmt: skip
    """Open the run, make its server, and watch it, with a `live` table; `command`, as typed, is noted for the report.

    With `uppers` the model is cut; `join_key` and `rounds` are those of `Server`.
    """
    from fedsplit.aggregation.spec import BUILTIN_RULES
    from fedsplit.aggregation.staleness import check_staleness
    from fedsplit.codecs.spec import check_installed
    from fedsplit.server.server import Server, make_strategy

    for text in settings.tracker:
        parse_tracker(text)
    # What is not built in is made before the run is opened: opening puts the earlier run aside, and a mistake must not
    # do that. The built-in rules were checked with the flags; to make them imports torch, and clients would wait.
    is_built_in = settings.strategy is None and all(
        (spec.inner or spec).name in BUILTIN_RULES for spec in settings.rules
    )
    strategy = None if is_built_in else make_strategy(settings)
    check_staleness(settings.staleness)
    check_installed(settings.wire)
    shown = {**settings.to_run_config(), "engine": engine.name}
    shown |= {"split-learning": uppers.mode} if uppers else {}
    run = Run(
        settings.checkpoint_dir, keep_checkpoints=settings.keep_checkpoints, resume=settings.resume,
        settings=shown,
        initial=partial(_read, settings.initial_checkpoint) if settings.initial_checkpoint else None,
    )  # fmt: skip
    with uppers.taking_part() if uppers else nullcontext(), run:
        remote = open_remote(settings.payload_store)
        server = Server(
            run, settings, remote=remote, join_key=join_key, engine=engine, strategy=strategy,
            rounds=rounds or (uppers.rounds if uppers else _make_rounds),
        )  # fmt: skip
        run.note_session(command=shlex.join(command), software=_software())
        with uppers.telling(server) if uppers else nullcontext(), watching(server, settings, live=live):
            yield server


@contextmanager
def watching(server: Server, settings: ServerSettings, *, live: bool) -> Iterator[None]:
    """Watch a server for the length of a block, with a `live` table if there is a terminal, and plot what came out."""
    run = server.run
    with ExitStack() as stack:
        for text in settings.tracker:
            server.observers.add(stack.enter_context(closing(TrackerThread(text, run))))
        if live:
            from rich.console import Console

            from fedsplit.watch.console import LiveConsole

            console = Console(stderr=True, highlight=False)
            if console.is_terminal and not console.is_dumb_terminal:
                title = f"fedsplit run {run.run_id}, {count(settings.rounds, 'round')}"
                table = LiveConsole(console, title, run.history.lines, asynchronous=settings.is_asynchronous)
                server.observers.add(stack.enter_context(table))
        yield
    server.end_at_signals()
    lines = run.history.lines
    if server.failure is not None or not lines:
        return
    try:
        # The clients have been told of the end by now: matplotlib takes a second to import.
        write_chunks(run.places.final_plot, [draw(lines)])
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


def _make_rounds(**parts: Any) -> Rounds:
    # Late: they import torch, and clients would wait.
    if parts["settings"].is_asynchronous:
        from fedsplit.asynchronous.rounds import AsyncRounds

        return AsyncRounds(**parts)
    if parts["settings"].secure_terms:
        from fedsplit.server.secure_rounds import SecureRounds

        return SecureRounds(**parts)
    from fedsplit.server.round import Rounds

    return Rounds(**parts)


def _read(path: Path) -> list[Buffer]:
    # Late: it imports torch, and clients would wait.
    from fedsplit.states.state_dict import read_initial_checkpoint

    return read_initial_checkpoint(path)
