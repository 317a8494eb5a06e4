"""The trainer's side: what a training script uses to take part in a federation, without importing Flower.

::

    with Trainer(rank=1, model=model) as trainer:
        for task in trainer:
            task.load_into(model)
            if task.kind == "evaluate":
                task.reply(loss=…, num_examples=…, metrics={"accuracy": …})
            else:
                task.reply(model, num_examples=…, metrics={"loss": …})

The process is nobody's child: it may be started before or after its client and outlives it. Killed at any moment and
started again, it finds the task that has no answer and does it again from the same state.

Where a process group of torch.distributed is initialised, the same lines run in every process and act as one trainer
(see `fedsplit.trainer.process_group`). With ``standalone=True`` the trainer asks itself (see
`fedsplit.trainer.standalone`).
"""

from __future__ import annotations

import io
import json
import logging
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Literal, Self

import torch

from fedsplit.disk.checkpoints import BackgroundWriter, Checkpoint, CheckpointStore
from fedsplit.disk.files import make_private_directory, write_chunks
from fedsplit.errors import CheckpointError, FedSplitError, TrainingError, UsageError
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import FinishedRecord, Scalar, TaskRecord, scalars
from fedsplit.states.local_keys import is_local
from fedsplit.states.state_dict import ModelSource, StateDict, encode, load_into, map_file, own_state
from fedsplit.trainer.channel import Answer, Channel, ExchangeChannel

log = logging.getLogger("fedsplit")

# A server that finds its newest checkpoints corrupt goes back up to its --keep-checkpoints (3) rounds; the trainer
# must still have the round before those, and is itself up to one round ahead.
KEEP_ROUNDS = 5
_LOCAL_STATE = "local_state.pt"
_LOCAL_PART = "local.safetensors"


