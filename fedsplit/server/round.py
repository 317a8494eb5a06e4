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

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import fedsplit.wire.flower_env  # noqa: F401  (first: it keeps Flower from calling home)

# isort: split
from flwr.common import Code, EvaluateIns, EvaluateRes, FitIns, Status
from flwr.server.client_proxy import ClientProxy

from fedsplit.aggregation import Update
from fedsplit.disk.checkpoints import BackgroundWriter
from fedsplit.disk.payload_store import StoredPayload
from fedsplit.errors import RecordError, RunFailedError
from fedsplit.exchange.records import Request
from fedsplit.run.directory import Run
from fedsplit.run.events import event
from fedsplit.run.history import Line, weighted_mean
from fedsplit.run.time_account import Stages, describe_round
from fedsplit.server.conversation import Conversation, Reply, RoundContext
from fedsplit.server.observer import Observer
from fedsplit.server.roster import Roster
from fedsplit.server.settings import ServerSettings
from fedsplit.server.state import GlobalState
from fedsplit.server.streaming import Merge, StreamingStrategy, read_update, refusal
from fedsplit.server.turns import Turns, in_parallel
from fedsplit.states.local_keys import is_local
from fedsplit.states.state_dict import decode, encode
from fedsplit.wire.protocol import Engine

if TYPE_CHECKING:
    from fedsplit.disk.remote_store import RemoteStore

log = logging.getLogger("fedsplit")

# Long polling: with many ranks the clients hold each question longer, or the server would do nothing but ask. A run
# that is stopped waits at most that long for the ranks.
_RANK_HOLD_S, _MANY_HOLD_S = 0.05, 5.0
_FAREWELL_S = 10.0


@dataclass(kw_only=True)
class Assignment:
    """What one rank is asked for in a round, and what came of it."""

    client: ClientProxy
    request: Request
    state: StoredPayload
    reply: Reply | None = None
    refused: str | None = None
    stages: Stages = field(default_factory=Stages)


Assignments = dict[int, Assignment]


