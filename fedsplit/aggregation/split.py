"""The split: which part of the state_dict is merged by which rule, and the merging of one round.

The server resolves the split once, against the first global state, and then for each round::

    merger = split.start_round(server_round=3, total_rounds=10, previous=state, seed=0, memory=memory)
    merger.add(update)          # in rank order, each after `check_update` let it pass
    state = merger.finish()

`memory` is the server's: one dict a part, changed in place by the rules, saved with the checkpoint of the
round. After an `AggregationError` it may hold half a round; the last checkpoint does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedsplit.aggregation.base import (
    AggregationContext,
    Rule,
    StateDict,
    Update,
    check_memory,
    seeded_generator,
)
from fedsplit.aggregation.guard import InputGuard, check_output
from fedsplit.aggregation.loading import load_rule
from fedsplit.aggregation.spec import RuleSpec, first_match
from fedsplit.aggregation.validation import named
from fedsplit.errors import AggregationError, FedSplitError, UsageError
from fedsplit.run.history import PartRow


@dataclass(frozen=True, kw_only=True)
class Part:
    """The keys that one rule takes; `rule` is None for a part that stays with the clients."""

    spec: RuleSpec
    keys: tuple[str, ...]
    rule: Rule | None

    @property
    def name(self) -> str:
        """The pattern, or ``"*"``."""
        return self.spec.part


@dataclass(frozen=True, kw_only=True)
class Split:
    """The parts of a model, in the order of their rules; those of a bare rule without keys left out."""

    parts: tuple[Part, ...]
    rows: tuple[PartRow, ...]

    @classmethod
    def resolve(
        cls, specs: Sequence[RuleSpec], reference: Mapping[str, Tensor], *, local_withheld: bool = False
    ) -> Split:
        """Give every key its rule.

        Parameters
        ----------
        specs : sequence of RuleSpec
            As from `parse_rules`.
        reference : mapping of str to Tensor
            The global state, or tensors of its shapes and dtypes (`device="meta"` will do).
        local_withheld : bool
            Whether the entries of `local` parts were taken out of `reference` before; then a `local` pattern
            that matches nothing is no error, as it can match nothing.

        Raises
        ------
        UsageError
            For a pattern that matches nothing, keys without a rule, nothing left to merge, or a rule that
            cannot be loaded.
        """
        keys: dict[RuleSpec, list[str]] = {spec: [] for spec in specs}
        without: list[str] = []
        for key in reference:
            spec = first_match(specs, key)
            (without if spec is None else keys[spec]).append(key)
        if without:
            raise UsageError(
                f"no rule for {named(without)}: no pattern matches; add one without a pattern, such as fedavg"
            )
        for spec, taken in keys.items():
            if not taken and spec.pattern is not None and not (local_withheld and spec.name == "local"):
                raise UsageError(_matches_nothing(spec, reference))
        parts = tuple(_part(spec, taken) for spec, taken in keys.items() if taken or spec.pattern is not None)
        if reference and all(part.rule is None for part in parts):
            raise UsageError("every entry is local: nothing is left for the server to merge")
        return cls(parts=parts, rows=tuple(_row(part, reference) for part in parts))

    @property
    def local_keys(self) -> frozenset[str]:
        """The keys that never leave the clients."""
        return frozenset(key for part in self.parts if part.rule is None for key in part.keys)

    @property
    def min_updates(self) -> int:
        """With fewer updates in a round than this, one of the rules refuses."""
        return max((part.rule.min_updates for part in self.parts if part.rule is not None), default=1)

    def start_round(
        self,
        *,
        server_round: int,
        total_rounds: int,
        previous: Mapping[str, Tensor],
        seed: int,
        memory: dict[str, dict[str, Any]],
    ) -> RoundMerger:
        """Begin the merging of one round.

        Parameters
        ----------
        server_round, total_rounds : int
            Counting from 1.
        previous : mapping of str to Tensor
            The global state the clients started from. Its order of keys is that of the result.
        seed : int
            The run's seed.
        memory : dict
            What the rules remember, by part. Missing parts are added, others changed in place.
        """
        mergers = []
        for part in self.parts:
            if part.rule is not None:
                context = AggregationContext(
                    server_round=server_round,
                    total_rounds=total_rounds,
                    part=part.name,
                    previous={key: previous[key] for key in part.keys},
                    generator=seeded_generator(seed, server_round, part.name),
                    memory=memory.setdefault(part.name, {}),
                )
                mergers.append(_PartMerger(part.rule, context))
        return RoundMerger(mergers, previous, local_keys=self.local_keys)


class RoundMerger:
    """The merging of one round, part by part.

    Attributes
    ----------
    count : int
        How many updates were added.
    retains : bool
        Whether updates are kept until `finish`. If not, the server may drop each payload after `add`.
    """

    def __init__(
        self, parts: Sequence[_PartMerger], previous: Mapping[str, Tensor], *, local_keys: frozenset[str]
    ) -> None:
        self._parts = parts
        self._previous = previous
        self._local_keys = local_keys
        self.count = 0
        self.retains = not all(part.rule.one_pass for part in parts)

    def add(self, update: Update) -> None:
        """Merge, or keep, one update. To be called in rank order.

        Raises
        ------
        AggregationError
            If a rule fails on it, naming the rule and the part.
        """
        self.count += 1
        for part in self._parts:
            part.add(update)

    def finish(self) -> StateDict:
        """The new global state, without the parts that stay with the clients.

        Returns
        -------
        dict of str to Tensor
            In the key order of the previous state. Without a single update, the previous tensors themselves.

        Raises
        ------
        AggregationError
            If a rule fails, returns wrong keys, shapes, dtypes or values, changes what it was given, or
            remembers what no checkpoint can hold; naming the rule, the part, and what it did.
        """
        merged = dict(self._previous)
        if self.count:
            for part in self._parts:
                merged |= part.finish()
        return {key: tensor for key, tensor in merged.items() if key not in self._local_keys}


class _PartMerger:
    """One part in one round: its accumulator, and the watch over what the rule does to its inputs."""

    def __init__(self, rule: Rule, context: AggregationContext) -> None:
        self.rule = rule
        self._context = context
        self._guard = InputGuard()
        self._guard.watch("the previous global state", context.previous)
        with self._naming():
            self._accumulator = rule.accumulator(context)

    def add(self, update: Update) -> None:
        state = {key: update.state_dict[key] for key in self._context.previous}
        view = Update(rank=update.rank, state_dict=state, num_examples=update.num_examples, metrics=update.metrics)
        with self._naming():
            guard = InputGuard() if self.rule.one_pass else self._guard
            guard.watch(f"the update of rank {update.rank}", state)
            self._accumulator.add(view)
            if self.rule.one_pass:
                guard.check()

    def finish(self) -> StateDict:
        with self._naming():
            result = self._accumulator.result()
            self._guard.check()
            check_output(result, self._context.previous)
            check_memory(self._context.memory)
        return result

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Turn what a rule raises into an `AggregationError` that names it."""
        who = f"the rule {self.rule.name} of part {self._context.part!r}"
        try:
            yield
        except FedSplitError as exc:
            raise AggregationError(f"{who}: {exc}") from exc
        except Exception as exc:  # a rule may be anybody's code
            raise AggregationError(f"{who} failed: {type(exc).__name__}: {exc}") from exc


def _part(spec: RuleSpec, keys: Sequence[str]) -> Part:
    return Part(spec=spec, keys=tuple(keys), rule=None if spec.name == "local" else load_rule(spec))


def _row(part: Part, reference: Mapping[str, Tensor]) -> PartRow:
    size = sum(reference[key].numel() * reference[key].element_size() for key in part.keys)
    return PartRow(part=part.name, entries=len(part.keys), bytes=size, rule=part.spec.rule)


def _matches_nothing(spec: RuleSpec, reference: Mapping[str, Tensor]) -> str:
    taken = [key for key in reference if spec.matches(key)]
    if taken:
        return f"the pattern of {spec} comes too late: earlier patterns take {named(taken)}; put it first"
    return f"the pattern of {spec} matches no entry; there are {named(reference)}"