class Task:
    """One request of the server, as the training loop sees it.

    Attributes
    ----------
    kind : {"train", "evaluate", "initialize"}
        ``initialize`` is seen only by a trainer that was given no model.
    server_round, total_rounds : int
        The round, counted from 1, and how many there will be.
    config : Mapping[str, bool | int | float | str]
        What ``server_main.py --train-config`` gave.
    """

    def __init__(self, trainer: Trainer, record: TaskRecord, base: Checkpoint | None, restore: bool) -> None:
        self.kind = record.kind
        self.server_round = record.server_round
        self.total_rounds = record.total_rounds
        self.config: Mapping[str, Scalar] = record.config
        self.restore = restore
        self._trainer = trainer
        self._record = record
        self._base = base
        self._state: StateDict | None = None
        self._began = time.monotonic()
        self._stop = False
        self.answered = False
        self.failed = False

    @property
    def state_dict(self) -> StateDict:
        """The state that was received, mapped from the exchange: read it or copy it; writing to it changes nothing."""
        if self._state is None:
            self._state = self._trainer._channel.read_state(self._record)
        return self._state

    @property
    def local_state(self) -> Any:
        """What was kept with the last round that this trainer took part in, or None at the start."""
        if self._base is None or _LOCAL_STATE not in self._base.files or self._trainer.state == "reset":
            return None
        return torch.load(self._base.path(_LOCAL_STATE), weights_only=True, map_location="cpu")

    def is_local(self, name: str) -> bool:
        """Tell whether an entry of the state_dict stays at home under the server's rules."""
        return is_local(name, self._record.split)

    def load_into(self, model: torch.nn.Module) -> None:
        """Copy the received state into a model, by name; entries that the rules keep local stay as they are.

        Raises
        ------
        StateMismatchError
            If keys, shapes or dtypes differ; the model has not changed then.
        """
        state = dict(self.state_dict)
        own = own_state(model)
        kept = {name: tensor for name, tensor in own.items() if self.is_local(name)}
        where = f"what the server sent for {self.kind} of round {self.server_round}"
        load_into(model, state | {**kept, **self._local_part(kept)}, where=where)

    def reply(
        self,
        model: ModelSource | None = None,
        *,
        num_examples: int,
        loss: float | None = None,
        metrics: Mapping[str, Scalar] | None = None,
        local_state: Any = None,
    ) -> None:
        """Answer the task.

        Parameters
        ----------
        model
            The module or state_dict after training; none for ``evaluate``.
        num_examples
            How many examples this answer speaks for: its weight in the merge. In several processes each gives its own,
            and the answer has their sum.
        loss
            Mean loss over them; needed for ``evaluate``. In several processes each gives that of its own examples,
            as with `metrics`, and the answer has the weighted mean.
        metrics
            Further numbers for the server's history.
        local_state
            What must outlive the process (optimizer, scheduler, generators): tensors, numbers, strings, and lists,
            tuples and dicts of these. It comes back as `local_state`, also after a kill.
        """
        if self.answered:
            raise UsageError(f"{self.kind} of round {self.server_round} was answered already")
        if self.kind == "evaluate" and loss is None:
            raise UsageError("an evaluation is answered with task.reply(loss=…, num_examples=…)")
        if self.kind != "evaluate" and model is None:
            raise UsageError(f"{self.kind} is answered with task.reply(model, num_examples=…)")
        if isinstance(num_examples, bool) or not isinstance(num_examples, int) or num_examples < 0:
            raise UsageError(f"num_examples must be a whole number of examples, not {num_examples!r}")
        seconds = time.monotonic() - self._began
        state = None if self.kind == "evaluate" or model is None else own_state(model)
        answer = Answer(
            state=None if state is None else {name: value for name, value in state.items() if not self.is_local(name)},
            num_examples=num_examples, loss=None if loss is None else float(loss), seconds=seconds,
            metrics=scalars({name: _plain(value) for name, value in (metrics or {}).items()}, "metrics"),
            checksum=_checksum(model) if self._trainer.processes > 1 else None,
        )  # fmt: skip
        self._trainer._answer(self, answer, state or {}, local_state)
        # Not before: a reply that could not be given is an error that the client must hear of.
        self.answered = True

    def fail(self, exc: BaseException) -> None:
        """Report that the task cannot be done; the error and its traceback reach the client and the server."""
        if self.answered:
            return
        self.answered = self.failed = True
        self._trainer._channel.fail(self._record, _describe(exc), time.monotonic() - self._began)

    def should_stop(self) -> bool:
        """Tell whether nobody waits for the answer any more: the run ended, or the round's deadline passed.

        Cheap enough to be asked for every batch: it looks at most every 50 ms. In several processes each call gives
        all of them the same answer, so all must make it equally often.
        """
        if not self._stop:
            self._stop = not self._trainer._channel.is_wanted(self._record)
        return self._stop

    def _local_part(self, kept: Mapping[str, torch.Tensor]) -> StateDict:
        if not kept or not self.restore:
            return {}
        if self._base and _LOCAL_PART in self._base.files:
            saved = map_file(self._base.path(_LOCAL_PART))
        else:
            saved = self._trainer.initial_state()
        return {name: saved[name] for name in kept if name in saved}


