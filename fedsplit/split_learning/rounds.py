"""The rounds of a model that is cut: `fedsplit.server.round`, with tasks that are done in steps.

The state has entries of the ranks, ``lower.*`` and ``tail.*``, and entries ``upper.*``. A rank is given its own, and so
is the trainer of the upper part. What a rank hands over with a step is a payload in the server's store; its name goes
to the upper part's trainer, and the name of what that gives goes back. The server decodes none of them. When all ranks
are done, a rank's update is its own entries and those of the upper part that it trained with, and the rules merge them
as those of any other model.

A rank may be wrong or hostile. What it hands over has to be a whole payload of a bounded size before the upper part's
trainer sees it, the number of its steps is bounded too, and whatever is wrong costs that rank its part in the round.

Importing this module imports torch.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from fedsplit.aggregation import Update, check_update
from fedsplit.disk.payload_store import StoredPayload
from fedsplit.errors import AggregationError, RecordError, RunFailedError, UsageError
from fedsplit.exchange.records import Request, Scalar, printable
from fedsplit.run.history import Line
from fedsplit.run.time_account import STEP_STAGES, Stages
from fedsplit.server.conversation import HEADER_BYTES
from fedsplit.server.peer import Reply
from fedsplit.server.round import Rounds, Task
from fedsplit.server.strategy import read_update
from fedsplit.split_learning.beyond import Clock, differs
from fedsplit.split_learning.order import MOST_WINDOW, Order
from fedsplit.split_learning.upper import ERROR, WANTED
from fedsplit.split_learning.uppers import Uppers
from fedsplit.states.extra import join, separate
from fedsplit.states.header import read_header
from fedsplit.states.local_keys import is_local, named
from fedsplit.states.state_dict import StateDict, decode, encode
from fedsplit.wire.protocol import EMBEDDED

log = logging.getLogger("fedsplit")

_RANKS, _UPPER = ("lower.", "tail."), "upper."
# A client that says so for ever must not keep a round from its end, nor one that does steps for ever.
_MOST_AGAIN, _MOST_STEPS = 1_000, 100_000
# What a rank may hand over with one step: the upper part's trainer has all of it in memory.
_STEP_BYTES = 1 << 30
# How long the upper part's state may take to come beyond the round's deadline.
_LATE_S = 5.0


@dataclass(kw_only=True)
class Steps:
    """What all ranks do in one task of a round, and what the upper part came to by it."""

    rounds: SplitRounds
    order: Order
    training: bool
    # Under ``sequential``: what the next rank starts from.
    lower: StoredPayload
    # What all steps of a rank may have together, so that one rank cannot fill the disk for all.
    most_bytes: float
    clock: Clock = field(default_factory=Clock)
    count: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    payloads: set[str] = field(default_factory=set)
    # The upper parts by owner, once all ranks are done; or RecordError if there are none.
    uppers: Future[dict[int, StateDict]] = field(default_factory=Future)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_wanted: bool = False

    def owner(self, rank: int) -> int:
        """Return whose upper part a rank trains with: its own, or 0, which is everybody's."""
        return rank if self.rounds.beyond.mode == "sfl-v1" else 0

    def note(self, window: int, given: StoredPayload, taken: StoredPayload | None) -> None:
        """Note that so many steps were done: what a rank gave for them, and what it got."""
        with self._lock:
            self.count += window
            self.bytes_up += given.bytes
            self.bytes_down += taken.bytes if taken else 0

    def leave(self, rank: int, until: float, *, has_failed: bool) -> None:
        """Note that a rank is done; after the last one the upper part is asked for what it came to, if any rank was."""
        with self._lock:
            self._is_wanted |= not has_failed
        if not self.order.leave(rank):
            return
        try:
            if not self.count or not self._is_wanted:
                raise RecordError("no rank did a step")
            ends = self.rounds.beyond.end(until + _LATE_S)
            self.uppers.set_result(self.rounds.by_owner(ends) if self.training else {})
        except BaseException as exc:
            self.uppers.set_exception(exc)
            if not isinstance(exc, RecordError):
                raise


