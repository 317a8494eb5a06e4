"""The trainer of the upper part, beside the server: activations come in, their gradients go out.

One upper part serves all ranks (``sfl-v2``, ``sequential``), or each rank has a copy of its own for the length of a
round (``sfl-v1``): every step names its ``owner``, 0 for all ranks. Each owner has an optimizer, which lives on from
round to round and is kept in the trainer's checkpoint.
"""

from __future__ import annotations

import copy
import logging
import traceback
from collections.abc import Iterable

import torch
from torch.nn.modules.batchnorm import _NormBase

from fedsplit.exchange.records import Scalar
from fedsplit.split_learning.beyond import END
from fedsplit.split_learning.cut import Parts
from fedsplit.split_learning.workload import SplitWorkload, measured
from fedsplit.states.local_keys import named
from fedsplit.states.state_dict import StateDict, own_state
from fedsplit.trainer.progress import Progress
from fedsplit.trainer.remote import Given, narrow, pack, unpack, widen
from fedsplit.trainer.task import Task
from fedsplit.trainer.trainer import Trainer
from fedsplit.workloads.runner import run_tasks

log = logging.getLogger("fedsplit")

# What a step may want of the upper part; `END` ends a task.
WANTED = ("loss", "forward", "backward")
# Under this name is what went wrong in a step.
ERROR = "error"
_MOST_ERROR = 1_000
Answer = tuple[StateDict, dict[str, Scalar]]


def run_upper(trainer: Trainer, workload: SplitWorkload, parts: Parts, progress: Progress) -> None:
    """Answer every task of a run with the upper part; see `run_tasks`."""
    run_tasks(trainer, progress, UpperPart(workload, parts).answer)


class UpperPart:
    """Answers tasks with the upper part, which is cut off from the model in `parts`."""

    def __init__(self, workload: SplitWorkload, parts: Parts) -> None:
        self._workload = workload
        # What the state is loaded into, and what evaluates it; each owner trains a copy.
        self._model = parts.beyond()
        self._owners: dict[int, _Owner] = {}

    def answer(self, task: Task) -> None:
        """Do the steps of a task until the server ends it, and reply with each owner's state."""
        task.load_into(self._model)
        training = task.kind == "train"
        if training and task.restore:
            # What the optimizers were at the end of the round before.
            self._owners.clear()
            for key, each in (task.local_state or {}).items():
                self._owner(int(key)).optimizer.load_state_dict(each)
        taken: dict[int, _Owner] = {}
        given, steps = task.hand_over(), 0

        def settle() -> None:
            # The gradient is on its way to the rank by now, and need not wait for the optimizer.
            for owner in taken.values():
                owner.settle()

        while given.numbers["what"] != END:
            number = int(given.numbers["owner"])
            if training and number not in taken:
                taken[number] = self._owner(number)
                taken[number].begin(self._model)
            try:
                answer = taken[number].window(given) if training else self._evaluate(given)
            except Exception as exc:  # noqa: BLE001  (what one rank sent must not cost the others their round)
                text = "".join(traceback.format_exception(exc)).rstrip()
                log.warning("a step of round %d failed; its rank is told\n%s", task.server_round, text)
                answer = {}, {ERROR: f"{type(exc).__name__}: {exc}"[:_MOST_ERROR]}
            steps += int(given.numbers.get("window", 1))
            given = task.hand_over(*answer, settle)
        if not training:
            task.reply(loss=0.0, num_examples=0)
            return
        state = {f"{number}/{name}": each for number, owner in taken.items() for name, each in owner.state().items()}
        kept = {str(number): owner.optimizer.state_dict() for number, owner in self._owners.items()}
        log.info("round %d: trained, %d steps", task.server_round, steps)
        task.reply(state, num_examples=0, metrics={"steps": steps}, local_state=copy.deepcopy(kept))

    def _owner(self, number: int) -> _Owner:
        if number not in self._owners:
            self._owners[number] = _Owner(self._workload, copy.deepcopy(self._model))
        return self._owners[number]

    @torch.no_grad()
    def _evaluate(self, given: Given) -> Answer:
        self._model.eval()
        like = next(self._model.parameters())
        output = self._model["upper"](_received("activations", given, like))  # type: ignore[index]
        if given.numbers["what"] == "forward":
            return narrow("output", output, _narrow_dtype(given, like)), {}
        targets = _needed("targets", given).to(like.device)
        return {}, {"loss": self._workload.loss(output, targets).item(), **measured(self._workload, output, targets)}


