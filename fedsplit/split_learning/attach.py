"""What a server with ``--split-learning`` has besides: the upper part's exchange directory, and rounds of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedsplit.errors import FedSplitError, RunStoppedError, UsageError
from fedsplit.server.settings import ServerSettings
from fedsplit.split_learning.beyond import Beyond

if TYPE_CHECKING:
    from fedsplit.server.round import Rounds
    from fedsplit.server.server import Server

log = logging.getLogger("fedsplit")


class UpperHalf:
    """Makes a server's rounds those of a model that is cut, and tells the upper part's trainer how the run ended.

    Without ``--split-learning`` it does nothing.
    """

    def __init__(self, settings: ServerSettings, engine: str) -> None:
        _check(settings, engine)
        self._settings, self._mode = settings, settings.split_learning or ""
        self._beyond = Beyond(settings.exchange_dir, settings.client_wait) if self._mode else None
        # What `fedsplit.server.server.Server` is given.
        self.rounds: Callable[..., Rounds] | None = self._rounds if self._mode else None

    @contextmanager
    def taking_part(self) -> Iterator[None]:
        """Be the client of the upper part's trainer for the length of the block; raises RoleTakenError."""
        if self._beyond is None:
            yield
            return
        with self._beyond.taking_part():
            yield

    @contextmanager
    def telling(self, server: Server) -> Iterator[None]:
        """Tell the trainer at the end of the block how the server's run ended."""
        try:
            yield
        finally:
            if self._beyond is not None:
                failure = server.failure
                is_complete = failure is None and server.run.history.last_round() >= self._settings.rounds
                outcome = "stopped" if isinstance(failure, RunStoppedError) else "failed"
                try:
                    self._beyond.finish(server.run.run_id, "complete" if is_complete else outcome, str(failure or ""))
                except FedSplitError as exc:
                    log.error("the trainer of the upper part could not be told that the run is over: %s", exc)

    def _rounds(self, **parts: Any) -> Rounds:
        # Late: it imports torch, and clients would wait.
        from fedsplit.split_learning.rounds import SplitRounds

        assert self._beyond is not None
        self._beyond.open(parts["run"].payloads, parts["stop"])
        return SplitRounds(**parts, beyond=self._beyond, mode=self._mode)


def _check(settings: ServerSettings, engine: str) -> None:
    """Refuse what a model that is cut cannot go with yet; raises UsageError."""
    if settings.split_learning is None:
        return
    if engine != "embedded":
        raise UsageError(
            f"--split-learning works with --engine embedded only: on a {engine} each message takes seconds, and every "
            "batch needs several"
        )
    if settings.payload_store not in ("auto", "none"):
        raise UsageError("--split-learning works with --payload-store auto or none; a URL is not supported yet")