@dataclass(kw_only=True)
class SplitTask(Task):
    """What one rank is asked for in steps. Killed in between, its trainer does them again, the upper part does not."""

    steps: Steps
    # The digest of what the rank gave in each step, and the step that came of it.
    _given: list[tuple[str, StoredPayload | None, dict[str, Any]]] = field(default_factory=list)
    _given_bytes: int = 0
    # Whether the upper part waits for the gradient of what it gave this rank.
    _owes_gradient: bool = False

    def check_size(self, found: int) -> None:
        most = max(_STEP_BYTES, self.steps.lower.bytes + HEADER_BYTES)
        if found > most:
            raise RecordError(f"it gave {found:,} bytes at once, at most {most:,} are taken; use smaller batches")

    def until_done(self) -> Reply:
        """Ask step by step until there is a result or a failure."""
        first, state, steps, began = self.request, self.state, self.steps, time.monotonic()
        reply = Reply(status="error")
        try:
            passes_on = steps.rounds.beyond.mode == "sequential" and steps.training
            if passes_on:
                with steps.clock.measure("turn"):
                    steps.order.wait(self.rank, self._check)
                state = steps.lower
            reply = self._walk(first, state)
            if passes_on and not reply.failure:
                lower = self._stored(reply)
                if reason := steps.rounds.check_lower(self.rank, reply, lower):
                    raise RecordError(reason)
                steps.lower = steps.rounds.shared(lower)
        except RecordError as exc:
            reply = Reply(status="error", error={"message": str(exc)})
        finally:
            steps.clock.add("all", time.monotonic() - began)
            steps.leave(self.rank, self.context.ends_at, has_failed=reply.failure is not None)
        return reply

    def _walk(self, first: Request, state: StoredPayload) -> Reply:
        at = again = 0
        while True:
            # Step 0 comes with what --train-config says, the others with what the upper part found.
            payload, config = (state, first.config) if at == 0 else self._given[at - 1][1:]
            self.request = replace(first, step=at, config=config)
            self.state = payload  # type: ignore[assignment]
            asked = time.monotonic()
            reply = self._until_answered()
            self._account(reply, took_s := time.monotonic() - asked)
            if at == 0 and reply.status == "step":
                self.steps.rounds.note_exchange(took_s - reply.seconds - self.waited_s)
            if reply.status == "again":
                at, again = 0, again + 1
                if again > _MOST_AGAIN:
                    raise RecordError(f"its trainer began anew {again} times in one task")
                continue
            if reply.status != "step":
                return reply
            digest = reply.payload.digest if reply.payload else ""
            if at == len(self._given):
                self._given.append((digest, *self._do_step(reply)))
            elif digest != self._given[at][0]:
                raise RecordError(differs(f"the trainer of rank {self.rank}", first, at))
            at += 1
            if at > _MOST_STEPS:
                raise RecordError(f"its trainer wants more than {_MOST_STEPS:,} steps in one task")

    def _account(self, reply: Reply, took_s: float) -> None:
        """Note where the time of a question went, by what the client says of it."""
        clock = self.steps.clock
        if reply.status != "step":
            clock.add("rank hand-off", took_s)
            return
        clock.add("lower", reply.seconds)
        clock.add("rank hand-off", max(0.0, reply.handed_s - reply.seconds))
        clock.add("network", max(0.0, took_s - max(reply.seconds, reply.held_s)))

    def _do_step(self, reply: Reply) -> tuple[StoredPayload | None, dict[str, Any]]:
        """Let the upper part's trainer do a step with what the rank gave."""
        steps, rank = self.steps, self.rank
        (what, window), payload = self._wanted(reply), self._stored(reply)
        self._given_bytes += payload.bytes
        if self._given_bytes > steps.most_bytes:
            raise RecordError(
                f"its steps of this task have {self._given_bytes:,} bytes so far, and its share of what is free in "
                f"{self.context.store.root} is {steps.most_bytes:,.0f}; free some space, or let it do fewer batches"
            )
        with steps.clock.measure("turn"):
            steps.order.wait(rank, self._check)
        self._check()
        wanted: dict[str, Scalar] = {"what": what, "owner": steps.owner(rank), "window": window}
        asked = time.monotonic()
        answered = steps.rounds.beyond.of(rank).step(payload, wanted, self.context.ends_at)
        handed_s = time.monotonic() - asked - answered.waited_s
        steps.clock.add("turn", answered.waited_s)
        steps.clock.add("upper", answered.seconds)
        steps.clock.add("upper hand-off", max(0.0, handed_s - answered.seconds))
        self._owes_gradient = what == "forward" and steps.training
        if not self._owes_gradient:
            steps.order.done(rank)
        steps.note(window, payload, answered.payload)
        if error := answered.numbers.get(ERROR):
            raise RecordError(f"the trainer of the upper part could not do its step: {printable(str(error))}")
        return answered.payload and steps.rounds.shared(answered.payload), dict(answered.numbers)

    def _wanted(self, reply: Reply) -> tuple[str, int]:
        """Return what the rank wants of the upper part, for how many batches; raises RecordError if that cannot be."""
        what = reply.metrics.get("what")
        if what not in WANTED:
            found = printable(repr(what), 100)
            raise RecordError(f"its trainer wants {found} of the upper part, expected one of {', '.join(WANTED)}")
        if what == "backward" and not self._owes_gradient:
            raise RecordError("its trainer gave a gradient for no output of the upper part")
        window = reply.metrics.get("window", 1)
        if type(window) is not int or not 0 < window <= MOST_WINDOW:
            found = printable(repr(window), 100)
            raise RecordError(f"its trainer gave a window of {found} batches, expected 1 to {MOST_WINDOW}")
        return str(what), window

    def _stored(self, reply: Reply) -> StoredPayload:
        """Bring what the rank gave into the store, if it is not there; raises RecordError if it is no whole payload."""
        store, payload = self.context.store, reply.payload
        if payload and payload.via == "store":
            self.check_size(payload.bytes)
            if not store.take(payload.digest):
                with self.steps.clock.measure("network"):
                    self.fetch(reply)
            found = StoredPayload(
                digest=payload.digest, bytes=payload.bytes, path=store.path(payload.digest), identity=payload.identity
            )
        else:
            with self.steps.clock.measure("network"):
                content = self.fetch(reply)
            found = store.put([content])
        # Also what is refused now has to go in the end.
        self.steps.payloads.add(found.digest)
        # What the upper part's exchange would not take must not end the round for everybody.
        read_header(found.path, found.bytes)
        return found

    def _check(self) -> None:
        self.context.check_stop()
        self.context.check_time()


