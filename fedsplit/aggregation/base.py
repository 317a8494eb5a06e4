"""What a rule of aggregation is: what it is given, what it gives back, and the registry of the built-in ones.

A rule is a plain function ``rule(updates, context, **params) -> StateDict``. A rule that need not see all
updates at once also has an `Accumulator`, which takes them one by one, so that the server can drop each as
soon as it is merged; its function form is `merge` over that accumulator, so there is one implementation of
each rule.

Not promised: a rule is only ever given updates that passed `fedsplit.aggregation.validation.check_update`, in
rank order; a rule called directly with anything else does what its arithmetic does.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsplit.errors import AggregationError
from fedsplit.states.state_dict import StateDict as StateDict

Metric = float | int | str | bool


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one client sent back in one round.

    Parameters
    ----------
    rank : int
        The client.
    state_dict : mapping of str to Tensor
        The entries of the part (for a rule) or of everything the client shares (for the server). Not to be
        changed.
    num_examples : int
        How many examples the client says it trained on, at least 1.
    metrics : mapping
        What the trainer reported, as it is.
    """

    rank: int
    state_dict: Mapping[str, Tensor]
    num_examples: int
    metrics: Mapping[str, Metric] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AggregationContext:
    """Where a rule is called: the round, the part, and what it may remember.

    Parameters
    ----------
    server_round, total_rounds : int
        Counting from 1.
    part : str
        The pattern of the part, ``"*"`` for the rule without one.
    previous : dict of str to Tensor
        The global state of this part that the clients started the round from. Not to be changed.
    generator : torch.Generator
        Seeded from the run's seed, the round and the part: the same in a resumed run.
    memory : dict
        Kept between rounds and in the checkpoints. It may hold None, bool, int, float, str, torch.Tensor, and
        lists and str-keyed dicts of these.
    """

    server_round: int
    total_rounds: int
    part: str
    previous: StateDict
    generator: torch.Generator
    memory: dict[str, Any]


def seeded_generator(seed: int, server_round: int, part: str) -> torch.Generator:
    """A generator that depends on all three and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{server_round}/{part}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Accumulator(Protocol):
    """A merge under way."""

    def add(self, update: Update) -> None:
        """Take one more update; must not keep it, unless the rule's `one_pass` is False."""

    def result(self) -> StateDict:
        """The merged state; called once, after at least one `add`."""


RuleFunction = Callable[..., StateDict]
AccumulatorFactory = Callable[..., Accumulator]


class Rule(Protocol):
    """A rule with its parameters bound, ready to be used every round."""

    @property
    def name(self) -> str:
        """The rule as the user wrote it, for messages."""

    @property
    def one_pass(self) -> bool:
        """Whether its accumulator lets go of each update, so that the server may drop the payload."""

    @property
    def min_updates(self) -> int:
        """With fewer updates than this, the rule refuses."""

    def aggregate(self, updates: Sequence[Update], context: AggregationContext) -> StateDict:
        """Merge all updates at once."""

    def accumulator(self, context: AggregationContext) -> Accumulator:
        """Begin a merge of updates that come one by one."""


def merge(accumulator: Accumulator, updates: Sequence[Update]) -> StateDict:
    """Feed all updates to an accumulator: the batch form of a one-pass rule."""
    for update in updates:
        accumulator.add(update)
    return accumulator.result()


class Collector:
    """The accumulator of a rule that must see all updates at once: it keeps them."""

    def __init__(self, function: RuleFunction, context: AggregationContext) -> None:
        self._function = function
        self._context = context
        self._updates: list[Update] = []

    def add(self, update: Update) -> None:
        """Keep the update."""
        self._updates.append(update)

    def result(self) -> StateDict:
        """Call the rule."""
        return self._function(self._updates, self._context)


@dataclass(frozen=True, kw_only=True)
class FunctionRule:
    """A `Rule` from a function, and from its accumulator where it has one; parameters already bound."""

    name: str
    function: RuleFunction
    factory: AccumulatorFactory | None = None
    min_updates: int = 1

    @property
    def one_pass(self) -> bool:
        """Whether it has an accumulator of its own."""
        return self.factory is not None

    def aggregate(self, updates: Sequence[Update], context: AggregationContext) -> StateDict:
        """Merge all updates at once."""
        return self.function(updates, context)

    def accumulator(self, context: AggregationContext) -> Accumulator:
        """Begin a merge of updates that come one by one."""
        return self.factory(context) if self.factory is not None else Collector(self.function, context)


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A built-in rule before its parameters are bound."""

    name: str
    function: RuleFunction
    accumulator: AccumulatorFactory | None
    min_updates: Callable[..., int]

    def bind(self, text: str, **params: Any) -> FunctionRule:
        """The rule with these parameters; `text` is how messages call it."""
        factory = functools.partial(self.accumulator, **params) if self.accumulator is not None else None
        function = functools.partial(self.function, **params)
        return FunctionRule(name=text, function=function, factory=factory, min_updates=self.min_updates(**params))


REGISTRY: dict[str, Registered] = {}


def _one_update(**_: Any) -> int:
    return 1


def rule(
    name: str, *, accumulator: AccumulatorFactory | None = None, min_updates: Callable[..., int] = _one_update
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a function as the built-in rule `name`.

    Parameters
    ----------
    name : str
        As in `--aggregate`; its parameters are listed in `fedsplit.aggregation.spec.BUILTIN_RULES`.
    accumulator : callable, optional
        ``accumulator(context, **params) -> Accumulator`` for a rule that needs one pass.
    min_updates : callable, optional
        ``min_updates(**params) -> int``: with fewer updates the rule refuses.
    """

    def register(function: RuleFunction) -> RuleFunction:
        REGISTRY[name] = Registered(name=name, function=function, accumulator=accumulator, min_updates=min_updates)
        return function

    return register


def check_memory(memory: object, where: str = "memory") -> None:
    """Refuse what a checkpoint cannot hold.

    Raises
    ------
    AggregationError
        Naming the place inside the memory and the type found there.
    """
    if isinstance(memory, dict):
        for key, value in memory.items():
            if not isinstance(key, str):
                raise AggregationError(f"{where} has the key {key!r}: expected str keys, found {type(key).__name__}")
            check_memory(value, f"{where}[{key!r}]")
    elif isinstance(memory, list):
        for index, value in enumerate(memory):
            check_memory(value, f"{where}[{index}]")
    elif not isinstance(memory, None | bool | int | float | str | Tensor):
        raise AggregationError(
            f"{where} holds a {type(memory).__name__}, which no checkpoint can hold: expected None, bool, "
            "int, float, str, list, dict or Tensor"
        )
