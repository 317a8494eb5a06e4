"""A server put together, for both engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.disk.files import Buffer
from fedsplit.watch.trackers import parse_tracker

if TYPE_CHECKING:
    from fedsplit.server.round import Rounds
    from fedsplit.server.server import Server
    from fedsplit.server.settings import ServerSettings
    from fedsplit.split_learning.attach import UpperHalf
    from fedsplit.wire.protocol import Engine


def check_trackers(settings: ServerSettings) -> None:
    """Refuse a tracker that does not exist before anything is started; raises UsageError."""
    for text in settings.tracker:
        parse_tracker(text)


@contextmanager
def open_server(
    settings: ServerSettings, engine: Engine, *, join_key: bytes | None = None, live: bool = False,
    command: Sequence[str] = (), upper: UpperHalf | None = None, rounds: Callable[..., Rounds] | None = None,
) -> Iterator[Server]:  # fmt: skip
    """Open the run, make its server, and watch it: with a `live` table, and `command`, as typed, in the report.

    With a `join_key` a client must prove that it knows it before it takes part. With an `upper` half the model is cut.
    `rounds` makes what runs the rounds, instead of what the settings ask for.
    """
    from fedsplit.aggregation.spec import BUILTIN_RULES
    from fedsplit.aggregation.staleness import check_staleness
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
    check_staleness(settings.staleness)
    shown = {**settings.to_run_config(), "engine": engine.name}
    shown |= {"split-learning": upper.mode} if upper else {}
    run = Run(
        settings.checkpoint_dir, keep_checkpoints=settings.keep_checkpoints, resume=settings.resume,
        settings=shown,
        initial=partial(_read, settings.initial_checkpoint) if settings.initial_checkpoint else None,
    )  # fmt: skip
    with upper.taking_part() if upper else nullcontext(), run:
        remote = open_remote(settings.payload_store)
        server = Server(
            run, settings, remote=remote, join_key=join_key, engine=engine, strategy=strategy,
            rounds=rounds or (upper.rounds if upper else _async_rounds if settings.is_asynchronous else None),
        )  # fmt: skip
        with (
            upper.telling(server) if upper else nullcontext(),
            watching(server, live=live, rounds=settings.rounds, trackers=settings.tracker, command=command),
        ):
            yield server


def _async_rounds(**parts: Any) -> Rounds:
    # Late: it imports torch, and clients would wait.
    from fedsplit.asynchronous.rounds import AsyncRounds

    return AsyncRounds(**parts)


def _read(path: Path) -> list[Buffer]:
    # Late: it imports torch, and clients would wait.
    from fedsplit.states.state_dict import read_initial_checkpoint

    return read_initial_checkpoint(path)
