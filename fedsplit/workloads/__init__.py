"""What a workload is, and workloads by name: the built-in ones, and anybody's ``package.module:Factory``.

A workload owns the model, the data and the optimizer of one rank. A factory makes it: a function from a
`WorkloadContext` to an object with `model`, `train(task)` and `evaluate(task)`, where the task is a `fedsplit.Task`.
Importing this package loads neither torch nor a data set library.

Not promised: that `train` is called once for each round. A trainer that was restarted does its unanswered task again.
"""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from fedsplit.errors import UsageError, WorkloadError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class WorkloadContext:
    """What a factory is called with.

    Of the `num_partitions` parts of the data, the one of this `rank`, counted from 1, is this trainer's. `seed` is that
    of the initial model and the division; both are the same for all ranks. The model lives on `device`. Without a
    `data_dir` the workload looks for data where it likes. `options` come from ``--workload-option key=value``, and
    `OptionReader` reads them.
    """

    rank: int
    num_partitions: int = 2
    seed: int = 0
    device: torch.device | str = "cpu"
    data_dir: Path | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("num_partitions", 1), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise UsageError(f"{name}: expected a whole number of at least {least}, found {value}")
        if self.rank > self.num_partitions:
            raise UsageError(
                f"rank {self.rank} has no data: it is divided into {self.num_partitions} partitions, for the ranks 1 "
                f"to {self.num_partitions}; start every trainer with --num-partitions {self.rank} or more"
            )


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns: how many different examples this rank trained on, and metrics like ``{"loss": 0.31}``.

    The number is the weight of the update in an average; with 0 it is left out. `extra` are tensors beside the model,
    for the server's rules.
    """

    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluateResult:
    """What `evaluate` returns: means over this rank's examples, and how many these are, which is the means' weight."""

    loss: float
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Workload(Protocol):
    """What a factory returns. The global state is in `model` before `train` or `evaluate` is called."""

    model: torch.nn.Module

    def train(self, task: Any, /) -> TrainResult:
        """Train `model` in place."""

    def evaluate(self, task: Any, /) -> EvaluateResult:
        """Evaluate `model` without changing it."""


@runtime_checkable
class StatefulWorkload(Protocol):
    """The optional half: what must outlive the process, kept in the trainer's checkpoint."""

    def local_state(self) -> dict[str, Any]:
        """Return a snapshot that later training does not change: dicts, lists, numbers, str and tensors."""

    def load_local_state(self, state: dict[str, Any], /) -> None:
        """Go on from a snapshot."""


class OptionReader:
    """Reads ``key=value`` options by name and type; raises UsageError for what it cannot read.

    Values are str when they come from a command line, and bool, int, float or str from a server. `source` is the flag
    that messages name.

    Examples
    --------
    >>> reader = OptionReader({"epochs": "2"})
    >>> reader.integer("epochs", default=1), reader.number("lr", default=0.1)
    (2, 0.1)
    >>> reader.finish()
    """

    def __init__(self, options: Mapping[str, object], *, source: str = "--workload-option") -> None:
        self._options, self._source = options, source
        self._known: set[str] = set()

    def integer(self, name: str, *, default: int) -> int:
        """Read a whole number of at least 1."""
        if (number := self._number(name)) is None:
            return default
        if not (number.is_integer() and number >= 1):
            raise self._error(name, "a whole number of at least 1")
        return int(number)

    def number(self, name: str, *, default: float, above: float | None = None, below: float = math.inf) -> float:
        """Read a finite number of at least 0, or greater than `above`, and less than `below`."""
        if (number := self._number(name)) is None:
            return default
        if not 0 <= number < below or (above is not None and number <= above):
            lower = "at least 0" if above is None else f"more than {above:g}"
            upper = "" if math.isinf(below) else f" and less than {below:g}"
            raise self._error(name, f"a number of {lower}{upper}")
        return number

    def choice(self, name: str, *, default: str, choices: Sequence[str]) -> str:
        """Read one of a few words."""
        self._known.add(name)
        if self._options.get(name, default) not in choices:
            raise self._error(name, f"one of {', '.join(choices)}")
        return str(self._options.get(name, default))

    def finish(self) -> None:
        """Refuse options that were given and never read."""
        if unknown := sorted(set(self._options) - self._known):
            known = ", ".join(sorted(self._known)) or "none"
            raise UsageError(f"{self._source}: this workload has no option {', '.join(unknown)}; it knows: {known}")

    def _number(self, name: str) -> float | None:
        """Return what an option is or spells, NaN for no number (a bool is none here), None without the option."""
        self._known.add(name)
        if (value := self._options.get(name)) is None:
            return None
        try:
            return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
        except (ValueError, OverflowError):
            return math.nan

    def _error(self, name: str, expected: str) -> UsageError:
        return UsageError(f"{self._source} {name}: expected {expected}, found {self._options[name]!r}")


Factory = Callable[[WorkloadContext], Workload]

BUILT_IN = {
    "digits": "fedsplit.workloads.digits:digits",
    "cifar10": "fedsplit.workloads.vision:cifar10",
    "mnist": "fedsplit.workloads.vision:mnist",
    "fashion-mnist": "fedsplit.workloads.vision:fashion_mnist",
}


def load_workload(name: str) -> Factory:
    """Find the factory of a built-in name or of ``package.module:Factory``; raises WorkloadError if there is none.

    An exception in the module itself comes through as it is, with the traceback that its author needs.
    """
    module_name, colon, attribute = BUILT_IN.get(name, name).partition(":")
    if not colon or not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise WorkloadError(
            f"unknown workload {name!r}: expected one of {', '.join(BUILT_IN)}, or MODULE:FACTORY such as "
            "package.module:Factory (dots, no slashes, no .py)"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        # A module that the user's module imports may be missing as well: that traceback is the user's to see.
        if exc.name is None or not f"{module_name}.".startswith(f"{exc.name}."):
            raise
        raise WorkloadError(
            f"workload {name!r}: there is no module {exc.name!r}; is it installed, or in the directory that "
            "the program was started from?"
        ) from exc
    try:
        factory: Factory = operator.attrgetter(attribute)(module)
    except AttributeError as exc:
        where = getattr(module, "__file__", None)
        raise WorkloadError(f"workload {name!r}: {module_name} ({where}) has no {attribute!r}") from exc
    if callable(factory):
        return factory
    raise WorkloadError(f"workload {name!r}: expected a function or class to call, found a {type(factory).__name__}")


def create_workload(name: str, context: WorkloadContext) -> Workload:
    """Make a workload; raises WorkloadError naming all that the object lacks which its factory returned."""
    workload = load_workload(name)(context)
    # Late: what has made a workload has loaded torch already, what only imports this package has not.
    import torch

    model = getattr(workload, "model", None)
    lacking = [] if isinstance(model, torch.nn.Module) else [f"model (a torch.nn.Module; found {type(model).__name__})"]
    required, local = ["train(task)", "evaluate(task)"], ["local_state()", "load_local_state(state)"]
    missing = [each for each in required + local if not callable(getattr(workload, each.partition("(")[0], None))]
    # One half of the local state would lose it, or never find any, without a word; without both there is none.
    if lacking := lacking + [each for each in missing if each in required or missing[-2:] != local]:
        raise WorkloadError(
            f"workload {name!r}: its factory returned a {type(workload).__name__} that lacks "
            f"{', '.join(lacking)}; a workload has model, train(task) and evaluate(task)"
        )
    return workload
