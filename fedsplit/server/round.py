"""The rounds of a run, from the first state to the last line of the history.

A round, as `Rounds.round` reads:

1. The strategy chooses who trains (`configure_fit`). All are asked at the same time; each update is checked, given to
   the strategy as soon as its turn in rank order comes, and dropped. So the order of arrival never changes the result.
2. The strategy ends the merge. The new state's checkpoint is written beside the next step, and is on the disk before
   the one of the round after it is written.
3. The strategy chooses who evaluates the new state (`configure_evaluate`) and puts the results together. The round's
   line goes to the history, once.

Killed at any moment and started with ``resume``, the server goes on from the newest valid checkpoint.

Importing this module imports torch.
"""

import logging
import math
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from flwr.common import Code, EvaluateIns, EvaluateRes, FitIns, Status
from flwr.server.client_proxy import ClientProxy

from fedsplit.aggregation import Update
from fedsplit.disk.checkpoints import BackgroundWriter
from fedsplit.disk.payload_store import StoredPayload
from fedsplit.disk.remote_store import RemoteStore
from fedsplit.errors import RecordError, RunFailedError
from fedsplit.exchange.records import Request, printable
from fedsplit.exchange.work import WORK_SHARE
from fedsplit.run.directory import STATE_FILE, Run
from fedsplit.run.events import event
from fedsplit.run.history import Line, weighted_mean
from fedsplit.run.time_account import Stages, describe_round
from fedsplit.server.balance import Balance
from fedsplit.server.beginning import Beginning, ask_for_initial_state
from fedsplit.server.compression import Compression
from fedsplit.server.conversation import FETCHED_AT_ONCE, Conversation, RoundContext
from fedsplit.server.observer import Observer
from fedsplit.server.parts import read_parts
from fedsplit.server.peer import Reply
from fedsplit.server.roster import Roster
from fedsplit.server.settings import ServerSettings
from fedsplit.server.state import GlobalState
from fedsplit.server.strategy import EvaluateFailures, FitFailures, Merge, StreamingStrategy, read_update, refusal
from fedsplit.server.turns import Turns, in_parallel
from fedsplit.states.extra import MOST_BYTES, MOST_STATES
from fedsplit.states.local_keys import named
from fedsplit.states.state_dict import StateDict
from fedsplit.wire.protocol import Engine

log = logging.getLogger("fedsplit")

# Long polling: with many ranks the clients hold each question longer, or the server would do nothing but ask. A run
# that is stopped waits at most that long for the ranks.
_RANK_HOLD_S, _MANY_HOLD_S = 0.05, 5.0
_FAREWELL_S = 10.0
# Updates that come in messages are fetched early only where the disk could hold so many of them.
_EARLY_UPDATES = 10


@dataclass(kw_only=True)
class Task(Conversation):
    """What one rank is asked for in a round, and what came of it."""

    client: ClientProxy
    state: StoredPayload
    # The global entries that it starts from, and the round that they are the state of.
    base: StateDict
    base_round: int
    # How many merges there were between that round and the one that took its update.
    staleness: int = 0
    reply: Reply = field(init=False)
    refused: str | None = None
    update_bytes: int = 0
    # What a packed update came to; 0 if it was not packed.
    plain_bytes: int = 0
    # The digests of the parts that an update came in.
    payloads: list[str] = field(default_factory=list)
    stages: Stages = field(default_factory=Stages)