class Rounds:
    """Runs the rounds.

    Parameters
    ----------
    run
        What is on the disk: run id, checkpoints, history, payload store.
    settings
        The server's flags.
    strategy
        Who takes part, and how updates become the next state.
    roster
        The connected ranks.
    engine
        How Flower's engine wants to be spoken through.
    remote
        The store at ``--payload-store URL``.
    observer
        Who watches.
    writer
        Writes checkpoints.
    stop
        Set when the run is being stopped.
    """

    def __init__(
        self,
        run: Run,
        settings: ServerSettings,
        strategy: StreamingStrategy,
        roster: Roster,
        engine: Engine,
        *,
        remote: RemoteStore | None,
        observer: Observer,
        writer: BackgroundWriter,
        stop: threading.Event,
    ) -> None:
        self._run = run
        self._settings = settings
        self._strategy = strategy
        self._roster = roster
        self._engine = engine
        self._remote = remote
        self._observer = observer
        self._writer = writer
        self._stop = stop
        self._state = GlobalState(run.payloads, remote)
        self._ahead: dict[int, Reply] = {}

    def run_all(self) -> None:
        """Run every round that is left."""
        settings, resumed = self._settings, self._run.resumed
        done = resumed.server_round if resumed else 0
        # The last saved round may have been trained and not evaluated when the server died.
        unfinished = done > self._run.history.last_round()
        if resumed and done >= settings.rounds and not unfinished:
            log.info("run %s is complete: %d of %d rounds are done", self._run.run_id, done, settings.rounds)
            self._roster.wait_for_ranks(settings.min_clients, _FAREWELL_S)
            return
        self._begin()
        for server_round in range(max(done, 1) if unfinished else done + 1, settings.rounds + 1):
            self.round(server_round, trained=server_round == done)

    # -- the beginning -------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Take up the newest checkpoint, or find a state to start from."""
        resumed, strategy = self._run.resumed, self._strategy
        if resumed:
            self._state.set(self._run.payload_of(resumed))
            log.info(
                "run %s goes on after round %d of %d", self._run.run_id, resumed.server_round, self._settings.rounds
            )
        elif self._run.initial:
            self._state.put(self._without_local(self._run.initial()))
        self._roster.wait_for(self._settings.min_clients)
        if self._state.payload is None:
            self._state.put([self._ask_for_initial_state()])
        self._begin_strategy()
        if resumed:
            if strategy.memory_file in resumed.files:
                strategy.load_memory(resumed.path(strategy.memory_file))
            return
        if (given := strategy.initialize_parameters(self._roster)) is not None:
            log.info("the strategy gave the initial values")
            self._state.put(given.tensors)
        self._save(0, {})
        if found := self._evaluate_centrally(0):
            log.info("the initial state, evaluated on the server: %s", found)

    def _without_local(self, chunks: Sequence[Any]) -> list[Any]:
        """Take what stays with the trainers out of a state, and note what that was."""
        state = decode(b"".join(chunks), "the initial state")
        local = {name for name in state if is_local(name, self._settings.local_patterns)}
        self._run.note_local_entries(
            {name: (str(state[name].dtype).removeprefix("torch."), list(state[name].shape)) for name in local}
        )
        return encode({name: tensor for name, tensor in state.items() if name not in local})

    def _ask_for_initial_state(self) -> Any:
        failures = []
        for rank in self._roster.ranks():
            conversation = Conversation(self._context(None), rank, self._request("initialize", 0), None)
            reply = conversation.until_done()
            if reply.failure is None and reply.digest:
                content = conversation.fetch(reply)
                self._run.note_local_entries(json.loads(str(reply.metrics.get("local_entries", "{}"))))
                log.info("rank %d: gave the initial state (%s bytes)", rank, f"{reply.payload_bytes:,}")
                return content
            failures.append(f"rank {rank}: {reply.failure or 'no payload'}")
            log.warning("no initial state from %s", failures[-1])
        raise RunFailedError(f"no trainer gave an initial state ({'; '.join(failures)}); see --initial-checkpoint")

    def _begin_strategy(self) -> None:
        rows = self._strategy.begin_run(self._state.entries, self._run.local_entries())
        self._run.note_split(rows)
        self._observer.split_resolved(rows)
        for part, entries, size, rule in rows:
            log.info(
                "split: %s: %d entries, %s bytes, rule %s", part, entries, f"{size:,}", rule,
                extra=event("split", part=part, entries=entries, bytes=size, rule=rule),
            )  # fmt: skip

    # -- a round -------------------------------------------------------------------------------------------------------

    def round(self, server_round: int, *, trained: bool) -> None:
        """Run one round.

        Parameters
        ----------
        trained
            Whether its state is there already: the server died before the round had ended.
        """
        settings, strategy, stages = self._settings, self._strategy, Stages()
        deadline = None if settings.round_timeout is None else time.monotonic() + settings.round_timeout
        self._writer.check()
        self._roster.wait_for(settings.min_clients)
        self._roster.begin_round(settings.seed, server_round)
        context = self._context(deadline)
        stages.end("wait for clients")

        line = dict(self._run.partial_line()) if trained else self._train(server_round, context, stages)
        if not trained and not strategy.remembers_evaluations:
            self._save(server_round, line)
            stages.end("wait for the last checkpoint")
        if "seconds" not in line:
            self._evaluate(server_round, context, stages, line)
            if strategy.remembers_evaluations:
                self._writer.wait()
                stages.end("wait for the last checkpoint")
            line = {"round": server_round, "seconds": stages.total(), **line, "stages": stages.seconds}
            if strategy.remembers_evaluations:
                self._save(server_round, line)

        self._run.history.append(line)
        log.info(
            "%s", describe_round(line, settings.rounds), extra=event("round", total_rounds=settings.rounds, **line)
        )
        self._observer.round_ended(line, settings.rounds)

    def _train(self, server_round: int, context: RoundContext, stages: Stages) -> Line:
        """Let the strategy's choice of ranks train, and merge their updates."""
        strategy = self._strategy
        chosen = strategy.configure_fit(server_round, self._state.parameters, self._roster)
        tasks = self._tasks("train", server_round, chosen)
        merge, turns = strategy.start_fit(server_round), Turns(list(tasks))
        accepted = 0

        def train(rank: int) -> None:
            nonlocal accepted
            task = tasks[rank]
            conversation = Conversation(context, rank, task.request, task.state)
            task.stages = Stages()
            try:
                reply = task.reply = self._ahead.get(rank) or conversation.until_done()
                task.stages.end("hand-off", waiting=conversation.waited_s, training=reply.seconds)
                if not reply.failure:
                    self._observer.answered(rank, None)
                update: Update | str = reply.failure or ""
                # What lies in the store is read and checked beside the others. What comes in messages takes room here:
                # it is fetched when at most one other has to be merged before it.
                turns.wait(rank, ahead=len(tasks) if reply.via == "store" else 1)
                task.stages.end("turn")
                if not reply.failure:
                    update = self._fetch(conversation, reply, merge, task.stages)
                turns.wait(rank)
                task.stages.end("turn")
                if isinstance(update, str):
                    self._refuse(rank, task, update)
                else:
                    merge.add(update)
                    accepted += 1
                    task.stages.end("merging")
            finally:
                turns.done(rank)

        self._ask_all(train, tasks)
        self._ahead.clear()
        stages.end("train")

        failures = [(task.client, refusal(task.refused)) for task in tasks.values() if task.refused]
        state, metrics = strategy.end_fit(server_round, merge, [*failures]) if tasks else (None, {})
        chunks = None if state is None else encode(state)
        # Only now: ranks with the same result share one payload.
        self._drop_payloads(tasks)
        if chunks is not None:
            self._state.put(chunks)
        central = self._evaluate_centrally(server_round)
        stages.end("merge")
        return self._training_line(tasks, accepted, metrics) | strategy.line_entries() | central

    def _fetch(self, conversation: Conversation, reply: Reply, merge: Merge, stages: Stages) -> Update | str:
        """Get an update and check it; returns why it is refused if it is."""
        if not reply.digest:
            return "it came without a state_dict"
        try:
            content = conversation.fetch(reply)
        except RecordError as exc:
            return str(exc)
        if merge.retains and isinstance(content, bytes):
            # What has to wait for the others waits in a file, not in memory.
            content = self._run.payloads.map(self._run.payloads.put([content]).digest, own=True)
        stages.end("transfer")
        try:
            return read_update(reply.rank, content, reply.num_examples, reply.metrics, self._state.entries)
        finally:
            stages.end("checking")

    def _training_line(self, tasks: Assignments, accepted: int, metrics: Mapping[str, Any]) -> Line:
        good = _good(tasks)
        return {
            "train": weighted_mean((reply.num_examples, reply.all_metrics) for reply in good.values()) | {**metrics},
            "evaluate": {},
            "clients": {
                str(rank): {
                    "num_examples": reply.num_examples, "seconds": round(reply.seconds, 6),
                    "bytes": reply.payload_bytes, "stages": tasks[rank].stages.seconds, **reply.all_metrics,
                }
                for rank, reply in good.items()
            },
            "asked": len(tasks),
            "accepted": accepted,
            "refused": {str(rank): task.refused for rank, task in tasks.items() if task.refused},
        }  # fmt: skip

    def _evaluate(self, server_round: int, context: RoundContext, stages: Stages, line: Line) -> None:
        """Let the strategy's choice of ranks evaluate the state, and put their results into the line."""
        strategy = self._strategy
        chosen = strategy.configure_evaluate(server_round, self._state.parameters, self._roster)
        if not chosen:
            return
        tasks = self._tasks("evaluate", server_round, chosen)
        asks_ahead, ahead_s = self._asks_ahead(server_round), [0.0]

        def evaluate(rank: int) -> None:
            task = tasks[rank]
            # The next round's training starts from the same state.
            then = replace(task.request, kind="train", server_round=server_round + 1) if asks_ahead else None
            conversation = Conversation(context, rank, task.request, task.state, then)
            reply = task.reply = conversation.until_done()
            ahead_s.append(conversation.ahead_s)
            if conversation.ahead:
                self._ahead[rank] = conversation.ahead
            if reason := reply.failure or (None if reply.num_examples > 0 else "it evaluated no examples"):
                self._refuse(rank, task, reason)
            else:
                self._observer.answered(rank, None)

        self._ask_all(evaluate, tasks)
        self._drop_payloads(tasks)
        good = _good(tasks)
        results = [(tasks[rank].client, _evaluation(reply)) for rank, reply in good.items()]
        failures = [
            (task.client, EvaluateRes(Status(Code.EVALUATE_NOT_IMPLEMENTED, task.refused), 0.0, 0, {}))
            for task in tasks.values()
            if task.refused
        ]
        loss, metrics = strategy.aggregate_evaluate(server_round, results, [*failures])
        line["evaluate"] = weighted_mean((reply.num_examples, reply.all_metrics) for reply in good.values())
        if loss is not None and not math.isnan(loss):
            line["evaluate"]["loss"] = loss
        line["evaluate"] |= metrics
        for rank, reply in good.items():
            line["clients"].setdefault(str(rank), {})["evaluate"] = {
                "num_examples": reply.num_examples, "seconds": round(reply.seconds, 6), **reply.all_metrics,
            }  # fmt: skip
        for rank, task in tasks.items():
            if task.refused:
                line["refused"].setdefault(str(rank), f"evaluate: {task.refused}")
        stages.end("evaluate", **({"train ahead": max(ahead_s)} if max(ahead_s) else {}))

    def _evaluate_centrally(self, server_round: int) -> dict[str, Any]:
        """Return what the strategy finds when it evaluates the state itself, as ``central``."""
        found = self._strategy.evaluate(server_round, self._state.parameters)
        return {} if found is None else {"central": {"loss": found[0], **found[1]}}

    def _asks_ahead(self, server_round: int) -> bool:
        """Tell whether to ask for the next round's training along with this one's evaluation, of the same state.

        Only where it is certain that all will be asked for it, and that no deadline has to be measured from its start.
        """
        certain = self._strategy.asks_everyone and self._settings.round_timeout is None
        return self._engine.asks_ahead and certain and server_round < self._settings.rounds

    # -- asking --------------------------------------------------------------------------------------------------------

    def _tasks(
        self, kind: str, server_round: int, chosen: Sequence[tuple[ClientProxy, FitIns | EvaluateIns]]
    ) -> Assignments:
        """Turn a strategy's instructions into what each rank is asked for, in rank order."""
        if any(ins.parameters is not self._state.parameters for _, ins in chosen):
            # The checkpoint being written drops the state before the last: it may be what a rank is given.
            self._writer.wait()
        tasks = {}
        for client, ins in sorted(chosen, key=lambda each: int(each[0].cid)):
            config: dict[str, Any] = {**ins.config}
            request = replace(self._request(kind, server_round), config=config)
            tasks[int(client.cid)] = Assignment(
                client=client, request=request, state=self._state.payload_of(ins.parameters)
            )
        return tasks

    def _ask_all(self, job: Any, tasks: Assignments) -> None:
        for task in tasks.values():
            self._observer.asked(task.request.kind, task.request.server_round, self._settings.rounds, list(tasks))
            break
        in_parallel(job, list(tasks), self._stop)

    def _request(self, kind: str, server_round: int) -> Request:
        return Request(
            run_id=self._run.run_id, kind=kind, server_round=server_round, total_rounds=self._settings.rounds,
            config=dict(self._settings.train_config), split=self._settings.local_patterns,
        )  # fmt: skip

    def _context(self, deadline: float | None) -> RoundContext:
        hold_s = min(_MANY_HOLD_S, _RANK_HOLD_S * len(self._roster.ranks()))
        return RoundContext(
            roster=self._roster, store=self._run.payloads, remote=self._remote,
            client_wait_s=self._settings.client_wait,
            deadline=deadline, deadline_s=self._settings.round_timeout, stop=self._stop, observer=self._observer,
            engine=replace(self._engine, hold_s=max(self._engine.hold_s, hold_s)),
        )  # fmt: skip

    def _refuse(self, rank: int, task: Assignment, reason: str) -> None:
        task.refused, kind = reason, task.request.kind
        log.warning(
            "rank %d: %s not counted: %s", rank, kind, reason,
            extra=event("refused", rank=rank, kind=kind, reason=reason),
        )  # fmt: skip
        self._observer.answered(rank, reason)
        if task.reply and task.reply.traceback:
            log.warning("rank %d: the trainer's traceback:\n%s", rank, task.reply.traceback.rstrip())

    def _drop_payloads(self, tasks: Assignments) -> None:
        """Remove the results of a round, and the states that were sent to single ranks."""
        results = [task.reply.digest for task in tasks.values() if task.reply]
        self._state.drop([*results, *(task.state.digest for task in tasks.values())])

    def _save(self, server_round: int, line: Line) -> None:
        """Write a round's checkpoint beside what follows; waits only if the one before is still being written."""
        state, memory, best = self._state.payload, self._strategy.dump_memory(), self._run.history.best_round()
        if state is None:
            raise RunFailedError("there is no state to save")
        files: dict[str, Any] = {"state.safetensors": state.path}
        if memory is not None:
            files[self._strategy.memory_file] = [memory]
        metrics = {key: line.get(key, {}) for key in ("train", "evaluate")}
        self._writer.submit(lambda: self._run.save(server_round, state.digest, files, metrics, dict(line), best))


def _good(tasks: Assignments) -> dict[int, Reply]:
    """Return the replies that count, in rank order."""
    return {rank: task.reply for rank, task in tasks.items() if task.reply and not task.refused}


def _evaluation(reply: Reply) -> EvaluateRes:
    loss = math.nan if reply.loss is None else reply.loss
    return EvaluateRes(Status(Code.OK, ""), loss, reply.num_examples, reply.metrics)
