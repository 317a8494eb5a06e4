"""The trainers of upper parts: one for all ranks, or under ``sfl-v1`` several, each with the copies of its ranks.

Several do steps at the same time. Each is one more ``--part upper`` with an exchange directory of its own, and of its
task everything holds that `fedsplit.split_learning.beyond` says.

Importing this module imports no torch.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedsplit.disk.identity import Verify
from fedsplit.disk.payload_store import PayloadStore, StoredPayload
from fedsplit.errors import RecordError
from fedsplit.exchange.records import Request
from fedsplit.split_learning.beyond import Beyond

log = logging.getLogger("fedsplit")


class Uppers:
    """All of them: the first in ``<exchange_dir>/upper/``, the k-th in ``<exchange_dir>/upper-<k>/upper/``."""

    def __init__(self, exchange_dir: Path, count: int, wait_s: float, verify: Verify = "auto") -> None:
        places = [exchange_dir, *(exchange_dir / f"upper-{number}" for number in range(2, count + 1))]
        self.all = [Beyond(place, wait_s, verify) for place in places]

    def of(self, rank: int) -> Beyond:
        """Return the one that has a rank's copy: in every round the same, as it keeps the optimizer."""
        return self.all[(rank - 1) % len(self.all)]

    def open(self, store: PayloadStore, stop: threading.Event) -> None:
        """Use a server's store; `stop` is set when its run is being stopped."""
        for each in self.all:
            each.open(store, stop)

    @contextmanager
    def taking_part(self) -> Iterator[None]:
        """Hold the client's role of each for the length of the block; raises RoleTakenError."""
        with ExitStack() as stack:
            for each in self.all:
                stack.enter_context(each.taking_part())
            yield

    def begin(self, request: Request, state: StoredPayload) -> None:
        """Begin a task in each; one whose ranks do no step hears nothing of it."""
        for each in self.all:
            each.begin(request, state)

    def end(self, until: float) -> list[StoredPayload | None]:
        """End the task of each that did a step; returns what they came to. Raises RecordError if none of them ends."""
        found, failures = list[StoredPayload | None](), list[RecordError]()
        for each in self.all:
            try:
                found += [each.end(until)] if each.has_begun else []
            except RecordError as exc:
                log.warning("%s: its ranks do not count", exc)
                failures.append(exc)
        if failures and not found:
            raise failures[0]
        return found

    def answers(self) -> set[str]:
        """Return the digests of what the task's steps gave."""
        return set().union(*(each.answers() for each in self.all))
