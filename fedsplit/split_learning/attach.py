"""What a server with ``--split-learning`` has besides: the upper part's exchange directory, and rounds of their own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.errors import FedSplitError, RunStoppedError, UsageError
from fedsplit.server.settings import ServerSettings
from fedsplit.split_learning.order import MODES
from fedsplit.split_learning.uppers import Uppers

if TYPE_CHECKING:
    from fedsplit.server.round import Rounds
    from fedsplit.server.server import Server

log = logging.getLogger("fedsplit")


class UpperHalf:
    """Makes a server's rounds those of a model that is cut, and tells the upper part's trainer how the run ended.

    `mode` is one of `fedsplit.split_learning.order.MODES`, `trainers` how many train upper parts; raises UsageError for
    another mode, and for what it cannot go with.
    """

    def __init__(self, settings: ServerSettings, mode: str, exchange_dir: Path, trainers: int = 1) -> None:
        if mode not in MODES:
            raise UsageError(f"--split-learning {mode}: expected one of {', '.join(MODES)}")
        if trainers > 1 and mode != "sfl-v1":
            raise UsageError(
                f"--upper-trainers {trainers}: {mode} has one upper part; only sfl-v1 has one for each rank"
            )
        if settings.balance:
            raise UsageError("--split-learning cannot go with --balance: all ranks train the upper part batch by batch")
        if settings.wire:
            raise UsageError(
                "--split-learning cannot go with --wire: a state travels once a round there, activations with every "
                "batch; see --cut-dtype of the trainers"
            )
        if settings.is_asynchronous:
            raise UsageError(
                "--split-learning cannot go with --buffer or --merge-after: the upper part is trained step by step "
                "with the ranks, so there is no update of a single rank that could be late"
            )
        self._settings, self.mode = settings, mode
        self._uppers = Uppers(exchange_dir, trainers, settings.client_wait, settings.verify)
        self.taking_part = self._uppers.taking_part

    @contextmanager
    def telling(self, server: Server) -> Iterator[None]:
        """Tell the trainer at the end of the block how the server's run ended."""
        try:
            yield
        finally:
            failure = server.failure
            is_complete = failure is None and server.run.history.last_round() >= self._settings.rounds
            outcome = "stopped" if isinstance(failure, RunStoppedError) else "failed"
            for each in self._uppers.all:
                try:
                    each.finish(server.run.run_id, "complete" if is_complete else outcome, str(failure or ""))
                except FedSplitError as exc:
                    log.error("the trainer of the upper part could not be told that the run is over: %s", exc)

    def rounds(self, **parts: Any) -> Rounds:
        """Make the rounds, of what `fedsplit.server.round.Rounds` is made of."""
        # Late: it imports torch, and clients would wait.
        from fedsplit.split_learning.rounds import SplitRounds

        self._uppers.open(parts["run"].payloads, parts["stop"])
        # The next training starts from another payload than the evaluation, and cannot come along with it.
        parts["engine"] = replace(parts["engine"], asks_ahead=False)
        return SplitRounds(**parts, beyond=self._uppers, mode=self.mode)
