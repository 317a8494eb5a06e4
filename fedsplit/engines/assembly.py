"""A server put together: its run is open and its watchers are in place. Both engines run what this makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedsplit.disk.files import Buffer
from fedsplit.watch.trackers import parse_tracker

if TYPE_CHECKING:
    from fedsplit.server.server import Server
    from fedsplit.server.settings import ServerSettings
    from fedsplit.wire.protocol import Engine


def check_trackers(settings: ServerSettings) -> None:
    """Refuse a tracker that does not exist before anything is started; raises UsageError."""
    for text in settings.tracker:
        parse_tracker(text)


@contextmanager
def open_server(
    settings: ServerSettings,
    engine: Engine,
    *,
    join_key: bytes | None = None,
    live: bool = False,
    command: Sequence[str] = (),
) -> Iterator[Server]:
    """Open the run, make its server, and watch it.

    Parameters
    ----------
    settings
        The server's flags.
    engine
        Which of Flower's engines it will run on.
    join_key
        What a client must prove to know before it takes part.
    live
        Whether a live table is wanted.
    command
        What the server was started with, for the report.
    """
    from fedsplit.aggregation.spec import BUILTIN_RULES
    from fedsplit.disk.remote_store import open_remote
    from fedsplit.run.directory import Run
    from fedsplit.server.server import Server, make_strategy
    from fedsplit.watch.attach import watching

    check_trackers(settings)
    # What is not built in is made before the run is opened: opening puts the earlier run aside, and a mistake must not
    # do that. The built-in rules were checked with the flags; to make them imports torch, and clients would wait.
    is_built_in = settings.strategy is None and all(
        (spec.inner or spec).name in BUILTIN_RULES for spec in settings.rules
    )
    strategy = None if is_built_in else make_strategy(settings)
    run = Run(
        settings.checkpoint_dir,
        keep_checkpoints=settings.keep_checkpoints,
        resume=settings.resume,
        settings={**settings.to_run_config(), "engine": engine.name},
        initial=_reader_of(settings.initial_checkpoint),
    )
    with run:
        server = Server(
            run, settings, remote=open_remote(settings.payload_store), join_key=join_key, engine=engine,
            strategy=strategy,
        )  # fmt: skip
        with watching(server, live=live, rounds=settings.rounds, trackers=settings.tracker, command=command):
            yield server


def _reader_of(path: Path | None) -> Callable[[], list[Buffer]] | None:
    """Return what reads a state to start from, once torch may be imported; None without a file."""
    if path is None:
        return None

    def read() -> list[Buffer]:
        from fedsplit.states.state_dict import read_initial_checkpoint

        return read_initial_checkpoint(path)

    return read
