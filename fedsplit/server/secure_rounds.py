"""Rounds whose updates are summed securely: `fedsplit.server.round`, with the stages of `fedsplit.secure` after it.

All ranks train first, so who fails or is too slow there costs nothing. Then every stage asks all ranks that are left,
each by a further step of its task; a rank that does not answer in time is out from there on. An update counts once its
masked vector is here and the rest of it was checked. When the masks are off, the mean takes the place of the summed
entries in each update, and the rules merge what comes of it as they merge any updates: the mean of equal states is that
state, bit for bit. With too few answers in any stage the state stays as it was, and the history says why.

Each stage may take as long as ``--round-timeout`` says, or training and all of them together would need one deadline.

Importing this module imports torch.
"""

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch

from fedsplit.aggregation import Update, check_update
from fedsplit.disk.payload_store import StoredPayload
from fedsplit.errors import RecordError, UsageError
from fedsplit.exchange.records import SecureTerms
from fedsplit.run.history import Line
from fedsplit.run.time_account import Stages
from fedsplit.secure import messages, protocol
from fedsplit.secure.vector import WORD, to_mean
from fedsplit.server.conversation import HEADER_BYTES, Conversation
from fedsplit.server.round import Rounds, Task
from fedsplit.server.strategy import Merge
from fedsplit.server.turns import in_parallel
from fedsplit.states.arrays import Array, Arrays, encode
from fedsplit.states.extra import separate
from fedsplit.states.local_keys import named
from fedsplit.states.state_dict import StateDict, decode

log = logging.getLogger("fedsplit")

_STAGES = ("its keys", "its shares", "its masked update", "its shares of masks")


@dataclass(kw_only=True)
class Stage(Conversation):
    """What one rank is asked for in a stage after the training."""

    most_bytes: int

    def check_size(self, found: int) -> None:
        if found > self.most_bytes:
            raise RecordError(f"its answer has {found:,} bytes, expected at most {self.most_bytes:,}")


@dataclass(kw_only=True)
class Sum:
    """The sum of a round, as far as it has come."""

    ranges: Mapping[str, float]
    total: Any
    updates: dict[int, Update] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    payloads: set[str] = field(default_factory=set)
    counts: list[int] = field(default_factory=list)
    bytes_up: int = 0


