"""What of a script outlives its process: `keep` gathers the usual objects, and whatever they hold becomes plain data.

docs/own-training.md shows how it is used. A checkpoint of a trainer is read without pickle. So numpy's arrays and the
generators of random numbers are written as tensors and numbers, and made again when they are read.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedsplit.errors import UsageError

if TYPE_CHECKING:
    from fedsplit.trainer.task import Task

# The only key of a dict that stands for an object; its value is the kind and what the object is made of.
_MARK = "fedsplit object"


class Kept:
    """Objects of a script under their names; made by `keep`."""

    def __init__(self, objects: Mapping[str, Any]) -> None:
        for name, each in objects.items():
            if not (_has_state(each) or isinstance(each, torch.Generator | np.random.Generator | random.Random)):
                raise UsageError(
                    f"keep({name}=…): a {type(each).__name__} has no state_dict() and load_state_dict(), and is no "
                    "generator of random numbers"
                )
        self._objects = dict(objects)
        # A run may begin again in this process: then the objects must be what they are now.
        self._initial = copy.deepcopy(self.state())
        # Where the generators have to stand when the next training begins, as far as that is known.
        self._drawn: dict[str, Any] | None = None
        # The training whose answer this has to go along with.
        self._begun: Task | None = None

    def state(self) -> dict[str, Any]:
        """Return what is kept: the state of each object, and of the global generators of Python, numpy and torch."""
        found = self._generators()
        found["objects"] |= {name: each.state_dict() for name, each in self._objects.items() if _has_state(each)}
        return found

    def state_after(self, task: Task) -> dict[str, Any]:
        """Return what is kept with the answer to a task."""
        if task.kind == "train":
            self._drawn, self._begun = self._generators(), None
        return self.state()

    def restore(self, task: Task) -> None:
        """Give the objects the state that they had at the end of the round before, if they are not in it.

        To be called for every task, before its work. Generators go back to where the last training left them: an
        evaluation may have drawn from them since, and it is not repeated when a killed script starts again.
        """
        self._drawn = self._drawn or self._generators()
        if task.kind != "train":
            # A personal model is evaluated as it was left.
            if task.restore:
                self._load(task.local_state)
                self._drawn = self._generators()
            return
        if self._begun and self._begun.answered and not self._begun.failed:
            raise UsageError(
                f"round {self._begun.server_round} was answered without what keep() gathered, so nothing could go on "
                "from it; say task.reply(model, ..., local_state=kept)"
            )
        self._begun = task
        if task.restore:
            self._load(task.local_state)
        else:
            self._set_generators(self._drawn)
        self._drawn = None

    def _load(self, saved_state: Any) -> None:
        state = self._initial if saved_state is None else saved_state
        if not (isinstance(state, dict) and {"objects", "generators"} <= state.keys()):
            raise UsageError(
                "the checkpoint has a local_state that keep() did not make; take another checkpoint directory"
            )
        if missing := self._objects.keys() ^ state["objects"].keys():
            raise UsageError(f"keep(…): the checkpoint and this script do not both have {', '.join(sorted(missing))}")
        for name, each in self._objects.items():
            if _has_state(each):
                each.load_state_dict(copy.deepcopy(state["objects"][name]))
        self._set_generators(state)

    def _generators(self) -> dict[str, Any]:
        """Return `state` without what is no generator."""
        named = {name: _generator(each) for name, each in self._objects.items() if not _has_state(each)}
        of_all: dict[str, Any] = {
            "python": random.getstate(), "numpy": np.random.get_state(legacy=False), "torch": torch.get_rng_state(),
        }  # fmt: skip
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            of_all["cuda"] = torch.cuda.get_rng_state_all()
        return {"objects": named, "generators": of_all}

    def _set_generators(self, state: Mapping[str, Any]) -> None:
        for name, each in self._objects.items():
            if not _has_state(each):
                _set_generator(each, state["objects"][name])
        of_all = state["generators"]
        random.setstate(of_all["python"])
        np.random.set_state(of_all["numpy"])
        torch.set_rng_state(of_all["torch"])
        if "cuda" in of_all and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(of_all["cuda"])


def keep(**objects: Any) -> Kept:
    """Gather what must outlive the process: optimizers, schedulers, scalers, averages of weights, generators.

    Each object has ``state_dict()`` and ``load_state_dict()``, or is a `torch.Generator`, `numpy.random.Generator` or
    `random.Random`. The global generators of Python, numpy and torch are kept without being named. Raises UsageError
    for anything else.
    """
    return Kept(objects)


def to_plain(value: Any) -> Any:
    """Return a value in the types that a checkpoint is read with; an `argparse.Namespace` becomes a dict."""
    match value:
        case np.ndarray() if value.dtype.kind in "biufc":
            return {_MARK: ["array", torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))]}
        case np.generic():
            return value.item()
        case torch.Generator() | np.random.Generator():
            return {_MARK: ["generator", to_plain(_generator(value))]}
        case argparse.Namespace():
            return to_plain(vars(value))
        case Mapping():
            return _like(value, {key: to_plain(each) for key, each in value.items()})
        case list():
            return [to_plain(each) for each in value]
        case tuple():
            return tuple(to_plain(each) for each in value)
        case _:
            return value


def from_plain(value: Any) -> Any:
    """Return what `to_plain` was given."""
    match value:
        case {"fedsplit object": ["array", tensor]}:
            return tensor.numpy()
        case {"fedsplit object": ["generator", state]}:
            state = from_plain(state)
            made: Any = torch.Generator()
            if isinstance(state, dict):
                made = np.random.Generator(getattr(np.random, state["bit_generator"])())
            _set_generator(made, state)
            return made
        case dict():
            return _like(value, {key: from_plain(each) for key, each in value.items()})
        case list():
            return [from_plain(each) for each in value]
        case tuple():
            return tuple(from_plain(each) for each in value)
        case _:
            return value


def _like(value: Mapping[Any, Any], found: dict[Any, Any]) -> dict[Any, Any]:
    # Torch's own state_dicts are of these two kinds, MultiStepLR's milestones are a Counter.
    return type(value)(found) if isinstance(value, OrderedDict | Counter) else found


def _has_state(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _generator(value: Any) -> Any:
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    return value.getstate() if isinstance(value, random.Random) else value.get_state()


def _set_generator(value: Any, state: Any) -> None:
    if isinstance(value, np.random.Generator):
        value.bit_generator.state = state
    elif isinstance(value, random.Random):
        value.setstate(state)
    else:
        value.set_state(state)