class Trainer:
    """Takes part in a federation as the trainer of a rank.

    Parameters
    ----------
    rank
        The rank, a positive integer; the client of the same rank is its way to the server.
    model
        What answers ``initialize``: a module or state_dict (as it is on entering), or a function that returns one.
        Without it the federation needs another trainer to start from.
    exchange_dir, checkpoint_dir
        Where the hand-off takes place, and where the local state is kept (``<checkpoint_dir>/rank-<k>/``).
    state
        ``keep``: the local state goes on from round to round. ``reset``: each round starts fresh.
    client_wait_s
        Seconds to wait for a client to be there; None waits for ever.
    standalone
        Take part in no federation: `standalone_rounds` rounds of training and evaluation are asked for in this
        process, each from what the reply before gave. Uses no directory.

    Attributes
    ----------
    process, processes : int
        Which of how many processes of this trainer this is, counted from 0: 0 of 1 without a process group.
    outcome : FinishedRecord or None
        How the run ended, once the loop is over.

    Raises
    ------
    RoleTakenError
        On entering, if a live trainer of this rank uses the directory.
    PeerMissingError
        While waiting, if no client was there for ``client_wait_s``.
    """

    def __init__(
        self,
        rank: int,
        model: ModelSource | None = None,
        *,
        exchange_dir: Path | str = "exchange",
        checkpoint_dir: Path | str = "checkpoints",
        state: Literal["keep", "reset"] = "keep",
        client_wait_s: float | None = None,
        standalone: bool = False,
        standalone_rounds: int = 3,
    ) -> None:
        if state not in ("keep", "reset"):
            raise UsageError(f"state must be 'keep' or 'reset', not {state!r}")
        self.exchange = Exchange(exchange_dir, rank)
        self.state = state
        self.outcome: FinishedRecord | None = None
        self._model = model
        self._has_snapshot = isinstance(model, torch.nn.Module | Mapping)
        self._channel = _channel(self.exchange, client_wait_s, standalone_rounds if standalone else None)
        self.process, self.processes = self._channel.process, self._channel.processes
        self._stack = ExitStack()
        if standalone:
            checkpoint_dir = self._stack.enter_context(TemporaryDirectory(prefix="fedsplit-standalone-"))
        # Process 0's store is that of a single process; the others' lie in it.
        self._first_store = CheckpointStore(Path(checkpoint_dir) / f"rank-{rank}", keep=KEEP_ROUNDS)
        self._store = self._first_store
        if self.process:
            self._store = CheckpointStore(self._store.directory / f"process-{self.process}", keep=KEEP_ROUNDS)
        self._initial_path = self._store.directory / "initial.safetensors"
        self._writer = BackgroundWriter()
        self._current: Task | None = None
        self._run_id: str | None = None
        # Which round's end the process memory stands at: (run, round), (None, 0) when fresh, None when in between.
        self._memory: tuple[str | None, int] | None = (None, 0)

    def __enter__(self) -> Self:
        self._stack.enter_context(self._channel.hold())
        make_private_directory(self._store.directory, CheckpointError)
        if self._has_snapshot:
            # Training changes the model in place; a later run must start from what it was.
            write_chunks(self._initial_path, encode(own_state(self._model)))  # type: ignore[arg-type]
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if isinstance(exc, Exception) and self._current and not self._current.answered:
                self._current.fail(exc)
            self._writer.close()
        finally:
            self._stack.__exit__(kind, exc, tb)

    def __iter__(self) -> Iterator[Task]:
        while isinstance(record := self._channel.next(), TaskRecord):
            try:
                task = self._current = self._begin(record)
            except FedSplitError as exc:
                # Before the loop body could fail the task: the client must hear of this too.
                self._channel.fail(record, _describe(exc), 0.0)
                raise
            if task.kind == "initialize" and self._model is not None:
                state = self.initial_state()
                task.reply(state, num_examples=0, metrics=_describe_local(task, state))
                continue
            yield task
            if not task.answered:
                error = UsageError(f"the loop went on without task.reply() for {task.kind}, round {task.server_round}")
                task.fail(error)
                raise error
            if task.failed and self.processes > 1:
                # The other processes may be anywhere, most likely in a collective that this one never comes to.
                raise TrainingError(
                    f"{task.kind} of round {task.server_round} failed in process {self.process} of {self.processes}; "
                    "the processes are out of step and must be started again: torchrun --max-restarts does it"
                )
        self.outcome = record

    def initial_state(self) -> StateDict:
        """Return the state that the model had on entering."""
        if self._has_snapshot:
            return map_file(self._initial_path)
        return {} if self._model is None else own_state(self._model)

    def _begin(self, record: TaskRecord) -> Task:
        request = record.request
        if request.run_id != self._run_id:
            self._store.begin_run(request.run_id)
            self._run_id = request.run_id
        before = request.server_round + (request.kind == "evaluate")
        base = self._find_base(request.run_id, before)
        if base is None and self.state == "keep":
            self._check_beginning(request.server_round)
        restore = self._memory != ((request.run_id, base.server_round) if base else (None, 0))
        if request.kind == "train" or restore:
            self._memory = None
        return Task(self, record, base, restore or self.state == "reset")

    def _find_base(self, run_id: str, before: int) -> Checkpoint | None:
        """Return the round whose local state is gone on from: process 0 chooses it, each process reads its own."""
        base = self._store.newest(run_id=run_id, before=before, verify=False)
        if base and self._memory != (run_id, base.server_round):
            # What was not written by this process a round ago is checked before it is gone on from.
            base = self._store.newest(run_id=run_id, before=before)
        chosen = self._channel.share(base.server_round if base else -1)
        saved_by = self._channel.share(base.info.get("processes", 1) if base else 0)
        if chosen >= 0 and saved_by != self.processes:
            log.warning(
                "the local state of round %d was saved by %d processes, now there are %d: each takes that of process 0",
                chosen, saved_by, self.processes,
            )  # fmt: skip
        if self.process == 0:
            return base
        if chosen < 0:
            return None
        return (self._store if saved_by == self.processes else self._first_store).read(chosen)

    def _check_beginning(self, server_round: int) -> None:
        """Refuse to start afresh in a run whose earlier local states were pruned."""
        rounds = self._store.rounds()
        if rounds and self._store.read(rounds[0], verify=False).info.get("base") is not None:
            raise CheckpointError(
                f"the server asks for round {server_round}, but the local states in {self._store.directory} "
                f"begin with round {rounds[0]}; resume the server from a later round, or start with --state reset"
            )

    def _answer(self, task: Task, answer: Answer, state: StateDict, local_state: Any) -> None:
        record, server_round = task._record, task.server_round
        saved = task.kind == "train" and self._save(task, state, local_state)
        accepted = self._channel.answer(record, answer)
        if task.kind != "train":
            return
        if accepted:
            self._memory = (record.run_id, server_round)
            if saved:
                self._writer.submit(lambda: self._store.flush(server_round))
        elif saved:
            self._store.remove(server_round)

    def _save(self, task: Task, state: StateDict, local_state: Any) -> bool:
        local_part = {name: tensor for name, tensor in state.items() if task.is_local(name)}
        files: dict[str, Any] = {}
        if local_state is not None:
            files[_LOCAL_STATE] = [_dump(local_state)]
        if local_part:
            files[_LOCAL_PART] = encode(local_part)
        # Several processes save each round or none, also where only one of them has something to keep.
        if not files and not self._store.rounds() and self.processes == 1:
            return False
        # Before the result is offered: whoever sees the result can count on the state that made it.
        self._writer.wait()
        for later in self._store.rounds():
            if later > task.server_round:  # the server went back: these belong to a course that was given up
                self._store.remove(later)
        base = task._base.server_round if task._base else None
        self._store.save(
            run_id=task._record.run_id, server_round=task.server_round, files=files,
            info={"base": base, "processes": self.processes}, durable=False,
        )  # fmt: skip
        self._store.prune()
        return True


