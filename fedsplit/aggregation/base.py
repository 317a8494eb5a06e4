"""What a rule is given, and what it must be able to do.

A rule is a plain function ``rule(updates, context, **params) -> StateDict``. One that need not see all updates at once
also has an `Accumulator`, which takes them one by one, so that the server can drop each as soon as it is merged.

Rules are given only updates that passed `fedsplit.aggregation.validation.check_update`, in rank order.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from fedsplit.states.state_dict import StateDict as StateDict


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one client, `rank`, sent back in one round.

    `state_dict` has the entries of the part that the rule merges, and `extra` the tensors that the trainer sent beside
    the model; neither is to be changed. `num_examples` is how many examples the client says it trained on, at least 1;
    `metrics` is what the trainer reported, as it is. `base_round` is the round whose state it started from, None where
    that is not known, and `staleness` how many merges there were since then: above 0 only in asynchronous rounds, where
    `state_dict` is what was trained, carried over to the newest state.
    """

    rank: int
    state_dict: Mapping[str, Tensor]
    num_examples: int
    metrics: Mapping[str, float | int | str | bool] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    base_round: int | None = None
    staleness: int = 0


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
        Kept between rounds and in the checkpoints, for this part and this kind of rule. It may hold None, bool, int,
        float, str, torch.Tensor, and lists and dicts (with str keys) of these.
    extra : dict of str to Tensor
        The tensors that the trainers of this round had in `task.extra`, the same dict for the rules of all parts. What
        a rule puts there is what they have from now on. To be replaced, not changed in place.
    rank_extra : dict of int to dict of str to Tensor
        The same for single ranks: a rank also has its own, which comes before one of `extra` of the same name.
    ranks : sequence of int
        The ranks that were asked to train in this round; some may give no update.
    num_ranks : int
        How many ranks were connected when the round began; in asynchronous rounds how many ever took part.
    """

    server_round: int
    total_rounds: int
    part: str
    previous: StateDict
    generator: torch.Generator
    memory: dict[str, Any]
    extra: StateDict = field(default_factory=dict)
    rank_extra: dict[int, StateDict] = field(default_factory=dict)
    ranks: Sequence[int] = ()
    num_ranks: int = 0


def seeded_generator(seed: int, server_round: int, part: str) -> torch.Generator:
    """Return a generator that depends on all three and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{server_round}/{part}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Accumulator(Protocol):
    """The merge of one round."""

    def add(self, update: Update) -> None:
        """Take one more update; must not keep it, unless the rule's `one_pass` is False."""

    def result(self) -> StateDict:
        """Return the merged state; called once, after at least one `add`."""


RuleFunction = Callable[..., StateDict]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule with its parameters bound. A class of the user's makes a rule if its objects have these attributes."""

    name: str  # as the user wrote it, for messages
    accumulator: Callable[[AggregationContext], Accumulator]  # begins the merge of a round
    one_pass: bool = False  # whether that keeps no tensor of an update, so that the server may drop the payload
    min_updates: int = 1  # with fewer, the rule refuses
    reads_extra: bool = False  # whether extra tensors are of use to it; a class of the user's need not say so

    @classmethod
    def of_function(cls, name: str, function: RuleFunction, *, min_updates: int = 1, reads_extra: bool = False) -> Self:
        """Make a rule of ``function(updates, context)``, which sees all updates at once."""
        begin = partial(_Collector, function)
        return cls(name=name, accumulator=begin, min_updates=min_updates, reads_extra=reads_extra)


class _Collector:
    """Keeps all updates, for a function that must see them at once."""

    def __init__(self, function: RuleFunction, context: AggregationContext) -> None:
        updates: list[Update] = []
        self.add = updates.append
        self.result = partial(function, updates, context)
