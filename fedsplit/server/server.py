"""The Flower server: rounds, deadlines, checkpoints and the history.

The rounds, and what each promises:

1. The ranks that train are asked at the same time; each update is merged as soon as its turn in rank order comes, and
   dropped. The order in which they arrive never changes the result.
2. The new state's checkpoint is written beside the next step, and is on the disk before the round after it is written.
3. Every connected rank evaluates the new state; the round's line goes to the history, once.

Killed at any moment and started with ``resume``, the server goes on from the newest valid checkpoint.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any

import fedsplit.wire.flower_env  # noqa: F401  (first: it keeps Flower from calling home)

# isort: split
from flwr.server import History as FlowerHistory
from flwr.server import Server as FlowerServer
from flwr.server.strategy import FedAvg

from fedsplit.disk.checkpoints import BackgroundWriter
from fedsplit.disk.payload_store import StoredPayload
from fedsplit.errors import FedSplitError, RecordError, RunFailedError, RunStoppedError, UsageError
from fedsplit.exchange.records import Request
from fedsplit.run.directory import Run
from fedsplit.run.events import event
from fedsplit.run.history import Line, weighted_mean
from fedsplit.server.conversation import Answer, Conversation, StoppedError, Terms, Turns
from fedsplit.server.observer import Observer, Observers, PartRow
from fedsplit.server.phase import Phase, Stages, describe_round, in_parallel, with_loss
from fedsplit.server.roster import Roster
from fedsplit.server.settings import StrategySettings
from fedsplit.wire.protocol import EMBEDDED, Engine

if TYPE_CHECKING:
    from fedsplit.aggregation.base import Update
    from fedsplit.disk.remote_store import RemoteStore
    from fedsplit.server.strategy import Merge, Strategy

log = logging.getLogger("fedsplit")

# Many ranks hold a question longer: each is asked anew at the end, and all of them together must not be a load. A run
# that is stopped waits no longer than that for them.
_RANK_HOLD_S, _MANY_HOLD_S = 0.05, 5.0
_FAREWELL_S = 10.0
_REMIND_S = 30.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _SignalError(BaseException):
    """Raised in the main thread by a signal, past every handler of ordinary errors."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)