class SecureRounds(Rounds):
    """Runs the rounds of a server that is to see no single update of the parts with a ``secure`` rule."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._terms = cast(SecureTerms, self.settings.secure_terms)
        self._sum = Sum(ranges={}, total=np.zeros(0, WORD))
        # What is asked for along with an evaluation would have no stages.
        self.engine = replace(self.engine, asks_ahead=False)

    def _begin(self) -> None:
        super()._begin()
        check_sums(self._state.entries, self._ranges())

    def _ranges(self) -> dict[str, float]:
        return messages.ranges_of(self._state.entries, self.settings.local_patterns, self._terms)

    def _tasks(self, kind: str, server_round: int, chosen: Any) -> list[Task]:
        tasks = super()._tasks(kind, server_round, chosen)
        for task in tasks if kind == "train" else ():
            task.request = replace(task.request, step=0, secure=self._terms)
        return tasks

    def _train(self, server_round: int, stages: Stages) -> Line:
        line = super()._train(server_round, stages)
        names = ("keys", "shares", "masked", "unmasked")
        line["secure"] = dict(zip(names, self._sum.counts, strict=False)) | {"bytes_up": self._sum.bytes_up}
        return line

    def _gather(self, server_round: int, tasks: list[Task], merge: Merge) -> list[Task]:
        """Let ranks train, sum their updates, and give the merge what comes of it, in rank order."""
        ranges = self._ranges()
        size = sum(self._state.entries[name].numel() for name in ranges) + 1
        self._sum = Sum(ranges=ranges, total=np.zeros(size, WORD))
        by_rank = {task.rank: task for task in tasks}
        why = dict.fromkeys(by_rank, "")
        try:
            mean = self._sum_up(server_round, by_rank, why)
        except RecordError as exc:
            log.warning("round %d: no sum: %s", server_round, exc)
            why = {rank: why[rank] or f"no sum: {exc}" for rank in why}
            self._sum.updates.clear()
        for rank, task in by_rank.items():
            task.stages.end("secure sum")
            if update := self._sum.updates.get(rank):
                self._add(merge, task, replace(update, state_dict={**update.state_dict, **mean}))
            else:
                self._refuse(task, why[rank])
        return tasks

    # -- the stages ----------------------------------------------------------------------------------------------------

    def _sum_up(self, server_round: int, tasks: dict[int, Task], why: dict[int, str]) -> StateDict:
        """Return the mean of the updates; raises RecordError if there is none. In ``why`` is who failed by what."""
        keys = self._ask(0, tasks, {}, why, self._take_keys)
        group = messages.group_of(self.run.run_id, server_round, self._terms, keys)
        group.check()
        question = messages.rows(keys)
        boxes = self._ask(1, tasks, dict.fromkeys(keys, question), why, lambda task, content: self._take_rows(
            1, task, content, set(group.holders(task.rank))
        ))  # fmt: skip
        inboxes = {
            rank: {sender: boxes[sender][rank] for sender in group.holders(rank) if sender in boxes} for rank in boxes
        }
        asked = {rank: messages.rows(inbox) for rank, inbox in inboxes.items()}
        self._check_enough(group, boxes)
        masked = self._ask(2, tasks, asked, why, self._take_masked)
        self._check_enough(group, masked)
        question = messages.rows(dict.fromkeys(masked, b"\1"))
        revealed = self._ask(3, tasks, dict.fromkeys(masked, question), why, lambda task, content: self._take_rows(
            3, task, content, set(inboxes[task.rank])
        ))  # fmt: skip
        protocol.unmask(group, list(boxes), list(masked), revealed, self._sum.total)
        return self._mean(group, sum(group.adverts[rank].weight for rank in masked))

    def _check_enough(self, group: protocol.Group, left: Collection[int]) -> None:
        needed = max(self.strategy.min_updates, min(map(group.needed, group.adverts)))
        if len(left) < needed:
            raise RecordError(f"{len(left)} ranks are left, at least {needed} are needed")

    def _ask(
        self, step: int, tasks: dict[int, Task], questions: Mapping[int, Mapping[str, Array]], why: dict[int, str],
        take: Callable[[Task, Any], Any],
    ) -> dict[int, Any]:  # fmt: skip
        """Ask ranks for a stage, all at the same time; returns what was taken of their answers, by rank."""
        context, found = self._context(self.settings.round_timeout), dict[int, Any]()
        payloads = self._put(questions)

        def ask(task: Task) -> None:
            try:
                content = self._ask_one(context, step, task, payloads[task.rank]) if step else self._train_one(task)
                found[task.rank] = take(task, content)
            except RecordError as exc:
                why[task.rank] = f"{_STAGES[step]} did not come: {exc}" if step else str(exc)
                if step:
                    log.warning("rank %d: %s", task.rank, why[task.rank])

        in_parallel(ask, [task for rank, task in tasks.items() if step == 0 or rank in questions])
        self._sum.counts.append(len(found))
        return {rank: found[rank] for rank in sorted(found)}

    def _train_one(self, task: Task) -> Any:
        self._await_training(task)
        if task.reply.status == "ok":
            # What it sent is not looked at, and leaves the store with the round.
            raise RecordError(
                "its trainer knows nothing of secure sums, and sent its update openly: client_main.py --mask-here"
            )
        return task.fetch(task.reply)

    def _put(self, questions: Mapping[int, Mapping[str, Array]]) -> dict[int, StoredPayload]:
        """Put questions where ranks find them, one that several are asked only once; returns the payload by rank."""
        distinct = {id(question): question for question in questions.values()}
        put = {key: self.run.payloads.put(encode(question)) for key, question in distinct.items()}
        for payload in put.values():
            self._sum.payloads.add(payload.digest)
            if self.remote:
                self.remote.give(payload.path, payload.digest)
        return {rank: put[id(question)] for rank, question in questions.items()}

    def _ask_one(self, context: Any, step: int, task: Task, question: StoredPayload) -> Any:
        # Of an update, in any dtype: the words of the summed entries, and the others as they are.
        most = HEADER_BYTES + (self._state.payload.bytes + 4 * self._sum.total.size if step == 2 else 0)
        request = replace(task.request, step=step, config={}, refused=None)
        stage = Stage(context=context, rank=task.rank, request=request, state=question, most_bytes=most)
        reply = stage.until_done()
        if reply.payload:
            with self._sum.lock:
                self._sum.payloads.add(reply.payload.digest)
                self._sum.bytes_up += reply.payload.bytes
        if reply.status == "ok":
            raise RecordError("its trainer answered with something else")
        content = stage.fetch(reply)
        if step == 2:
            task.update_bytes = len(content)
        return content

    def _take_keys(self, task: Task, content: Any) -> bytes:
        row = messages.read_rows(_arrays(task, content), messages.LENGTHS[0]).get(task.rank)
        if row is None or messages.of_row(row).weight != task.reply.num_examples:
            raise RecordError("its keys are not with the number of its examples")
        protocol.check_keys(messages.of_row(row))
        return row

    def _take_rows(self, step: int, task: Task, content: Any, ranks: set[int]) -> dict[int, bytes]:
        found = messages.read_rows(_arrays(task, content), messages.LENGTHS[step])
        if found.keys() != ranks:
            raise RecordError(f"there are shares for {len(found)} ranks, expected {len(ranks)}")
        return found

    def _take_masked(self, task: Task, content: Any) -> None:
        """Check what travelled openly, and add the masked vector to the sum."""
        total, base = self._sum, task.base
        state, extra = separate(decode(content, f"the answer of rank {task.rank}"))
        if openly := total.ranges.keys() & state.keys():
            raise RecordError(f"it sent {named(sorted(openly))} openly")
        vector = extra.get(messages.MASKED)
        if vector is None or vector.dtype != torch.int32 or vector.shape != total.total.shape:
            raise RecordError("its masked vector is missing, or of another length")
        reply, placeholders = task.reply, {name: base[name] for name in total.ranges}
        update = Update(
            rank=task.rank, state_dict={**state, **placeholders}, num_examples=reply.num_examples,
            metrics=reply.shown_metrics, base_round=task.base_round,
        )  # fmt: skip
        if reason := check_update(update, base):
            raise RecordError(reason)
        with total.lock:
            np.add(total.total, vector.numpy().view(np.uint32), out=total.total)
            total.updates[task.rank] = update

    def _mean(self, group: protocol.Group, weight: int) -> StateDict:
        """Return the summed entries of the next state: where they were, plus the mean of what changed."""
        at, mean = 0, StateDict()
        for name, most in self._sum.ranges.items():
            start = self._state.entries[name]
            words = self._sum.total[at : at + start.numel()]
            change = torch.from_numpy(to_mean(words, most, weight, group.weight)).reshape(start.shape)
            mean[name] = (start.double() + change).to(start.dtype)
            at += start.numel()
        return mean

    def _drop_payloads(self, tasks: Any) -> None:
        super()._drop_payloads(tasks)
        self._state.drop(self._sum.payloads)


def _arrays(task: Task, content: Any) -> Arrays:
    return Arrays(content, f"the answer of rank {task.rank}")


def check_sums(state: Mapping[str, torch.Tensor], names: Iterable[str]) -> None:
    """Raise UsageError for entries of secure parts that cannot be summed as they are."""
    if wrong := [name for name in names if not state[name].is_floating_point()]:
        raise UsageError(
            f"secure(…) sums floating point entries only, not {named(wrong)}: give them a rule of their own before it, "
            "such as --aggregate '*.num_batches_tracked=max'"
        )
