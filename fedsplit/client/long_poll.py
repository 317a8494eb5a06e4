"""Long polling: a question of the server is held until the trainer's answer is there, or for a second or twenty.

So the server hears of an answer at once, and the client hears at once what else the server wants; how long a training
takes does not matter.
"""

import logging
import time

from fedsplit.errors import FedSplitError, RecordError
from fedsplit.exchange.client_side import ClientSide
from fedsplit.exchange.records import ResultRecord
from fedsplit.exchange.waiting import Watch

log = logging.getLogger("fedsplit")

_TRAINER_CHECK_S, _LATE_CHECK_S = 0.08, 0.5
_BAD_RESULT_S = 5.0


class LongPoll:
    """Waits for the trainer's answers; a task counts as failed after `trainer_wait_s` seconds without a trainer."""

    def __init__(self, side: ClientSide, trainer_wait_s: float) -> None:
        self._side = side
        self._exchange = side.exchange
        self._trainer_wait_s = trainer_wait_s
        self._watch = Watch(self._exchange.result_path, lock=self._exchange.lock_path("trainer"))
        # `time.monotonic` since when no trainer was there, while a task waits for one.
        self.missing_since: float | None = None

    def wait(self, version: int, hold_s: float) -> ResultRecord | None:
        """Wait for the answer to a version; returns None if it does not come within `hold_s` seconds.

        Raises RecordError if there is an answer that stays unreadable, and FedSplitError if no trainer came in time.
        """
        began = time.monotonic()
        bad_since = None
        self._watch.begin()
        while True:
            now = time.monotonic()
            try:
                if self._watch.has_changed() and (result := self._side.result(version)):
                    self.missing_since = None
                    return result
            except RecordError as exc:
                bad_since = bad_since or now
                if now - bad_since > min(hold_s, _BAD_RESULT_S):
                    raise RecordError(f"the trainer's answer cannot be read: {exc}") from exc
            if self._watch.is_look_due():
                self._check_trainer(now)
            if now - began >= hold_s:
                return None
            self._watch.sleep(began + hold_s - now)

    def _check_trainer(self, now: float) -> None:
        who, lock = self._exchange.who, self._exchange.lock_path("trainer")
        if self._exchange.is_held("trainer"):
            if self.missing_since is not None:
                log.info("%s: a trainer is here (%s)", who, self._exchange.owner("trainer"))
            self.missing_since = None
            self._watch.looked(_TRAINER_CHECK_S, is_near=self._exchange.is_near("trainer"))
            return
        missing_s = now - (self.missing_since or now)
        self._watch.looked(max(_TRAINER_CHECK_S, min(missing_s / 20, _LATE_CHECK_S)), is_near=False)
        if self.missing_since is None:
            self.missing_since = now
            wait_s = self._trainer_wait_s
            log.warning("%s: no trainer holds %s; waiting up to %g s for one to start", who, lock, wait_s)
        elif now - self.missing_since > self._trainer_wait_s:
            self.missing_since = None
            raise FedSplitError(
                f"no trainer of {who} for {self._trainer_wait_s:g} s; start the trainer of {who} "
                f"with the same --exchange-dir ({self._exchange.directory.parent})"
            )
