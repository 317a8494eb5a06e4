"""The server as Flower runs it: it makes the strategy, runs the rounds, and tells the clients how it ended."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING

from flwr.common import ReconnectIns
from flwr.server import History as FlowerHistory
from flwr.server import Server as FlowerServer
from flwr.server.server import reconnect_clients

from fedsplit.disk.checkpoints import BackgroundWriter
from fedsplit.disk.remote_store import RemoteStore
from fedsplit.errors import CheckpointError, ExchangeError, FedSplitError, RunFailedError, RunStoppedError
from fedsplit.run.directory import Run
from fedsplit.server.observer import Observers
from fedsplit.server.roster import Roster
from fedsplit.server.settings import ServerSettings
from fedsplit.wire.protocol import EMBEDDED, Engine

if TYPE_CHECKING:
    from fedsplit.server.round import Rounds
    from fedsplit.server.strategy import StreamingStrategy

log = logging.getLogger("fedsplit")

_FAREWELL_S = 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _SignalError(KeyboardInterrupt):
    """Raised in the main thread by a signal, past every handler of ordinary errors; the program ends with its text."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.name = signal.Signals(number).name
        self.exit_code = 128 + number


class Server(FlowerServer):
    """Runs a federation on the connected ranks, into an open `Run`; what ended it early is its ``failure``.

    ``remote`` is the store at ``--payload-store URL``, for clients on other machines, ``join_key`` that of `Roster`.
    Without a ``strategy`` that of the settings is made, once the server listens. ``rounds`` makes what runs the rounds,
    of the fields of `Rounds`; that class itself without it.
    """

    def __init__(
        self, run: Run, settings: ServerSettings, *, remote: RemoteStore | None = None, join_key: bytes | None = None,
        engine: Engine = EMBEDDED, strategy: StreamingStrategy | None = None,
        rounds: Callable[..., Rounds] | None = None,
    ) -> None:  # fmt: skip
        self.run = run
        self.failure: FedSplitError | None = None
        self._settings = settings
        self._remote = remote
        self._engine = engine
        # Whoever is to watch is added before `fit`.
        self.observers = Observers()
        self._writer = BackgroundWriter()
        self._stop = threading.Event()
        self._told = False
        self._given_strategy = strategy
        self._make_rounds = rounds
        store = remote or (run.payloads if settings.payload_store == "auto" else None)
        self._roster = Roster(run.run_id, store, join_key=join_key, ping_s=engine.ping_s, observer=self.observers)
        super().__init__(client_manager=self._roster)

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[FlowerHistory, float]:
        """Run all rounds; Flower calls this, and disconnects the clients after it. So errors are kept, not raised."""
        began = time.monotonic()
        try:
            self._catch_signals()
            self._run_rounds()
            self._writer.close()
            self._tell_all("complete", "", _FAREWELL_S)
        except _SignalError as exc:
            if self._told:
                raise
            done, rounds = self.run.history.last_round(), self._settings.rounds
            self.failure = RunStoppedError(f"stopped by {exc.name} after {done} of {rounds} rounds; --resume goes on")
        except (ExchangeError, OSError) as exc:
            # The server has no exchange: what it could not write or read is its run's.
            self.failure = CheckpointError(str(exc))
        except FedSplitError as exc:
            self.failure = exc
        except Exception as exc:  # anything else must not leave the clients waiting and the port taken
            log.exception("the server failed")
            self.failure = RunFailedError(f"the server failed: {type(exc).__name__}: {exc}")
        if self.failure:
            # Raised while the clients are told, a signal would leave the port open.
            self.end_at_signals()
            self._end_early(self.failure)
        return FlowerHistory(), time.monotonic() - began

    def disconnect_all_clients(self, timeout: float | None) -> None:
        """Let every connection end; the ranks have been told before."""
        with suppress(Exception):  # Flower closes the port after this, and only if nothing is raised
            reconnect_clients([(each, ReconnectIns(seconds=None)) for each in self._roster.connections()], None, 10.0)

    def _run_rounds(self) -> None:
        # Here and not at the top: it imports torch, and the clients can connect meanwhile.
        from fedsplit.server.round import Rounds

        strategy = self._given_strategy or make_strategy(self._settings)
        self.set_strategy(strategy)
        (self._make_rounds or Rounds)(
            run=self.run, settings=self._settings, strategy=strategy, roster=self._roster, engine=self._engine,
            remote=self._remote, observer=self.observers, writer=self._writer, stop=self._stop,
        ).run_all()  # fmt: skip

    def _end_early(self, failure: FedSplitError) -> None:
        self._stop.set()
        outcome = "stopped" if isinstance(failure, RunStoppedError) else "failed"
        for last in (self._writer.close, lambda: self._tell_all(outcome, str(failure), 0.0)):
            try:
                last()
            except Exception as exc:  # noqa: BLE001  (whatever it is, the clients must be told and the port closed)
                if exc is not failure:
                    log.error("%s", exc)

    def _tell_all(self, outcome: str, reason: str, farewell_s: float) -> None:
        if not self._told:
            self._told = True
            try:
                self._roster.finish(outcome, reason, farewell_s)
            except Exception:  # whatever it was, they were not told
                self._told = False
                raise

    def end_at_signals(self) -> None:
        """From now on let a signal end the process at once, with a line.

        An exception, raised in the middle of an import or of a library's callback, may come out as a traceback there.
        """

        def end(number: int, _: FrameType | None) -> None:
            _set_signals(signal.SIG_DFL)
            log.warning("%s", self._describe(number))
            with suppress(FedSplitError):
                self.run.payloads.clear()
            os._exit(128 + number)

        _set_signals(end)

    def _catch_signals(self) -> None:
        """Turn signals into an end of the run that the ranks are told of; a second one ends the process at once."""

        def stop(number: int, _: FrameType | None) -> None:
            _set_signals(signal.SIG_DFL)
            self._stop.set()
            raise _SignalError(number, self._describe(number))

        # Flower has set its own by now, which would end the process without a word to anybody.
        _set_signals(stop)

    def _describe(self, number: int) -> str:
        text = f"interrupted by {signal.Signals(number).name}"
        if not self._told or self.failure:
            return text
        rounds = self._settings.rounds
        return f"{text}; the run is complete: {rounds} of {rounds} rounds, in {self.run.directory}"


def _set_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, handler)


def make_strategy(settings: ServerSettings) -> StreamingStrategy:
    """Make the strategy that the settings name, or that of their rules; raises UsageError. Imports torch."""
    if settings.strategy is not None:
        from fedsplit.server.foreign import ForeignStrategy

        return ForeignStrategy(settings)
    from fedsplit.server.strategy import Strategy

    return Strategy.of(settings)
