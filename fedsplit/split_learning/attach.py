"""What a server with ``--split-learning`` has besides: the upper part's exchange directory, and rounds of their own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.errors import FedSplitError, RunStoppedError, UsageError
from fedsplit.server.settings import ServerSettings
from fedsplit.split_learning.beyond import Beyond
from fedsplit.split_learning.order import MODES

if TYPE_CHECKING:
    from fedsplit.server.round import Rounds
    from fedsplit.server.server import Server

log = logging.getLogger("fedsplit")


class UpperHalf:
    """Makes a server's rounds those of a model that is cut, and tells the upper part's trainer how the run ended.

    `mode` is one of `fedsplit.split_learning.order.MODES`. Raises UsageError for what it cannot go with yet.
    """

    def __init__(self, settings: ServerSettings, mode: str, exchange_dir: Path, engine: str) -> None:
        _check(settings, mode, engine)
        self._settings, self.mode = settings, mode
        self._beyond = Beyond(exchange_dir, settings.client_wait)
        self.taking_part = self._beyond.taking_part

    @contextmanager
    def telling(self, server: Server) -> Iterator[None]:
        """Tell the trainer at the end of the block how the server's run ended."""
        try:
            yield
        finally:
            failure = server.failure
            is_complete = failure is None and server.run.history.last_round() >= self._settings.rounds
            outcome = "stopped" if isinstance(failure, RunStoppedError) else "failed"
            try:
                self._beyond.finish(server.run.run_id, "complete" if is_complete else outcome, str(failure or ""))
            except FedSplitError as exc:
                log.error("the trainer of the upper part could not be told that the run is over: %s", exc)

    def rounds(self, **parts: Any) -> Rounds:
        """Make the rounds, of what `fedsplit.server.round.Rounds` is made of."""
        # Late: it imports torch, and clients would wait.
        from fedsplit.split_learning.rounds import SplitRounds

        self._beyond.open(parts["run"].payloads, parts["stop"])
        return SplitRounds(**parts, beyond=self._beyond, mode=self.mode)


def _check(settings: ServerSettings, mode: str, engine: str) -> None:
    if mode not in MODES:
        raise UsageError(f"--split-learning {mode}: expected one of {', '.join(MODES)}")
    if engine != "embedded":
        raise UsageError(
            f"--split-learning works with --engine embedded only: on a {engine} each message takes seconds, and every "
            "batch needs several"
        )
    if settings.balance:
        raise UsageError("--split-learning cannot go with --balance: all ranks train the upper part batch by batch")
    if settings.is_asynchronous:
        raise UsageError(
            "--split-learning cannot go with --buffer or --merge-after: the upper part is trained step by step with "
            "the ranks, so there is no update of a single rank that could be late"
        )
    if settings.payload_store not in ("auto", "none"):
        raise UsageError("--split-learning works with --payload-store auto or none; a URL is not supported yet")
