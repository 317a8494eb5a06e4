"""The trainers of upper parts, beside a server with ``--split-learning``: one, or under ``sfl-v1`` several.

Several do steps at the same time, each with the copies of its ranks. Each is one more ``--part upper`` with an exchange
directory of its own, and of its task everything holds that `fedsplit.split_learning.beyond` says.

Importing this module imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.disk.payload_store import StoredPayload
from fedsplit.errors import FedSplitError, RecordError, RunStoppedError, UsageError
from fedsplit.exchange.records import Request
from fedsplit.server.settings import ServerSettings
from fedsplit.split_learning.beyond import END, Beyond
from fedsplit.split_learning.order import MODES

if TYPE_CHECKING:
    from fedsplit.server.round import Rounds
    from fedsplit.server.server import Server

log = logging.getLogger("fedsplit")


class Uppers:
    """All of them: the first in ``<exchange_dir>/upper/``, the k-th in ``<exchange_dir>/upper-<k>/upper/``.

    They make a server's rounds those of a model that is cut. `mode` is one of `fedsplit.split_learning.order.MODES`;
    raises UsageError for another mode, and for what it cannot go with.
    """

    def __init__(self, settings: ServerSettings, mode: str, exchange_dir: Path, count: int = 1) -> None:
        if mode not in MODES:
            raise UsageError(f"--split-learning {mode}: expected one of {', '.join(MODES)}")
        if count > 1 and mode != "sfl-v1":
            raise UsageError(f"--upper-trainers {count}: {mode} has one upper part; only sfl-v1 has one for each rank")
        if settings.balance:
            raise UsageError("--split-learning cannot go with --balance: all ranks train the upper part batch by batch")
        if settings.wire:
            raise UsageError(
                "--split-learning cannot go with --wire: a state travels once a round there, activations with every "
                "batch; see --cut-dtype of the trainers"
            )
        if settings.secure_terms:
            raise UsageError(
                "secure(…) cannot go with --split-learning: the upper part is trained beside the server, which sees "
                "the activations of every rank"
            )
        if settings.is_asynchronous:
            raise UsageError(
                "--split-learning cannot go with --buffer or --merge-after: the upper part is trained step by step "
                "with the ranks, so there is no update of a single rank that could be late"
            )
        self.mode, self._settings = mode, settings
        places = [exchange_dir, *(exchange_dir / f"upper-{number}" for number in range(2, count + 1))]
        self.all = [Beyond(place, settings.client_wait, settings.verify) for place in places]

    @contextmanager
    def taking_part(self) -> Iterator[None]:
        """Hold the client's role of each for the length of the block; raises RoleTakenError."""
        with ExitStack() as stack:
            for each in self.all:
                stack.enter_context(each.exchange.hold("client"))
            yield

    @contextmanager
    def telling(self, server: Server) -> Iterator[None]:
        """Tell the trainers at the end of the block how the server's run ended."""
        try:
            yield
        finally:
            failure = server.failure
            is_complete = failure is None and server.run.history.last_round() >= self._settings.rounds
            outcome = "stopped" if isinstance(failure, RunStoppedError) else "failed"
            for each in self.all:
                try:
                    each.side.finish(server.run.run_id, "complete" if is_complete else outcome, str(failure or ""))
                except FedSplitError as exc:
                    log.error("the trainer of the upper part could not be told that the run is over: %s", exc)

    def rounds(self, **parts: Any) -> Rounds:
        """Make the rounds, of what `fedsplit.server.round.Rounds` is made of."""
        # Late: it imports torch, and clients would wait.
        from fedsplit.split_learning.rounds import SplitRounds

        for each in self.all:
            each.open(parts["run"].payloads, parts["stop"])
        # The next training starts from another payload than the evaluation, and cannot come along with it.
        parts["engine"] = replace(parts["engine"], asks_ahead=False)
        return SplitRounds(**parts, beyond=self)

    def of(self, rank: int) -> Beyond:
        """Return the one that has a rank's copy: in every round the same, as it keeps the optimizer."""
        return self.all[(rank - 1) % len(self.all)]

    def begin(self, request: Request, state: StoredPayload) -> None:
        """Begin a task in each; one whose ranks do no step hears nothing of it."""
        for each in self.all:
            each.begin(request, state)

    def end(self, until: float) -> list[StoredPayload | None]:
        """End the task of each that did a step; returns what they came to. Raises RecordError if none of them ends."""
        found, failures = list[StoredPayload | None](), list[RecordError]()
        for each in self.all:
            try:
                found += [each.step(None, {"what": END}, until).payload] if each.has_begun else []
            except RecordError as exc:
                log.warning("%s: its ranks do not count", exc)
                failures.append(exc)
        if failures and not found:
            raise failures[0]
        return found

    def answers(self) -> set[str]:
        """Return the digests of what the task's steps gave, whether or not anybody waited for it."""
        return set().union(*(each.answers() for each in self.all))
