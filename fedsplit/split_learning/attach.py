"""What a server with ``--split-learning`` has besides: the upper part's exchange directory, and rounds of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedsplit.errors import RunStoppedError, UsageError
from fedsplit.run.directory import Run
from fedsplit.server.settings import ServerSettings
from fedsplit.split_learning.beyond import Beyond

if TYPE_CHECKING:
    from fedsplit.server.round import Rounds
    from fedsplit.server.server import Server


class UpperHalf:
    """Makes a server's rounds those of a model that is cut, and tells the upper part's trainer how the run ended."""

    def __init__(self, settings: ServerSettings, run: Run) -> None:
        self._settings, self._run = settings, run
        self._beyond = Beyond(settings.exchange_dir, run.payloads, settings.client_wait)

    def rounds(self, **parts: Any) -> Rounds:
        """Make the rounds; imports torch."""
        from fedsplit.split_learning.rounds import SplitRounds

        self._beyond.stop = parts["stop"]
        return SplitRounds(**parts, beyond=self._beyond, mode=self._settings.split_learning or "")

    @contextmanager
    def serving(self, server: Server) -> Iterator[None]:
        """Be the client of the upper part's trainer for the length of the block, and tell it then that it is over."""
        with self._beyond.taking_part():
            try:
                yield
            finally:
                failure = server.failure
                stopped = "stopped" if isinstance(failure, RunStoppedError) else "failed"
                is_complete = failure is None and self._run.history.last_round() >= self._settings.rounds
                outcome = "complete" if is_complete else stopped
                self._beyond.finish(self._run.run_id, outcome, str(failure or ""))


def check_engine(settings: ServerSettings, engine: str) -> None:
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