@dataclass(kw_only=True)
class Rounds:
    """Runs the rounds: on the ranks in the roster, as the strategy decides, into the run's directory."""

    run: Run
    settings: ServerSettings
    strategy: StreamingStrategy
    roster: Roster
    engine: Engine
    remote: RemoteStore | None
    observer: Observer
    writer: BackgroundWriter
    # Set when the run is being stopped.
    stop: threading.Event

    def __post_init__(self) -> None:
        self.run.payloads.trusts = self.settings.verify == "auto"
        self._state = GlobalState(self.run.payloads, self.remote)
        self._compression = Compression(self.settings.wire, self._state, self.run.payloads)
        # What came along with the evaluation of the round before.
        self._ahead: dict[int, Reply] = {}
        # Held by the rank that was first to have its extra tensors named in the log.
        self._told_of_extra = threading.Lock()
        # On an engine whose questions are expensive there is one for a training, and no more for its parts.
        # A journal names each update by one digest.
        self._takes_parts = (
            bool(self.settings.wire) and not self.engine.asks_ahead and not self.settings.is_asynchronous
        )
        self._balance = Balance(self.run.history.lines) if self.settings.balance else None
        # Why a rank's last answer did not count: it is told with its next task.
        last = self.run.history.lines[-1] if self.run.history.lines else {}
        self._refused = {int(rank): str(why) for rank, why in last.get("refused", {}).items() if rank.isdecimal()}

    def run_all(self) -> None:
        """Run every round that is left."""
        run, settings = self.run, self.settings
        done = run.resumed.server_round if run.resumed else 0
        # The last saved round may have been trained and not evaluated when the server died.
        unfinished = done > run.history.last_round()
        if run.resumed and done >= settings.rounds and not unfinished:
            log.info("run %s is complete: %d of %d rounds are done", run.run_id, done, settings.rounds)
            self.roster.wait_for(settings.min_clients, _FAREWELL_S)
            self._check_that_something_was_merged()
            return
        self._begin()
        for server_round in range(max(done, 1) if unfinished else done + 1, self.last_round + 1):
            self.round(server_round, trained=server_round == done)
        self._check_that_something_was_merged()

    @property
    def last_round(self) -> int:
        """The round after which the run ends."""
        return self.settings.rounds

    # -- a round -------------------------------------------------------------------------------------------------------

    def round(self, server_round: int, *, trained: bool) -> None:
        """Run one round; ``trained`` if its state is there already, as the server died before the round had ended."""
        settings, strategy, stages = self.settings, self.strategy, Stages()
        self.writer.check()
        self.roster.wait_for(settings.min_clients)
        self.roster.begin_round(settings.seed, server_round)
        stages.end("wait for clients")

        line = self.run.partial_line() if trained else self._train(server_round, stages)
        if not trained and not strategy.remembers_evaluations:
            self._save(server_round, line)
            stages.end("wait for the last checkpoint")
        # Where evaluations are remembered the checkpoint is written after them, with the whole line.
        if "seconds" not in line:
            self._evaluate(server_round, stages, line)
            if strategy.remembers_evaluations:
                self.writer.wait()
                stages.end("wait for the last checkpoint")
            line = {"round": server_round, "seconds": stages.total(), **line, "stages": stages.seconds}
            if strategy.remembers_evaluations:
                self._save(server_round, line)

        self.run.history.append(line)
        text = describe_round(line, settings.rounds)
        log.info("%s", text, extra=event("round", total_rounds=settings.rounds, **line))
        self.observer.round_ended(line, settings.rounds)

    def _train(self, server_round: int, stages: Stages) -> Line:
        """Let the strategy's choice of ranks train, merge their updates, and return what the line says of it."""
        strategy = self.strategy
        chosen = strategy.configure_fit(server_round, self._state.parameters, self.roster)
        tasks = self._tasks("train", server_round, chosen)
        merge = strategy.start_fit(server_round)
        tasks = self._gather(server_round, tasks, merge)
        stages.end("train")

        failures: FitFailures = [(task.client, refusal(task.refused)) for task in tasks if task.refused]
        state, metrics = strategy.end_fit(server_round, merge, failures) if tasks else (None, {})
        # Only now: ranks with the same result share one payload.
        self._drop_payloads(tasks)
        if state is not None:
            self._compression.put(self._next(state), tasks)
        central = self._evaluate_centrally(server_round)
        stages.end("merge")
        good = [task for task in tasks if not task.refused]
        line = {
            "train": _mean(good) | {**metrics}, "evaluate": {},
            "clients": {str(task.rank): self._client(task) for task in good}, "asked": len(tasks),
            "accepted": len(good), "merged": state is not None,
            "refused": {str(task.rank): task.refused for task in tasks if task.refused},
            **strategy.line_entries(), **central,
        }  # fmt: skip
        self._compression.note(line, tasks)
        return line

    def _next(self, merged: StateDict) -> StateDict:
        """Return the next state, of what the strategy made of the updates."""
        return merged

    def _gather(self, server_round: int, tasks: list[Task], merge: Merge) -> list[Task]:
        """Let ranks train, give their updates to the merge, and return the tasks that count for this round."""
        turns = Turns([task.rank for task in tasks])
        waiting: list[tuple[Task, Update]] = []

        def wait(task: Task, ahead: int = 0) -> None:
            turns.wait(task.rank, ahead=ahead)
            task.stages.end("turn")

        def train(task: Task) -> None:
            try:
                self._await_training(task)
                reply = task.reply
                # What lies in the store is read and checked beside the others. What comes in messages takes room here:
                # it is fetched when few others have to be merged before it, and read when at most one has.
                ahead = len(tasks) if reply.payload and reply.payload.via == "store" else 1
                wait(task, max(ahead, self._fetched_ahead(reply)))
                may_read = partial(wait, task, ahead)
                update = self._fetch(task, retains=merge.retains, numbers=merge.at_once == 1, may_read=may_read)
                wait(task)
                if isinstance(update, str):
                    self._refuse(task, update)
                elif merge.at_once == 1:
                    self._add(merge, task, update)
                else:
                    waiting.append((task, update))
                    if len(waiting) == merge.at_once:
                        self._add_all(merge, waiting)
            finally:
                turns.done(task.rank)

        in_parallel(train, tasks)
        self._add_all(merge, waiting)
        self._ahead.clear()
        return tasks

    def _fetched_ahead(self, reply: Reply) -> int:
        """Return how many others may still have to be merged before an update is fetched: each has its own link."""
        if reply.payload is None or (reply.payload.via != "pull" and reply.status == "ok"):
            return 0
        free = shutil.disk_usage(self.run.payloads.root).free
        size = reply.payload.bytes if reply.status == "ok" else self._state.payload.bytes
        return FETCHED_AT_ONCE - 1 if free > _EARLY_UPDATES * size else 1

    def _await_training(self, task: Task) -> None:
        """Ask until there is an answer, unless it came along with the evaluation of the round before."""
        ahead = self._ahead.pop(task.rank, None)
        task.reply = ahead or task.until_done()
        self._compression.holds[task.rank] = task.reply.holds
        task.stages.end("hand-off", waiting=task.waited_s, training=task.reply.seconds)
        if not task.reply.failure and task.reply.status != "step":
            self.observer.answered(task.rank, None)

    def _add(self, merge: Merge, task: Task, update: Update) -> None:
        merge.add(update)
        self._refused.pop(task.rank, None)
        task.stages.end("merging")

    def _add_all(self, merge: Merge, waiting: list[tuple[Task, Update]]) -> None:
        """Merge the updates that wait for it, whose numbers nobody has looked at, and let go of them."""
        refused = merge.add_all([update for _, update in waiting]) if waiting else {}
        for task, _ in waiting:
            task.stages.end("merging")
            if reason := refused.get(task.rank):
                self._refuse(task, reason)
            else:
                self._refused.pop(task.rank, None)
        waiting.clear()

    def _evaluate(self, server_round: int, stages: Stages, line: Line) -> None:
        """Let the strategy's choice of ranks evaluate the state, and put their results into the line."""
        strategy = self.strategy
        chosen = strategy.configure_evaluate(server_round, self._state.parameters, self.roster)
        if not chosen:
            return
        tasks = self._tasks("evaluate", server_round, chosen)
        # The next round's training starts from the same state. It is asked for along with the evaluation only where
        # all will certainly be asked for it, and no deadline has to be measured from its start.
        certain = strategy.asks_everyone and self.settings.round_timeout is None
        asks_ahead = self.engine.asks_ahead and certain and server_round < self.settings.rounds

        def evaluate(task: Task) -> None:
            if asks_ahead:
                task.then = replace(task.request, kind="train", server_round=server_round + 1)
            reply = task.reply = task.until_done()
            self._compression.holds[task.rank] = reply.holds
            if reply.ahead and reply.ahead.status != "again":
                self._ahead[task.rank] = reply.ahead
            if reason := reply.failure or (None if reply.num_examples > 0 else "it evaluated no examples"):
                self._refuse(task, reason)
            else:
                self._refused.pop(task.rank, None)
                self.observer.answered(task.rank, None)

        self._run(evaluate, tasks)
        self._drop_payloads(tasks)
        good = [task for task in tasks if not task.refused]
        results = [(task.client, _evaluation(task)) for task in good]
        failures: EvaluateFailures = [(task.client, _evaluation(task)) for task in tasks if task.refused]
        loss, metrics = strategy.aggregate_evaluate(server_round, results, failures)
        line["evaluate"] = _mean(good)
        if loss is not None and not math.isnan(loss):
            line["evaluate"]["loss"] = loss
        line["evaluate"] |= metrics
        self._compression.note(line, tasks)
        for task in tasks:
            rank = str(task.rank)
            if task.refused:
                line["refused"].setdefault(rank, f"evaluate: {task.refused}")
            else:
                line["clients"].setdefault(rank, {})["evaluate"] = _row(task.reply)
        ahead_s = max(task.reply.then.held_s if task.reply.then else 0.0 for task in tasks)
        stages.end("evaluate", **({"train ahead": ahead_s} if ahead_s else {}))

    def _run(self, job: Callable[[Task], None], tasks: list[Task]) -> None:
        """Do a job for every task at the same time."""
        in_parallel(job, tasks)

    def _client(self, task: Task) -> dict[str, Any]:
        """Return what the line says of a rank whose update counts."""
        row = {**_row(task.reply), "bytes": task.update_bytes, "stages": task.stages.seconds}
        if self._balance:
            row[WORK_SHARE] = task.request.config[WORK_SHARE]
            self._balance.note(task.rank, row)
        return row

    def _evaluate_centrally(self, server_round: int) -> dict[str, Any]:
        """Return what the strategy finds when it evaluates the state itself, as ``central``."""
        found = self.strategy.evaluate(server_round, self._state.parameters)
        return {} if found is None else {"central": {"loss": found[0], **found[1]}}

    def _save(self, server_round: int, line: Line) -> None:
        """Write a round's checkpoint beside what follows; waits only if the one before is still being written."""
        state, memory, best = self._state.payload, self.strategy.dump_memory(), self.run.history.best_round()
        files: dict[str, Any] = {STATE_FILE: state.path, **self._compression.files()}
        if memory is not None:
            files[self.strategy.memory_file] = [memory]
        metrics = {key: line.get(key, {}) for key in ("train", "evaluate")}
        self.writer.submit(lambda: self.run.save(server_round, state.digest, files, metrics, dict(line), best))

    def _context(self, timeout_s: float | None) -> RoundContext:
        """Return what ranks are asked with from now on, for ``timeout_s`` seconds or without end."""
        hold_s = min(_MANY_HOLD_S, _RANK_HOLD_S * len(self.roster.ranks()))
        return RoundContext(
            roster=self.roster, store=self.run.payloads, remote=self.remote, client_wait_s=self.settings.client_wait,
            timeout_s=math.inf if timeout_s is None else timeout_s, stop=self.stop, observer=self.observer,
            engine=replace(self.engine, hold_s=max(self.engine.hold_s, hold_s)),
            keeps_digests=self.settings.is_asynchronous,
        )  # fmt: skip

    def _request(self, kind: str, server_round: int, config: Mapping[str, Any]) -> Request:
        return Request(
            run_id=self.run.run_id, kind=kind, server_round=server_round, total_rounds=self.settings.rounds,
            config=dict(config), split=self.settings.local_patterns, wire=self.settings.wire,
        )  # fmt: skip

    def _tasks(
        self, kind: str, server_round: int, chosen: Sequence[tuple[ClientProxy, FitIns | EvaluateIns]]
    ) -> list[Task]:
        """Turn a strategy's instructions into what each rank is asked for now, in rank order."""
        if any(ins.parameters is not self._state.parameters for _, ins in chosen):
            # The checkpoint being written drops the state before the last: it may be what a rank is given.
            self.writer.wait()
        # With a deadline of its own: one slow rank in training must not cost everybody the evaluation.
        context = self._context(self.settings.round_timeout)
        extra_bytes = self._extra_bytes()
        tasks = [
            Task(
                context=context, rank=(rank := int(client.cid)),
                request=replace(
                    self._request(kind, server_round, ins.config | self._work(rank)), refused=self._refused.get(rank),
                    step=0 if kind == "train" and self._takes_parts else None,
                ),
                state=(state := self._state.payload_of(ins.parameters)), extra_bytes=extra_bytes, client=client,
                short=self._compression.short(state),
                can_unpack=self._compression.can_unpack(rank), base=self._state.entries,
                base_round=server_round - (kind == "train"),
            )
            for client, ins in chosen
        ]  # fmt: skip
        tasks.sort(key=lambda task: task.rank)
        if tasks:
            self.observer.asked(kind, server_round, self.settings.rounds, [task.rank for task in tasks])
        return tasks

    def _work(self, rank: int) -> dict[str, float]:
        """Return what a task's configuration says of how much a rank is to do."""
        return {WORK_SHARE: self._balance.share(rank)} if self._balance else {}

    def _extra_bytes(self) -> int:
        return MOST_BYTES + MOST_STATES * self._state.payload.bytes if self.strategy.reads_extra else 0

    def _fetch(
        self, task: Task, *, retains: bool, numbers: bool = True, may_read: Callable[[], None] = lambda: None
    ) -> Update | str:
        """Get an update and check it, its ``numbers`` too; returns why it is refused if it is.

        `may_read` waits until there may be one more update in memory.
        """
        read = self._compression.reader(task)
        content: Any
        try:
            if task.reply.status == "step" and self._takes_parts:
                content = read_parts(task, read, may_read)
                read = _as_it_is
                self.observer.answered(task.rank, None)
            else:
                content = task.fetch(task.reply)
                task.update_bytes = len(content)
                if retains and isinstance(content, bytes):
                    # What has to wait for the others waits in a file, not in memory.
                    content = self.run.payloads.park(content)
        except RecordError as exc:
            return str(exc)
        task.stages.end("transfer")
        may_read()
        reply = task.reply
        update = read_update(
            task.rank, content, reply.num_examples, reply.shown_metrics, task.base, read, numbers=numbers
        )
        task.stages.end("checking")
        if not isinstance(update, Update):
            return update
        return replace(self._with_extra_that_is_read(update), base_round=task.base_round)

    def _with_extra_that_is_read(self, update: Update) -> Update:
        """Take the extra tensors out of an update if no rule reads them."""
        if not update.extra or self.strategy.reads_extra:
            return update
        if self._told_of_extra.acquire(blocking=False):
            log.warning("rank %d sent extra tensors, which no rule reads: %s", update.rank, named(update.extra))
        return replace(update, extra={})

    def _refuse(self, task: Task, reason: str) -> None:
        task.refused, rank, kind = reason, task.rank, task.request.kind
        self._refused[rank] = printable(reason)
        fields = event("refused", rank=rank, kind=kind, reason=reason)
        log.warning("rank %d: %s not counted: %s", rank, kind, reason, extra=fields)
        self.observer.answered(rank, reason)
        if task.reply.traceback:
            log.warning("rank %d: the trainer's traceback:\n%s", rank, task.reply.traceback.rstrip())

    def _check_that_something_was_merged(self) -> None:
        """Raise RunFailedError if no round of the run changed the state: then something is wrong with every answer."""
        lines = self.run.history.lines
        if any(line.get("merged", True) for line in lines):
            return
        reasons = [f"rank {rank}: {why}" for rank, why in lines[-1].get("refused", {}).items()]
        raise RunFailedError(
            f"nothing was merged in any of {len(lines)} rounds: the state is the initial one "
            f"({'; '.join(reasons) or 'nobody trained'})"
        )

    def _drop_payloads(self, tasks: Sequence[Task]) -> None:
        """Remove the results of a round, and the states that were sent to single ranks."""
        results = [task.reply.payload.digest for task in tasks if task.reply.payload]
        parts = [digest for task in tasks for digest in task.payloads]
        self._state.drop([*results, *parts, *(task.state.digest for task in tasks)])

    # -- the beginning -------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Take up the newest checkpoint, or find a state to start from."""
        beginning = Beginning(
            run=self.run, settings=self.settings, strategy=self.strategy, roster=self.roster, observer=self.observer,
            state=self._state, ask=self._ask_for_initial_state,
        )  # fmt: skip
        beginning.take_up()
        self._compression.begin(self.run.resumed, self.settings.payload_store)
        if self.run.resumed is None:
            self._save(0, {})
            if found := self._evaluate_centrally(0):
                log.info("the initial state, evaluated on the server: %s", found)

    def _ask_for_initial_state(self) -> Any:
        request = self._request("initialize", 0, dict(self.settings.train_config))
        return ask_for_initial_state(self._context(None), request, self.run)


def _as_it_is(content: StateDict, where: str) -> StateDict:
    return content


def _mean(tasks: Sequence[Task]) -> dict[str, float]:
    return weighted_mean((task.reply.num_examples, task.reply.all_metrics) for task in tasks)


def _row(reply: Reply) -> dict[str, Any]:
    """Return a rank's metrics, and after them what the line has names for: a metric must not stand in for that."""
    return {**reply.all_metrics, "num_examples": reply.num_examples, "seconds": round(reply.seconds, 6)}


def _evaluation(task: Task) -> EvaluateRes:
    if task.refused:
        return EvaluateRes(Status(Code.EVALUATE_NOT_IMPLEMENTED, task.refused), 0.0, 0, {})
    reply = task.reply
    loss = math.nan if reply.loss is None else reply.loss
    return EvaluateRes(Status(Code.OK, ""), loss, reply.num_examples, {**reply.shown_metrics})
