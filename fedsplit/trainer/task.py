"""One request of the server, as a training loop sees it: what came, and the ways to answer it.

`fedsplit.trainer.trainer` makes one for each record that it finds.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch

from fedsplit.errors import OutOfRangeError, TaskOverError, UsageError
from fedsplit.exchange.records import Scalar, TaskRecord, scalars
from fedsplit.states.extra import join, separate
from fedsplit.states.local_keys import is_local
from fedsplit.states.state_dict import ModelSource, StateDict, describe_state, load_into, own_state
from fedsplit.states.ties import check_shared
from fedsplit.trainer.channel import Answer
from fedsplit.trainer.local_state import Base
from fedsplit.trainer.remote import Given, remote

if TYPE_CHECKING:
    from fedsplit.trainer.trainer import Trainer

log = logging.getLogger("fedsplit")

# How torch begins when names do not fit, and what a script may have wanted; Python shows it below torch's own text.
_NOT_LOADED = "Error(s) in loading state_dict for "
_LOAD_INTO = (
    "fedsplit: task.load_into(model) loads what was received, also into a compiled or wrapped model "
    "(_orig_mod., module.), and leaves the entries that stay local as they are"
)

# Characters kept at each end of an error's text. Three such texts fit into a record, whatever their characters.
_HALF = 50_000


class Task:
    """One request of the server, as the training loop sees it.

    Attributes
    ----------
    kind : {"train", "evaluate", "initialize"}
        ``initialize`` is seen only by a trainer that was given no model.
    run_id : str
        The run's name, the same after any restart.
    server_round, total_rounds : int
        The round, counted from 1, and how many there will be.
    config : Mapping[str, bool | int | float | str]
        What the server's ``--train-config`` gave.
    refused : str or None
        Why the server did not count this rank's last answer; None if it did, and for the first task.
    restore : bool
        Whether `local_state` has to be read: this process is not itself at the end of the round before.
    answered, failed : bool
        Whether there was a reply, and whether it was an error.
    numbers : Mapping[str, bool | int | float | str]
        What came with the last `remote`: the loss, and the metrics that the other half of the model found.
    """

    def __init__(self, trainer: Trainer, record: TaskRecord, base: Base) -> None:
        self.kind, self.run_id = record.kind, record.run_id
        self.server_round = record.server_round
        self.total_rounds = record.total_rounds
        self.config: Mapping[str, Scalar] = record.config
        self.refused = record.refused
        self.restore = base.restore
        self.answered = self.failed = False
        self.numbers: Mapping[str, Scalar] = {}
        self._trainer, self._record, self._base = trainer, record, base
        self._began = self._resumed = time.monotonic()
        self._stop = False

    @property
    def state_dict(self) -> StateDict:
        """The state that was received: tensors over a mapped file. Writing to them changes nothing elsewhere."""
        return self._received[0]

    @property
    def extra(self) -> StateDict:
        """The tensors that came beside the state, from the server's rules; none before a rule has put any there."""
        return self._received[1]

    @cached_property
    def _received(self) -> tuple[StateDict, StateDict]:
        return separate(self._trainer._channel.read_state(self._record))

    @property
    def local_state(self) -> Any:
        """What was kept with the last round that this trainer took part in, or None at the start."""
        return None if self._trainer.state == "reset" else self._base.load_local_state()

    def is_local(self, name: str) -> bool:
        """Tell whether an entry of the state_dict stays at home under the server's rules.

        Raises UsageError if a rule chooses by the type of module, and no module was given so far.
        """
        return is_local(name, self._record.split, self._trainer._types.is_of_type)

    def _stays(self, state: StateDict) -> StateDict:
        """Return the entries that stay at home; raises UsageError if one name of a tied weight does and another not."""
        found = {name: tensor for name, tensor in state.items() if self.is_local(name)}
        if found:
            check_shared(state, self.is_local)
        return found

    def load_into(self, model: torch.nn.Module) -> None:
        """Copy the received state into a model, by name; entries that the rules keep local stay as they are.

        Raises StateMismatchError if keys, shapes or dtypes differ; the model has not changed then. Raises UsageError if
        the rules keep one name of a tied weight local and not the other.
        """
        self._trainer._types.see(model, self._record.split)
        own = own_state(model)
        kept = self._stays(own)
        if kept and self.restore:
            saved = self._base.load_local_part()
            if saved is None:
                saved = own_state(self._trainer._local.initial())
            kept |= {name: saved[name] for name in kept if name in saved}
        where = f"what the server sent for {self.kind} of round {self.server_round}"
        load_into(model, {**self.state_dict, **kept}, where=where)

    def reply(
        self,
        model: ModelSource | None = None,
        *,
        num_examples: float | torch.Tensor,
        loss: float | torch.Tensor | None = None,
        metrics: Mapping[str, Scalar] | None = None,
        local_state: Any = None,
        extra: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Answer the task.

        Parameters
        ----------
        model
            The module or state_dict after training; none for ``evaluate``.
        num_examples
            How many examples this answer speaks for, a whole number: its weight in the merge.
        loss
            Mean loss over them; needed for ``evaluate``.
        metrics
            Further numbers for the server's history. In several processes each gives those of its own examples, as with
            `loss`; the answer has the weighted means, and the sum of the examples.
        local_state
            What must outlive the process (optimizer, scheduler, generators): what `fedsplit.keep` made, or tensors,
            arrays, numbers, strings, generators of torch and numpy, and lists, tuples and dicts of these. It comes back
            as `local_state`, also after a kill.
        extra
            Tensors beside the model for the server's rules, by name, with the answer to ``train``. No rule merges them
            unless it is written for them. In several processes those of process 0 are sent.
        """
        if self.answered:
            raise UsageError(f"{self.kind} of round {self.server_round} was answered already")
        if self.kind == "evaluate" and loss is None:
            raise UsageError("an evaluation is answered with task.reply(loss=…, num_examples=…)")
        if self.kind != "evaluate" and model is None:
            raise UsageError(f"{self.kind} is answered with task.reply(model, num_examples=…)")
        if extra and self.kind != "train":
            raise UsageError(f"extra tensors go with the answer to train, not with that to {self.kind}")
        examples = _plain(num_examples)
        if isinstance(examples, bool) or not isinstance(examples, int | float) or not 0 <= examples == examples // 1:
            raise UsageError(f"num_examples must be a whole number of examples, not {num_examples!r}")
        seconds = time.monotonic() - self._began
        state = None if self.kind == "evaluate" or model is None else own_state(model)
        if state is not None:
            self._trainer._types.see(model, self._record.split)
        local_part = self._stays(state or {})
        sent = {name: tensor for name, tensor in (state or {}).items() if name not in local_part}
        status: Literal["ok", "step"] = "ok"
        if self.kind == "train" and self._trainer.secure_only:
            self._trainer._secure.check_nothing_is_open(sent, self._record, self._trainer._types.is_of_type)
        if self.kind == "train" and self._record.secure:
            try:
                sent, status = self._begin_secure_sum(sent, extra, int(examples)), "step"
            except OutOfRangeError as exc:
                # No mistake of the script's: it goes on, and hears of it with the next task.
                log.warning("%s: this update does not count: %s", self._trainer.exchange.who, exc)
                self.fail(exc)
                return
        answer = Answer(
            state=None if state is None else join(sent, extra or {}), status=status,
            local_entries=describe_state(local_part) if self.kind == "initialize" else {},
            num_examples=int(examples), loss=None if loss is None else float(loss), seconds=seconds,
            metrics=scalars({name: _plain(value) for name, value in (metrics or {}).items()}, "metrics"),
            checksum=_checksum(model) if self._trainer.processes > 1 else None,
        )  # fmt: skip
        self._trainer._answer(self, answer, local_part, local_state)
        # Not before: if the reply cannot be given, the client must hear of that error.
        self.answered = True

    def _begin_secure_sum(self, sent: StateDict, extra: object, num_examples: int) -> StateDict:
        """Keep an update for the stages of its sum, and return what is sent now: keys."""
        if extra:
            raise UsageError(
                "extra tensors would reach the server openly, and with them the update that secure(…) hides"
            )
        if self._trainer.processes > 1:
            raise UsageError(
                "several processes cannot mask an update yet: let the client do it, client_main.py --mask-here"
            )
        is_of_type = self._trainer._types.is_of_type
        return self._trainer._secure.begin(self._record, sent, self.state_dict, num_examples, is_of_type)

    def remote(
        self, activations: torch.Tensor, targets: torch.Tensor | None = None, *, generator: bool = False,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Let the other half of the model go on from here: returns the loss, or without `targets` the half's output.

        ``backward()`` on what comes of it brings the gradient of the activations, as if the model were whole. Only
        where the server was started with ``--split-learning``. With `generator` both halves draw from one stream of
        random numbers, as the whole model would: for dropout. With a `dtype` (float16, bfloat16, int8) activations and
        gradients are rounded to it at the cut. Raises TaskOverError if the server has given the task up, or begins it
        anew: go on with the next task then.
        """
        return remote(self, activations, targets, generator=generator, dtype=dtype)

    def hand_over(
        self, state: StateDict | None = None, numbers: Mapping[str, Scalar] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Given:  # fmt: skip
        """Give tensors and numbers to the other half of the model, and wait for what it gives; raises TaskOverError.

        `meanwhile` is called when they are given, and before it is waited.
        """
        channel, record = self._trainer._channel, self._record
        # Steps of other tasks are an update in parts, and the stages of a secure sum.
        is_whole = bool(record.wire or record.secure)
        if record.step is None or is_whole or channel.processes > 1:
            raise UsageError(
                "there is no other half of the model: the server was started without --split-learning"
                if record.step is None or is_whole
                else "in several processes a model cannot be cut yet: start one without torchrun"
            )
        # Its file may go once the other side has moved on: what is mapped stays.
        _ = self.state_dict
        now = time.monotonic()
        answer = Answer(
            state=state or None, num_examples=0, metrics=scalars(numbers or {}, "numbers"), seconds=now - self._resumed,
            status="step",
        )  # fmt: skip
        channel.answer(record, answer)
        if meanwhile:
            meanwhile()
        while True:
            found = channel.next()
            if isinstance(found, TaskRecord) and found.step is not None and _is_same(found, record):
                if found.step == record.step + 1:
                    break
                if (found.step, found.digest) == (record.step, record.digest):
                    # The answer was lost on its way.
                    channel.answer(found, answer)
                    continue
            self._trainer._found = found
            self.answered = True
            raise TaskOverError(f"{self.kind} of round {self.server_round} was given up, or is begun anew")
        self._record, self._resumed = found, time.monotonic()
        return Given(channel.read_state(found), found.config)

    def fail(self, exc: BaseException) -> None:
        """Report that the task cannot be done; the error and its traceback reach the client and the server."""
        if self.answered:
            return
        self.answered = self.failed = True
        if isinstance(exc, RuntimeError) and str(exc).startswith(_NOT_LOADED):
            exc.add_note(_LOAD_INTO)
        self._trainer._channel.fail(self._record, describe_error(exc), time.monotonic() - self._began)

    def should_stop(self) -> bool:
        """Tell whether nobody waits for the answer any more: the run ended, or the round's deadline passed.

        Cheap enough to be asked for every batch: it looks at most every 50 ms. In several processes each call gives
        all of them the same answer, so all must make it equally often.
        """
        if not self._stop:
            self._stop = not self._trainer._channel.is_wanted(self._record)
        return self._stop


def describe_error(exc: BaseException) -> dict[str, str]:
    """Return what the client and the server are told of an error."""
    texts = {"message": str(exc), "traceback": "".join(traceback.format_exception(exc))}
    for name, text in texts.items():
        if (left_out := len(text) - 2 * _HALF) > 0:
            texts[name] = f"{text[:_HALF]}\n… {left_out:,} characters …\n{text[-_HALF:]}"
    return {"type": type(exc).__name__, **texts}


def _is_same(record: TaskRecord, other: TaskRecord) -> bool:
    """Tell whether two records are of one task."""
    return all(getattr(record, name) == getattr(other, name) for name in ("run_id", "kind", "server_round"))


def _plain(value: Any) -> Any:
    # Scripts often have numpy or torch scalars.
    return value.item() if hasattr(value, "item") and not isinstance(value, bool | int | float | str) else value


def _checksum(model: ModelSource | None) -> float | None:
    """Return the sum of a module's parameters, or None where it would not be the same in all processes."""
    parameters = list(model.parameters()) if isinstance(model, torch.nn.Module) else None
    if parameters is None or any(type(parameter.data) is not torch.Tensor for parameter in parameters):  # sharded
        return None
    return sum(parameter.detach().double().sum().item() for parameter in parameters if parameter.is_floating_point())