@dataclass(kw_only=True)
class SplitRounds(Rounds):
    """Runs the rounds with a model that is cut."""

    beyond: Uppers
    _has_noted: bool = False

    def _tasks(self, kind: str, server_round: int, chosen: Sequence[Any]) -> list[Task]:
        """Turn a strategy's instructions into tasks that are done in steps."""
        tasks = super()._tasks(kind, server_round, chosen)
        if any(task.state.digest != self._state.payload.digest for task in tasks):
            raise AggregationError(
                "the strategy gives ranks states of their own (rank_extra), which split learning cannot do yet"
            )
        states = join(self._entries(_RANKS), self._state.extra), self._entries(_UPPER)
        lower, upper = (self.shared(self.run.payloads.put(encode(state))) for state in states)
        training = kind == "train"
        config = tasks[0].request.config if tasks else {}
        self.beyond.begin(replace(self._request(kind, server_round, config), step=0, split=()), upper)
        ranks = [task.rank for task in tasks]
        order = Order(self.beyond.mode if training else "free", ranks, f"{self.settings.seed}/{server_round}")
        free = shutil.disk_usage(self.run.payloads.root).free
        self._steps = Steps(
            rounds=self, order=order, training=training, lower=lower, payloads={lower.digest, upper.digest},
            # As much comes back as is given.
            most_bytes=free / (2 * max(1, len(ranks))),
        )  # fmt: skip
        return [
            SplitTask(
                context=task.context, rank=task.rank, request=replace(task.request, step=0), state=lower,
                client=task.client, base=task.base, base_round=task.base_round, steps=self._steps,
            )
            for task in tasks
        ]  # fmt: skip

    def _train(self, server_round: int, stages: Stages) -> Line:
        line = super()._train(server_round, stages)
        steps = self._steps
        wall, seconds = stages.seconds.get("train", 0.0), steps.clock.seconds
        # What nobody else has named was the server's and the clients' own.
        seconds["relay"] = max(0.0, 2 * seconds.get("all", 0.0) - sum(seconds.values()))
        line["split"] = {
            "mode": self.beyond.mode, "steps": steps.count,
            "steps_per_second": round(steps.count / wall, 3) if wall else 0.0,
            "bytes_up": steps.bytes_up, "bytes_down": steps.bytes_down,
            "seconds": {stage: round(seconds.get(stage, 0.0), 6) for stage in STEP_STAGES},
        }  # fmt: skip
        return line

    def _fetch(
        self, task: Task, *, retains: bool, numbers: bool = True, may_read: Callable[[], None] = lambda: None
    ) -> Update | str:
        """Put a rank's update together: its own entries, and those of the upper part that it trained with."""
        steps, reply = self._steps, task.reply
        try:
            content = task.fetch(reply)
            task.stages.end("transfer")
            may_read()
            uppers = steps.uppers.result()
            task.stages.end("turn")
            if self.beyond.mode == "sequential":
                # All ranks trained one lower part, one after the other.
                content = self.run.payloads.map(steps.lower.digest, own=True)
            if (upper := uppers.get(steps.owner(task.rank))) is None:
                raise RecordError("it did no step with the upper part")
            state, extra = separate(decode(content, f"the update of rank {task.rank}"))
        except RecordError as exc:
            return str(exc)
        task.update_bytes = len(content)
        update = Update(rank=task.rank, state_dict=state | upper, num_examples=reply.num_examples,
                        metrics=reply.shown_metrics, extra=extra)  # fmt: skip
        refused = check_update(update, self._state.entries)
        task.stages.end("checking")
        return refused or self._with_extra_that_is_read(update)

    def note_exchange(self, seconds: float) -> None:
        """Say once what a batch costs besides its computation, where the engine makes that much."""
        if self.engine.name != EMBEDDED.name and not self._has_noted:
            self._has_noted = True
            log.warning(
                "on a %s a step takes %.1f s for its messages, which --engine embedded does in milliseconds; trainers "
                "with --window K hand over K batches by each",
                self.engine.name, seconds,
            )  # fmt: skip

    def check_lower(self, rank: int, reply: Reply, lower: StoredPayload) -> str | None:
        """Return why a lower part cannot go on to the next rank, or None: it could not load it, or make sense of it."""
        content, reference = self.run.payloads.map(lower.digest), self._entries(_RANKS)
        found = read_update(rank, content, reply.num_examples, reply.shown_metrics, reference)
        if isinstance(found, str):
            return found
        # They would become what the next rank is given of the server's rules.
        return f"extra tensors {named(found.extra)}, which sequential has no place for" if found.extra else None

    def _drop_payloads(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            task.state = self._steps.lower
        super()._drop_payloads(tasks)
        self._state.drop(self._steps.payloads | self.beyond.answers())

    # -- the beginning -------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        super()._begin()
        names = list(self._state.entries)
        upper = [name for name in names if name.startswith(_UPPER)]
        strange = [name for name in names if not name.startswith((*_RANKS, _UPPER))]
        if local := [name for name in upper if is_local(name, self.settings.local_patterns)]:
            raise UsageError(f"{named(local)} cannot be local: the upper part is trained beside the server")
        if strange or not 0 < len(upper) < len(names):
            raise UsageError(
                f"--split-learning needs a state with the entries lower.* and upper.*, this one has {named(names)}; it "
                "is of a run of another kind"
            )

    def _ask_for_initial_state(self) -> Any:
        lower = decode(super()._ask_for_initial_state(), "the initial state")
        if wrong := [name for name in lower if not name.startswith(_RANKS)]:
            raise RunFailedError(
                f"the trainers gave {named(wrong)} as initial state, expected lower.*: start them with --cut NAME, or "
                "with --part lower"
            )
        request = self._request("initialize", 0, dict(self.settings.train_config))
        try:
            payload = self.beyond.all[0].initial_state(replace(request, split=()))
        except RecordError as exc:
            raise RunFailedError(f"the upper part has no initial state: {exc}") from exc
        upper = decode(self.run.payloads.map(payload.digest), "the upper part")
        content = b"".join(encode(lower | upper))
        self._state.drop([payload.digest])
        return content

    def _entries(self, prefix: str | tuple[str, ...]) -> StateDict:
        return {name: tensor for name, tensor in self._state.entries.items() if name.startswith(prefix)}

    def shared(self, payload: StoredPayload) -> StoredPayload:
        """Bring what a rank will be given to the store at ``--payload-store URL``, if there is one."""
        if self.remote:
            self.remote.give(payload.path, payload.digest)
        return payload

    def by_owner(self, ends: Sequence[StoredPayload | None]) -> dict[int, StateDict]:
        """Read what the trainers of upper parts came to: each owner's entries, under ``<owner>/<name>``."""
        found: dict[int, StateDict] = {}
        for payload in ends:
            if payload is None:
                raise RecordError("the trainer of the upper part gave no state")
            for name, tensor in decode(self.run.payloads.map(payload.digest), "the upper part").items():
                owner, _, own_name = name.partition("/")
                if not owner.isdecimal():
                    raise RecordError(f"the trainer of the upper part gave {name!r}, expected OWNER/upper.NAME")
                found.setdefault(int(owner), {})[own_name] = tensor
        return found
