"""Asynchronous rounds: `fedsplit.server.round`, with merges that take the updates that are there.

A round is one merge. All ranks that are free are asked to train from the newest state; others are still at work on
older ones. When a merge is due (`fedsplit.asynchronous.buffer`), each update that started from an older state is
carried over to the newest one: what training changed, times the weight of its staleness, is added there. The rules
merge what comes of it as they merge any updates. Where every rank is merged in every round, as with ``--buffer`` of
their number, no update is carried over, and the run is that of synchronous rounds, bit for bit.

A merge counts once it is on the disk: the journal's line, then the checkpoint. Only then is the new state given to
anybody. A state is kept for as long as somebody trains from it, also over a restart of the server: who was at work is
asked for the same again.

Importing this module imports torch.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedsplit.aggregation import Update
from fedsplit.aggregation.numeric import is_floating, moved
from fedsplit.aggregation.staleness import parse_staleness
from fedsplit.asynchronous.buffer import Buffer
from fedsplit.disk.payload_store import StoredPayload
from fedsplit.errors import FedSplitError, UsageError
from fedsplit.run.history import Line
from fedsplit.run.time_account import Stages
from fedsplit.server.peer import RankProxy, Reply
from fedsplit.server.round import Rounds, Task
from fedsplit.server.strategy import Merge
from fedsplit.states.extra import join, separate
from fedsplit.states.state_dict import StateDict, decode

log = logging.getLogger("fedsplit")

# A rank of which nothing was heard for so long, beyond the time that a question is held, is not waited for.
_GONE_S = 10.0
_LOOK_S = 0.2
# How long the threads that still ask may take to end with the run, beyond the time that a question is held.
_END_S = 5.0


@dataclass(kw_only=True)
class AsyncRounds(Rounds):
    """Runs the rounds without waiting for the slowest rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # What is asked for along with an evaluation would hold up the evaluation.
        self.engine = replace(self.engine, asks_ahead=False)
        settings = self.settings
        self._weight = parse_staleness(settings.staleness)
        size = settings.buffer or settings.merge_after or 1
        self._buffer = Buffer(size=size, fresh=settings.buffer is None)
        # Guards the buffer and what follows; notified whenever a rank is done.
        self._changed = threading.Condition()
        self._updates: dict[int, Update] = {}
        self._failed: list[Task] = []
        self._evaluating: dict[int, Task] = {}
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        # What is in the store because somebody trains from the state of a round: that state, and results from it.
        self._kept: dict[int, set[str]] = {}
        self._entry: dict[str, Any] = {}
        # Every rank that ever took part; one that left may come back.
        self._known = {int(rank) for entry in self.run.journal.entries for rank in entry.get("asked", {})}

    def run_all(self) -> None:
        """Run every round that is left; ranks that are still at work then are told that the run is over."""
        super().run_all()
        self.run.payloads.kept = ()
        self.stop.set()
        over = time.monotonic() + self.engine.hold_s + _END_S
        for thread in self._threads:
            thread.join(max(0.0, over - time.monotonic()))

    # -- a round -------------------------------------------------------------------------------------------------------

    def _train(self, server_round: int, stages: Stages) -> Line:
        self._entry = {"round": server_round, "asked": {}, "updates": {}, "refused": {}}
        self._offer_who_is_free()
        return super()._train(server_round, stages)

    def _tasks(self, kind: str, server_round: int, chosen: Any) -> list[Task]:
        if kind == "train":
            # Now: whoever came since the round began may be among the chosen.
            self._known.update(int(client.cid) for client, _ in chosen)
            self._entry["num_ranks"] = self.strategy.num_ranks = self._count_ranks()
        return super()._tasks(kind, server_round, chosen)

    def _gather(self, server_round: int, tasks: list[Task], merge: Merge) -> list[Task]:
        """Ask the ranks that are free, wait until a merge is due, and give it what is there, in rank order."""
        self._entry["asked"] = {
            str(task.rank): {"digest": task.state.digest, "config": dict(task.request.config)} for task in tasks
        }
        for task in tasks:
            self._begin_training(task)
        newest, most = server_round - 1, self.settings.max_staleness
        with self._changed:
            while True:
                for task in self._buffer.too_old(newest, most):
                    since = f"{newest - task.base_round} merges ago, and --max-staleness is {most}"
                    self._refuse(task, f"it started from the state of round {task.base_round}, {since}")
                    self._failed.append(task)
                self._check_threads()
                if (found := self._take(newest)) is not None:
                    break
                self._changed.wait(_LOOK_S)
            taken = sorted(found, key=lambda task: task.rank)
            failed, self._failed = self._failed, []
        for task in taken:
            task.staleness = newest - task.base_round
            update = self._updates.pop(task.rank)
            self._entry["updates"][str(task.rank)] = {
                "base_round": task.base_round, "digest": task.reply.payload.digest if task.reply.payload else "",
            }  # fmt: skip
            self._add(merge, task, self._carried(update, task))
        for task in failed:
            self._updates.pop(task.rank, None)
            self._entry["refused"][str(task.rank)] = task.base_round
        return sorted([*taken, *failed], key=lambda task: task.rank)

    def _take(self, newest: int) -> list[Task] | None:
        """Return what is merged now; None if it is too early."""
        return self._buffer.take() if self._buffer.is_due(newest, self._is_gone) else None

    def _begin_training(self, task: Task) -> None:
        with self._changed:
            self._buffer.begin(task)
            self._keep(task.base_round, [task.state.digest, *([task.short.digest] if task.short else [])])
        self._spawn(self._let_train, task)

    def _let_train(self, task: Task) -> None:
        """Let a rank train and take its update; in a thread of its own, for as long as that takes."""
        self._await_training(task)
        update = self._fetch(task, retains=True)
        with self._changed:
            if isinstance(update, str):
                self._refuse(task, update)
                self._failed.append(task)
            else:
                self._updates[task.rank] = update
            self._buffer.end(task, counts=not isinstance(update, str))

    def _carried(self, update: Update, task: Task) -> Update:
        """Return the update of an older state as one of the newest: what it changed, times its weight."""
        onto, start = self._state.entries, task.base
        weight = self._weight(task.staleness)
        if weight == 1 and (task.staleness == 0 or self.settings.mix_states):
            return replace(update, staleness=task.staleness)
        start = onto if self.settings.mix_states else start
        state = {
            name: moved(onto[name], start[name], end, weight) if is_floating(end) else end
            for name, end in update.state_dict.items()
        }
        return replace(update, state_dict=state, staleness=task.staleness)

    def _next(self, merged: StateDict) -> StateDict:
        """Return ``state + rate * (merged - state)``, the rate being that of the server."""
        rate, state = self.settings.server_lr, self._state.entries
        if rate == 1:
            return merged
        entries, extra = separate(merged)
        return join({n: moved(state[n], state[n], t, rate) if is_floating(t) else t for n, t in entries.items()}, extra)

    def _run(self, job: Callable[[Task], None], tasks: list[Task]) -> None:
        """Do a job for every rank that is free; one that is gone is not waited for."""

        def evaluate(task: Task) -> None:
            job(task)
            with self._changed:
                self._evaluating.pop(task.rank, None)

        for task in tasks:
            self._evaluating[task.rank] = task
            self._spawn(evaluate, task)
        with self._changed:
            while any(
                not self._is_gone(self._evaluating[task.rank]) for task in tasks if task.rank in self._evaluating
            ):
                self._check_threads()
                self._changed.wait(_LOOK_S)
            for task in tasks:
                if task.rank in self._evaluating:
                    task.reply = Reply(status="error", error={"message": "it left during the evaluation"})
                    self._refuse(task, task.reply.failure or "")

    def _client(self, task: Task) -> dict[str, Any]:
        return super()._client(task) | {"staleness": task.staleness, "base_round": task.base_round}

    def _save(self, server_round: int, line: Line) -> None:
        """Write the journal's line and the checkpoint: nobody is given the state before they are on the disk."""
        entry = self._entry or {"round": server_round}
        self.run.journal.append(entry | {"state": self._state.payload.digest})
        super()._save(server_round, line)
        self.writer.wait()

    def _evaluate(self, server_round: int, stages: Stages, line: Line) -> None:
        self._offer_who_is_free()
        super()._evaluate(server_round, stages, line)

    # -- who is at work ------------------------------------------------------------------------------------------------

    def _offer_who_is_free(self) -> None:
        with self._changed:
            self.roster.at_work = {*self._buffer.at_work, *self._buffer.arrived, *self._evaluating}

    def _count_ranks(self) -> int:
        self._known.update(self.roster.ranks())
        return len(self._known)

    def _check_threads(self) -> None:
        if self._error:
            raise self._error

    def _is_gone(self, task: Task) -> bool:
        return task.away_s > task.context.engine.hold_s + _GONE_S

    def _spawn(self, job: Callable[[Task], None], task: Task) -> None:
        def do() -> None:
            try:
                job(task)
            except BaseException as exc:  # noqa: BLE001  (raised again in the main thread)
                self._error = exc
            with self._changed:
                self._changed.notify_all()

        # A daemon: a client that is silent in the middle of a question must not keep the process from ending.
        thread = threading.Thread(target=do, daemon=True)
        self._threads = [each for each in self._threads if each.is_alive()] + [thread]
        thread.start()

    # -- what is kept in the store -------------------------------------------------------------------------------------

    def _keep(self, base_round: int, digests: Iterable[str]) -> None:
        self._kept.setdefault(base_round, set()).update(digests)
        self.run.payloads.kept = set().union(*self._kept.values())

    def _drop_payloads(self, tasks: Iterable[Task]) -> None:
        """Remove what belongs to states that nobody trains from any more."""
        with self._changed:
            for task in tasks:
                payload = task.reply.payload
                self._keep(task.base_round, [task.state.digest, *([payload.digest] if payload else [])])
            # An evaluation that is no longer waited for may still be on its way to its rank.
            busy = (*self._buffer.at_work.values(), *self._buffer.arrived.values(), *self._evaluating.values())
            used = {task.base_round for task in busy}
            gone = set().union(*(self._kept.pop(base) for base in self._kept.keys() - used))
            kept = self.run.payloads.kept = set().union(*self._kept.values())
        self._state.drop(gone - kept)

    # -- the beginning -------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        super()._begin()
        needed = self.strategy.min_updates
        if self._buffer.size < needed:
            flag = "--merge-after" if self._buffer.fresh else "--buffer"
            raise UsageError(f"the rules need at least {needed} updates a merge, {flag} is {self._buffer.size}")
        resumed, journal = self.run.resumed, self.run.journal
        if resumed is None or not journal.entries or journal.entries[-1]["round"] != resumed.server_round:
            # A new run, or one that went on without a journal for a while.
            return
        for rank, (base_round, given) in journal.at_work().items():
            if task := self._again(rank, base_round, given["digest"], given["config"]):
                self._begin_training(task)

    def _again(self, rank: int, base_round: int, digest: str, config: Mapping[str, Any]) -> Task | None:
        """Return what a rank was at work on when the server ended; None if the state of then is lost."""
        store = self.run.payloads
        try:
            content = store.map(digest)
            base, _ = separate(decode(content, f"the state of round {base_round}"))
        except FedSplitError as exc:
            log.warning("rank %d: begins anew, as the state that it trained from cannot be read: %s", rank, exc)
            return None
        state = StoredPayload(digest=digest, bytes=len(content), path=store.path(digest))
        if self.remote:
            self.remote.give(state.path, digest)
        log.info("rank %d: still at work on the state of round %d", rank, base_round)
        return Task(
            context=self._context(self.settings.round_timeout), rank=rank, state=state, base=base,
            base_round=base_round,
            request=self._request("train", base_round + 1, config),
            short=self._compression.short(state), extra_bytes=self._extra_bytes(), client=RankProxy(rank),
        )  # fmt: skip