class _Owner:
    """An upper part in training: a copy of it, and its optimizer.

    A step with numbers that are not finite is not done, and what a failed step did to running means is undone: others
    may go on from here.
    """

    def __init__(self, workload: SplitWorkload, model: torch.nn.Module) -> None:
        self._workload, self._model = workload, model
        self.optimizer = workload.optimizer(model)
        self._running = [
            buffer for module in model.modules() if isinstance(module, _NormBase)
            for buffer in module.buffers(recurse=False)
        ]  # fmt: skip
        # Between the two halves of a step of a U-shaped model.
        self._waiting: tuple[torch.Tensor, torch.Tensor, torch.dtype | None] | None = None
        # Whether there are gradients that the optimizer has not seen yet.
        self._is_due = False

    def begin(self, model: torch.nn.Module) -> None:
        """Start a round from a state."""
        self._model.load_state_dict(model.state_dict())
        self._model.train()
        self._waiting, self._is_due = None, False

    def settle(self) -> None:
        """Let the optimizer do the last step, if it has not."""
        is_due, self._is_due = self._is_due, False
        if is_due:
            self.optimizer.step()

    def state(self) -> StateDict:
        """Return the state that it has come to."""
        self.settle()
        return own_state(self._model)

    def window(self, given: Given) -> Answer:
        """Do a step with each batch that a rank gave at once, in their order."""
        count = int(given.numbers.get("window", 1))
        tensors, numbers = list[StateDict](), list[dict[str, Scalar]]()
        generator: StateDict = {}
        for batch in unpack(given.tensors, count):
            found, said = self.step(Given({**batch, **generator}, given.numbers))
            # One stream of random numbers goes through all of them, and back to the rank.
            generator = {"generator": found.pop("generator")} if "generator" in found else {}
            tensors.append(found)
            numbers.append(said)
        return {**pack(tensors), **generator}, pack(numbers)

    def step(self, given: Given) -> Answer:
        """Do a step, or half a step of a U-shaped model: returns tensors and numbers for the rank."""
        self.settle()
        before = [buffer.clone() for buffer in self._running]
        try:
            return self._backward(given) if given.numbers["what"] == "backward" else self._forward(given)
        except Exception:  # whatever a workload raises: it is raised again once the running means are as before
            for buffer, kept in zip(self._running, before, strict=True):
                buffer.copy_(kept)
            raise

    def _forward(self, given: Given) -> Answer:
        tensors, like = given.tensors, next(self._model.parameters())
        activations = _received("activations", given, like).requires_grad_()
        dtype = _narrow_dtype(given, like)
        # The generator is the rank's: what is drawn here is what the whole model would draw.
        if (state := tensors.get("generator")) is not None:
            torch.set_rng_state(state.clone())
        # A copy: a module that works in place may not change the tensor whose gradient is wanted.
        output = self._model["upper"](activations.clone())  # type: ignore[index]
        generator = {} if state is None else {"generator": torch.get_rng_state()}
        if given.numbers["what"] == "forward":
            _check_finite("the output", [output.detach(), *self._running])
            self._waiting = (activations, output, dtype)
            return {**narrow("output", output, dtype), **generator}, {}
        targets = _needed("targets", given).to(like.device)
        loss = self._workload.loss(output, targets)
        numbers: dict[str, Scalar] = {"loss": loss.item(), **measured(self._workload, output.detach(), targets)}
        return {**narrow("gradient", self._train(activations, loss, None), dtype), **generator}, numbers

    def _backward(self, given: Given) -> Answer:
        if self._waiting is None:
            raise ValueError("a gradient came back for no activations")
        (activations, output, dtype), self._waiting = self._waiting, None
        return narrow("gradient", self._train(activations, output, _received("gradient", given, output)), dtype), {}

    def _train(self, activations: torch.Tensor, end: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
        self.optimizer.zero_grad()
        end.backward(gradient)  # type: ignore[no-untyped-call]
        assert activations.grad is not None
        gradients = [each.grad for each in self._model.parameters() if each.grad is not None]
        _check_finite("the loss or its gradient", [end.detach(), activations.grad, *gradients, *self._running])
        self._is_due = True
        return activations.grad


def _needed(name: str, given: Given) -> torch.Tensor:
    if name not in given.tensors:
        raise ValueError(f"it came without {name}, only with {named(given.tensors)}")
    return given.tensors[name]


def _received(name: str, given: Given, like: torch.Tensor) -> torch.Tensor:
    """Return what a rank gave, in the dtype and on the device of another tensor."""
    _needed(name, given)
    found = widen(name, given.tensors, like)
    _check_finite(f"the {name}", [found])
    return found


def _check_finite(what: str, tensors: Iterable[torch.Tensor]) -> None:
    """Raise ValueError if there is a NaN or infinity in floating point tensors."""
    dense = [each for each in tensors if each.is_floating_point() and each.layout == torch.strided and each.numel()]
    # A sum with a NaN or infinity in it is never finite: one pass, and one number to look at.
    sums = [each.sum().to(dense[0].device, torch.float32) for each in dense]
    # The sum of finite numbers may overflow.
    if dense and not torch.stack(sums).sum().isfinite() and not all(each.isfinite().all() for each in dense):
        raise ValueError(f"NaN or infinity in {what} at the cut")


def _narrow_dtype(given: Given, like: torch.Tensor) -> torch.dtype | None:
    """Return the dtype that a rank rounds to at the cut, None if it does not: it is answered in the same."""
    dtype = given.tensors["activations"].dtype
    return dtype if dtype != like.dtype else None