def _channel(exchange: Exchange, client_wait_s: float | None, standalone_rounds: int | None) -> Channel:
    channel: Channel
    if standalone_rounds is None:
        channel = ExchangeChannel(exchange, client_wait_s)
    else:
        from fedsplit.trainer.standalone import StandaloneChannel

        channel = StandaloneChannel(standalone_rounds)
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        from fedsplit.trainer.process_group import ProcessGroupChannel

        channel = ProcessGroupChannel(channel)
    return channel


def _describe(exc: BaseException) -> dict[str, str]:
    """Return what the client and the server are told of an error."""
    text = "".join(traceback.format_exception(exc))
    return {"type": type(exc).__name__, "message": str(exc), "traceback": text}


def _dump(local_state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(local_state, buffer)
    buffer.seek(0)
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(buffer):  # type: ignore[arg-type]
        raise UsageError(
            f"local_state holds {', '.join(sorted(map(str, unsafe)))}, which cannot be read back safely; "
            "use tensors, numbers, strings, and lists, tuples and dicts of these"
        )
    return buffer.getvalue()


def _describe_local(task: Task, state: StateDict) -> dict[str, str]:
    """Tell the server which entries it will never see, so that it can show the whole split and check its patterns."""
    local = {
        name: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for name, tensor in state.items()
        if task.is_local(name)
    }
    return {"local_entries": json.dumps(local)}


def _plain(value: Any) -> Any:
    # numpy and torch scalars are what people have at hand.
    return value.item() if hasattr(value, "item") and not isinstance(value, bool | int | float | str) else value


def _checksum(model: ModelSource | None) -> float | None:
    """Return the sum of a module's parameters, or None where it would not be the same in all processes."""
    if not isinstance(model, torch.nn.Module):
        return None
    parameters = list(model.parameters())
    if any(type(parameter.data) is not torch.Tensor for parameter in parameters):  # sharded
        return None
    return sum(parameter.detach().double().sum().item() for parameter in parameters if parameter.is_floating_point())