class Server(FlowerServer):
    """Runs a federation on the connected ranks.

    Parameters
    ----------
    run
        What is on the disk: run id, checkpoints, history, payload store.
    settings
        How rounds are shaped.
    rounds
        The last round's number.
    round_timeout_s
        Seconds after which what a round has not got is cancelled; None for never.
    client_wait_s
        Seconds that a round waits for a client that went away.
    remote
        The store at ``--payload-store URL``, for clients on other machines.
    offer_store
        Whether clients on this machine may exchange payloads by reference.
    join_key
        What a client must prove to know before it takes part; None lets everybody in who can connect.
    engine
        Which of Flower's engines this runs on.
    """

    def __init__(
        self,
        run: Run,
        settings: StrategySettings,
        *,
        rounds: int,
        round_timeout_s: float | None = None,
        client_wait_s: float = 300.0,
        offer_store: bool = True,
        remote: RemoteStore | None = None,
        join_key: bytes | None = None,
        engine: Engine = EMBEDDED,
    ) -> None:
        self._roster = Roster(
            run.run_id, remote or (run.payloads if offer_store else None), join_key=join_key, ping_s=engine.ping_s
        )
        super().__init__(client_manager=self._roster, strategy=FedAvg())
        self._run = run
        self._remote = remote
        self._settings = settings
        self._rounds = rounds
        self._round_timeout_s = round_timeout_s
        self._client_wait_s = client_wait_s
        self._engine = engine
        self._observer = Observers()
        self._writer = BackgroundWriter()
        self._stop = threading.Event()
        self._merging: Strategy | None = None
        self._state: StoredPayload | None = None
        self._ahead: dict[int, Answer] = {}
        self._told = False
        self.failure: FedSplitError | None = None

    @property
    def run(self) -> Run:
        """What the run has on the disk."""
        return self._run

    def observe(self, observer: Observer) -> None:
        """Let somebody watch; before `fit`."""
        self._observer.add(observer)

    # -- Flower's interface ------------------------------------------------------------------------------------------

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[FlowerHistory, float]:
        """Run all rounds; Flower calls this once the port is open.

        Errors are kept in `failure` rather than raised, so that Flower goes on to disconnect the clients.
        """
        began = time.monotonic()
        try:
            with self._signals():
                self._run_rounds()
                self._writer.close()
            self._say_goodbye("complete", "")
        except _SignalError as exc:
            self.failure = RunStoppedError(
                f"stopped by {exc} after {self._run.history.last_round()} of {self._rounds} rounds; --resume goes on"
            )
        except FedSplitError as exc:
            self.failure = exc
        if self.failure:
            outcome = "stopped" if isinstance(self.failure, RunStoppedError) else "failed"
            self._stop.set()
            self._close_quietly()
            self._say_goodbye(outcome, str(self.failure))
        return FlowerHistory(), time.monotonic() - began

    def disconnect_all_clients(self, timeout: float | None) -> None:
        """Let every connection end; the ranks have been told before."""
        super().disconnect_all_clients(timeout=10.0)

    # -- the run -----------------------------------------------------------------------------------------------------

    def _run_rounds(self) -> None:
        # Here and not at the top: it imports torch, and the clients can connect meanwhile.
        from fedsplit.server.strategy import Strategy

        settings = self._settings
        strategy = self._merging = Strategy(settings, self._rounds)
        self.set_strategy(strategy)
        self.set_max_workers(None)
        done = self._restore(strategy)
        if done >= self._rounds and not self._is_unfinished(done):
            log.info("run %s is complete: %d of %d rounds are done", self._run.run_id, done, self._rounds)
            self._roster.wait_for_ranks(settings.min_clients, _FAREWELL_S)
            return
        self._wait_for_clients(settings.min_clients)
        if self._state is None:
            self._set_state(strategy, self._ask_for_initial_state(strategy))
            self._save(0, {})
        self._print_split(strategy)
        for server_round in range(max(done, 1) if self._is_unfinished(done) else done + 1, self._rounds + 1):
            self._round(strategy, server_round, trained=server_round == done)

    def _is_unfinished(self, done: int) -> bool:
        """Tell whether the last saved round was trained and not evaluated when the server died."""
        return done > self._run.history.last_round()

    def _restore(self, strategy: Strategy) -> int:
        """Take up the newest checkpoint; returns its round, 0 when there is none."""
        if self._run.resumed is None and self._run.initial is not None:
            shared, local_entries = strategy.without_local(self._run.initial())
            self._run.note_local_entries(local_entries)
            self._set_state(strategy, self._run.payloads.put(shared))
            self._save(0, {})
            return 0
        checkpoint = self._run.resumed
        if checkpoint is None:
            return 0
        self._set_state(strategy, self._run.payload_of(checkpoint))
        if "rules.pt" in checkpoint.files:
            strategy.load_memory(checkpoint.path("rules.pt"))
        log.info("run %s goes on after round %d of %d", self._run.run_id, checkpoint.server_round, self._rounds)
        return checkpoint.server_round

    def _wait_for_clients(self, number: int) -> None:
        reminded = 0.0
        while not self._roster.wait_for_ranks(number, 1.0):
            ranks = self._roster.ranks()
            self._observer.clients_awaited(ranks, number)
            if time.monotonic() - reminded > _REMIND_S:
                reminded = time.monotonic()
                log.info("waiting for clients: %d of %d are here (ranks %s)", len(ranks), number, ranks or "none")

    def _ask_for_initial_state(self, strategy: Strategy) -> StoredPayload:
        failures = []
        for rank in self._roster.ranks():
            conversation = self._converse(self._terms(None), rank, "initialize", 0, strategy, None)
            answer = conversation.until_done()
            if answer.failure is None and answer.digest:
                content = conversation.fetch(answer)
                self._run.note_local_entries(json.loads(str(answer.metrics.get("local_entries", "{}"))))
                log.info("rank %d: gave the initial state (%s bytes)", rank, f"{answer.payload_bytes:,}")
                return self._run.payloads.put([content])
            failures.append(f"rank {rank}: {answer.failure or 'no payload'}")
            log.warning("no initial state from %s", failures[-1])
        raise RunFailedError(f"no trainer gave an initial state ({'; '.join(failures)}); see --initial-checkpoint")

    def _set_state(self, strategy: Strategy, state: StoredPayload) -> None:
        before, self._state = self._digest(), state
        if self._remote and before != state.digest:
            self._remote.give(state.path, state.digest)
            if before:
                self._remote.drop(before)
        strategy.set_state(self._run.payloads.map(state.digest, own=True))

    def _drop(self, digest: str) -> None:
        self._run.payloads.drop(digest)
        if self._remote:
            self._remote.drop(digest)

    def _digest(self) -> str | None:
        return self._state.digest if self._state else None

    def _print_split(self, strategy: Strategy) -> None:
        strategy.resolve_split(self._run.local_entries())
        if strategy.split.min_updates > strategy.settings.min_clients:
            raise UsageError(
                f"the rules need at least {strategy.split.min_updates} updates a round, --min-clients is "
                f"{strategy.settings.min_clients}; start with --min-clients {strategy.split.min_updates} or more"
            )
        rows = [PartRow(*row) for row in strategy.split.describe()]
        self._run.note_split(rows)
        self._observer.split_resolved(rows)
        for part, entries, size, rule in rows:
            log.info(
                "split: %s: %d entries, %s bytes, rule %s", part, entries, f"{size:,}", rule,
                extra=event("split", part=part, entries=entries, bytes=size, rule=rule),
            )  # fmt: skip

    # -- a round -----------------------------------------------------------------------------------------------------

    def _round(self, strategy: Strategy, server_round: int, *, trained: bool) -> None:
        stages = Stages()
        settings = strategy.settings
        deadline = None if self._round_timeout_s is None else time.monotonic() + self._round_timeout_s
        self._writer.check()
        self._wait_for_clients(settings.min_clients)
        stages.end("wait for clients")
        if trained:
            line = dict(self._run.partial_line())
        else:
            ranks = settings.sample(server_round, self._roster.ranks())
            line = self._train(strategy, server_round, ranks, self._terms(deadline), stages)
            self._save(server_round, line)
            stages.end("wait for the last checkpoint")
        if settings.is_evaluated(server_round):
            ahead_s = self._evaluate(strategy, server_round, self._roster.ranks(), self._terms(deadline), line)
            stages.end("evaluate", **({"train ahead": ahead_s} if ahead_s else {}))
        line = {"round": server_round, "seconds": stages.total(), **line, "stages": stages.seconds}
        self._run.history.append(line)
        log.info("%s", describe_round(line, self._rounds), extra=event("round", total_rounds=self._rounds, **line))
        self._observer.round_ended(line, self._rounds)

    def _train(self, strategy: Strategy, server_round: int, ranks: Sequence[int], terms: Terms, stages: Stages) -> Line:
        merge, turns, phase = strategy.begin_merge(server_round), Turns(ranks), Phase()
        self._observer.asked("train", server_round, self._rounds, ranks)

        def train(rank: int) -> None:
            conversation = self._converse(terms, rank, "train", server_round, strategy, self._state)
            own = phase.stages[rank] = Stages()
            try:
                answer = phase.answers[rank] = self._ahead.get(rank) or conversation.until_done()
                own.end("hand-off", waiting=conversation.waited_s, training=answer.seconds)
                if not answer.failure:
                    self._observer.answered(rank, None)
                update: Update | str = answer.failure or ""
                # What lies in the store is read and checked beside the others. What comes in messages takes room here:
                # it is fetched when at most one other has to be merged before it.
                turns.wait(rank, ahead=len(ranks) if answer.via == "store" else 1)
                own.end("turn")
                if not answer.failure:
                    update = self._fetch(conversation, answer, merge, own)
                turns.wait(rank)
                own.end("turn")
                if isinstance(update, str):
                    self._refuse(phase, rank, "train", update, answer.traceback)
                else:
                    merge.add(update)
                    own.end("merging")
            finally:
                turns.done(rank)

        in_parallel(train, ranks, self._stop)
        self._ahead.clear()
        stages.end("train")
        chunks = merge.finish()
        # Only now: ranks with the same result share one payload.
        for digest in {answer.digest for answer in phase.answers.values()} - {None, self._digest()}:
            self._drop(str(digest))
        if chunks is not None:
            self._set_state(strategy, self._run.payloads.put(chunks))
        stages.end("merge")
        means = weighted_mean((a.num_examples, with_loss(a)) for a in phase.good().values())
        clients = {
            str(rank): {
                "num_examples": a.num_examples, "seconds": round(a.seconds, 6), "bytes": a.payload_bytes,
                "stages": phase.stages[rank].seconds, **with_loss(a),
            }
            for rank, a in phase.good().items()
        }  # fmt: skip
        line: Line = {
            "train": means, "evaluate": {}, "clients": clients, "asked": len(ranks), "accepted": merge.accepted,
            "refused": {str(rank): reason for rank, reason in sorted(phase.refused.items())},
        }  # fmt: skip
        if privacy := strategy.privacy_spent():
            line["privacy"] = privacy
        return line

    def _fetch(self, conversation: Conversation, answer: Answer, merge: Merge, stages: Stages) -> Update | str:
        """Get an update and check it; returns why it is refused if it is."""
        if not answer.digest:
            return "it came without a state_dict"
        try:
            content = conversation.fetch(answer)
        except RecordError as exc:
            return str(exc)
        if merge.retains and isinstance(content, bytes):
            # What has to wait for the others waits in a file, not in memory.
            content = self._run.payloads.map(self._run.payloads.put([content]).digest, own=True)
        stages.end("transfer")
        try:
            return merge.check(answer.rank, content, answer.num_examples, answer.metrics)
        finally:
            stages.end("checking")

    def _evaluate(self, strategy: Strategy, server_round: int, ranks: Sequence[int], terms: Terms, line: Line) -> float:
        """Let ranks evaluate the state; returns the seconds in which that waited for training that was asked ahead."""
        phase, ahead_s = Phase(), [0.0]
        asks_ahead = self._asks_ahead(server_round, strategy)
        self._observer.asked("evaluate", server_round, self._rounds, ranks)

        def evaluate(rank: int) -> None:
            conversation = self._converse(
                terms, rank, "evaluate", server_round, strategy, self._state, then_trains=asks_ahead
            )
            answer = phase.answers[rank] = conversation.until_done()
            ahead_s.append(conversation.ahead_s)
            if conversation.ahead:
                self._ahead[rank] = conversation.ahead
            reason = answer.failure or (None if answer.num_examples > 0 else "it evaluated no examples")
            if reason:
                self._refuse(phase, rank, "evaluate", reason, answer.traceback)
            else:
                self._observer.answered(rank, None)

        in_parallel(evaluate, ranks, self._stop)
        line["evaluate"] = weighted_mean((a.num_examples, with_loss(a)) for a in phase.good().values())
        for rank, answer in phase.good().items():
            line["clients"].setdefault(str(rank), {})["evaluate"] = {
                "num_examples": answer.num_examples, "seconds": round(answer.seconds, 6), **with_loss(answer),
            }  # fmt: skip
        for rank, reason in phase.refused.items():
            line["refused"].setdefault(str(rank), f"evaluate: {reason}")
        return max(ahead_s)

    def _asks_ahead(self, server_round: int, strategy: Strategy) -> bool:
        """Tell whether to ask for the next round's training along with this one's evaluation, of the same state.

        Only where it is certain that all will be asked for it, and that no deadline has to be measured from its start.
        """
        every_rank = strategy.settings.fraction_train == 1.0 and self._round_timeout_s is None
        return self._engine.asks_ahead and every_rank and server_round < self._rounds

    def _converse(
        self,
        terms: Terms,
        rank: int,
        kind: str,
        server_round: int,
        strategy: Strategy,
        state: StoredPayload | None,
        *,
        then_trains: bool = False,
    ) -> Conversation:
        request = Request(
            run_id=self._run.run_id, kind=kind, server_round=server_round, total_rounds=self._rounds,
            config=strategy.settings.train_config, split=strategy.settings.local_patterns,
        )  # fmt: skip
        then = replace(request, kind="train", server_round=server_round + 1) if then_trains else None
        return Conversation(terms, rank, request, state, then)

    def _terms(self, deadline: float | None) -> Terms:
        return Terms(
            roster=self._roster,
            store=self._run.payloads,
            remote=self._remote,
            client_wait_s=self._client_wait_s,
            deadline=deadline,
            deadline_s=self._round_timeout_s,
            stop=self._stop,
            engine=replace(self._engine, hold_s=self._hold_s()),
            observer=self._observer,
        )

    def _hold_s(self) -> float:
        return max(self._engine.hold_s, min(_MANY_HOLD_S, _RANK_HOLD_S * len(self._roster.ranks())))

    def _refuse(self, phase: Phase, rank: int, kind: str, reason: str, trainer_traceback: str) -> None:
        phase.refused[rank] = reason
        log.warning(
            "rank %d: %s not counted: %s", rank, kind, reason,
            extra=event("refused", rank=rank, kind=kind, reason=reason),
        )  # fmt: skip
        self._observer.answered(rank, reason)
        if trainer_traceback:
            log.warning("rank %d: the trainer's traceback:\n%s", rank, trainer_traceback.rstrip())

    def _save(self, server_round: int, line: Line) -> None:
        """Write a round's checkpoint beside what follows; waits only if the one before is still being written."""
        assert self._state is not None and self._merging is not None
        state, memory, history = self._state, self._merging.dump_memory(), self._run.history
        files: dict[str, Any] = {"state.safetensors": state.path}
        if memory is not None:
            files["rules.pt"] = [memory]
        metrics = {key: line.get(key, {}) for key in ("train", "evaluate")}
        best = history.best_round()
        self._writer.submit(lambda: self._run.save(server_round, state.digest, files, metrics, dict(line), best))

    # -- the end -----------------------------------------------------------------------------------------------------

    def _say_goodbye(self, outcome: str, reason: str) -> None:
        if not self._told:
            self._told = True
            self._roster.finish(outcome, reason, _FAREWELL_S if outcome == "complete" else 0.0)

    def _close_quietly(self) -> None:
        try:
            self._writer.close()
        except FedSplitError as exc:
            if exc is not self.failure:
                log.error("%s", exc)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn signals into an end of the run that the ranks are told of; a second one ends the process at once."""

        def stop(number: int, _: FrameType | None) -> None:
            for each in _SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            self._stop.set()
            raise _SignalError(number)

        if threading.current_thread() is threading.main_thread():
            # Flower has set its own by now, which would end the process without a word to anybody.
            for number in _SIGNALS:
                signal.signal(number, stop)
        try:
            yield
        except StoppedError as exc:
            raise _SignalError(signal.SIGTERM) from exc
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.default_int_handler)
