"""A federation in one process: the server's real rounds, strategy, store and checkpoints, and ranks that are threads.

For what depends on who is ready when: a rank sleeps, is held back, or goes away, as a test or a benchmark wants it.
There is no Flower engine, no exchange directory, and no second process in it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flwr.server.client_proxy import ClientProxy

from fedsplit.asynchronous.rounds import AsyncRounds
from fedsplit.disk.checkpoints import BackgroundWriter
from fedsplit.disk.files import Buffer
from fedsplit.disk.payload_store import PayloadStore
from fedsplit.run.directory import Run
from fedsplit.server.observer import Observer
from fedsplit.server.peer import PeerLostError, RankProxy, Reply
from fedsplit.server.roster import Roster
from fedsplit.server.round import Rounds
from fedsplit.server.server import make_strategy
from fedsplit.server.settings import ServerSettings
from fedsplit.states.extra import join, separate
from fedsplit.states.state_dict import StateDict, decode, encode
from fedsplit.wire.answers import ResultPayload
from fedsplit.wire.protocol import EMBEDDED

# Called with a task (kind, server_round, total_rounds, config, state_dict, extra, should_stop), as a loop body is.
Trains = Callable[[Any], tuple[StateDict, int]]
Evaluates = Callable[[Any], tuple[float, int, dict[str, float]]]


def _no_evaluation(task: Any) -> tuple[float, int, dict[str, float]]:
    return 0.0, 1, {}


@dataclass
class InsideRank:
    """A client and its trainer as threads of this process; it does what it is asked for once, as a real one."""

    rank: int
    train: Trains
    evaluate: Evaluates = _no_evaluation
    store: PayloadStore | None = None
    # (kind, round, digest) of all that was begun, in order; a test looks at it.
    begun: list[tuple[str, int, str | None]] = field(default_factory=list)
    is_lost: bool = False
    sees_store: bool = True
    held: str | None = None
    # The newest of its threads, for whoever has to see that it has ended.
    worker: threading.Thread | None = None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: tuple[str, int, str | None] | None = None
        self._done = threading.Event()
        self._reply = Reply(status="error")
        self._chunks: list[Buffer] = []
        self.proxy: ClientProxy = RankProxy(self.rank)

    def ask(self, record: Mapping[str, Any], blob: bytes | None, *, most_s: float) -> Reply:
        """Answer as `fedsplit.server.peer.Peer` does."""
        if self.is_lost:
            raise PeerLostError("lost")
        asked = (record["kind"], record["server_round"], record["digest"])
        with self._lock:
            if asked != self._asked:
                # As in an exchange directory, what is newer takes the place of what is there.
                self._asked, self._done = asked, threading.Event()
                self.begun.append(asked)
                self.worker = threading.Thread(target=self._work, args=(record, asked, self._done), daemon=True)
                self.worker.start()
            done = self._done
        if done.wait(record["hold_s"]):
            if self._chunks and self.store:
                # As from an exchange directory, into the store of whichever server asks.
                self.store.put(self._chunks)
            return self._reply
        if record["cancel"]:
            with self._lock:
                self._asked = None
            return Reply(status="cancelled")
        return Reply(status="working")

    def tell(self, record: Mapping[str, Any]) -> None:
        """Hear of the end."""

    def _work(self, record: Mapping[str, Any], asked: Any, done: threading.Event) -> None:
        assert self.store is not None
        began = time.monotonic()
        state, extra = (
            separate(decode(self.store.path(record["digest"]).read_bytes())) if record["digest"] else ({}, {})
        )
        task = SimpleNamespace(
            kind=record["kind"], server_round=record["server_round"], total_rounds=record["total_rounds"],
            config=record["config"], state_dict=state, extra=extra, should_stop=lambda: self._asked != asked,
        )  # fmt: skip
        try:
            reply = self._answer(task, began)
        except Exception as exc:  # noqa: BLE001  (as a trainer, it reports whatever its code raises)
            reply = Reply(status="error", error={"type": type(exc).__name__, "message": str(exc)})
        with self._lock:
            if self._asked == asked:
                self._reply = reply
                done.set()

    def _answer(self, task: Any, began: float) -> Reply:
        assert self.store is not None
        if task.kind == "evaluate":
            self._chunks = []
            loss, number, metrics = self.evaluate(task)
            seconds = time.monotonic() - began
            return Reply(status="ok", num_examples=number, loss=loss, metrics=metrics, seconds=seconds)
        state, number = self.train(task)
        # A benchmark with a clock of its own says how long it took by that.
        seconds, extra = getattr(task, "seconds", time.monotonic() - began), getattr(task, "sent", {})
        self._chunks = [b"".join(encode(join(state, extra)))]
        stored = self.store.put(self._chunks)
        payload = ResultPayload(digest=stored.digest, bytes=stored.bytes, via="store")
        return Reply(status="ok", num_examples=number, seconds=seconds, payload=payload)


class InsideRoster(Roster):
    """Ranks that are here from the beginning, or come and go as `arrive` and `drop` say."""

    def arrive(self, peer: Any) -> None:
        """Let a rank be connected from now on."""
        with self._changed:
            self._peers[peer.rank] = peer
            self._rank_proxies.setdefault(peer.rank, RankProxy(peer.rank))
            self._changed.notify_all()


@dataclass
class Federation:
    """A server's run in a directory, on ranks of this process."""

    directory: Path
    settings: ServerSettings
    initial: StateDict
    ranks: list[InsideRank]
    observer: Observer = field(default_factory=Observer)
    stop: threading.Event = field(default_factory=threading.Event)
    make_rounds: Callable[..., Rounds] | None = None
    # The rounds, for a test that looks on.
    rounds: Rounds | None = None
    roster: InsideRoster | None = None

    def run(self, *, resume: bool = False) -> Run:
        """Run to the end; returns the run, closed."""

        def initial() -> list[Buffer]:
            return encode(self.initial)

        run = Run(
            self.directory, keep_checkpoints=self.settings.keep_checkpoints, resume=resume,
            settings=self.settings.to_run_config(), initial=initial,
        )  # fmt: skip
        with run:
            self.roster = InsideRoster(run.run_id, None)
            for each in self.ranks:
                each.store = run.payloads
                if not each.is_lost:
                    self.roster.arrive(each)
            kind = self.make_rounds or (AsyncRounds if self.settings.is_asynchronous else Rounds)
            writer = BackgroundWriter()
            self.rounds = kind(
                run=run, settings=self.settings, strategy=make_strategy(self.settings), roster=self.roster,
                engine=EMBEDDED, remote=None, observer=self.observer, writer=writer, stop=self.stop,
            )  # fmt: skip
            try:
                self.rounds.run_all()
            finally:
                self.stop.set()
                writer.close()
        return run

    def final_state(self) -> StateDict:
        """Return the state of the newest checkpoint."""
        newest = max(self.directory.glob("server/round-*/state.safetensors"))
        return decode(newest.read_bytes())
