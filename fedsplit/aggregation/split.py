"""The split: which part of the state_dict is merged by which rule, and the merging of one round.

The server resolves the split once, against the first global state, and then for each round::

    merger = split.start_round(server_round=3, total_rounds=10, previous=state, seed=0, memory=memory)
    merger.add(update)  # in rank order, each after `check_update` let it pass
    state = merger.finish()

After an `AggregationError`, `memory` may hold half a round; the last checkpoint does not.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from torch import Tensor

from fedsplit.aggregation.base import AggregationContext, Rule, StateDict, Update, seeded_generator
from fedsplit.aggregation.rules import BUILTIN, MeanAccumulator
from fedsplit.aggregation.spec import RuleSpec, first_match
from fedsplit.aggregation.validation import Watched, check_memory, check_numbers, check_output, extra_reason
from fedsplit.errors import AggregationError, FedSplitError, UsageError
from fedsplit.run.history import PartRow
from fedsplit.states.local_keys import named
from fedsplit.states.ties import find_ties

# As many updates are merged in one pass over the mean, in so much memory.
_AT_ONCE, _AT_ONCE_BYTES = 8, 1 << 29


@dataclass(frozen=True, kw_only=True)
class Part:
    """The keys that one rule takes; `rule` is None if they stay with the clients.

    Its rule remembers under `memory_key`: another kind of rule for the same part does not find that.
    """

    name: str  # the pattern, or "*"
    keys: tuple[str, ...]
    rule: Rule | None
    memory_key: str
    row: PartRow  # the part for people


@dataclass(frozen=True, kw_only=True)
class Split:
    """The parts of a model, in the order of their rules; those of a bare rule without keys left out."""

    parts: tuple[Part, ...] = ()
    # Each further name of a tied weight, and the one under which it is merged.
    ties: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def resolve(
        cls, specs: Sequence[RuleSpec], reference: Mapping[str, Tensor], *, local_withheld: bool = False,
        at_home: Container[str] = (),
    ) -> Split:  # fmt: skip
        """Give every key of a state its rule, of those from `parse_rules`. The state may be tensors without data.

        With `local_withheld` it lacks the entries that stay with the clients, so a `local` pattern may match nothing.
        Patterns over types share what else is `at_home`: nobody here knows of which type it is.
        Raises UsageError for any other pattern that matches nothing, a key without a rule, or nothing left to merge.
        """
        ties = find_ties(reference)
        keys: dict[RuleSpec | None, list[str]] = {spec: [] for spec in specs}
        for key in reference:
            spec = first_match(specs, key, at_home)
            if key not in ties:
                keys.setdefault(spec, []).append(key)
            elif spec and (other := first_match(specs, ties[key], at_home)) and spec.rule != other.rule:
                raise UsageError(
                    f"{ties[key]!r} and {key!r} are one tensor (tied weights), but {other} and {spec} separate them; "
                    "give both the same rule"
                )
        if without := keys.get(None):
            raise UsageError(
                f"no rule for {named(without)}: no pattern matches; add one without a pattern, such as fedavg"
            )
        parts, by_type = [], list(dict.fromkeys(spec for spec in specs if spec.by_type))
        for spec in dict.fromkeys(specs):
            taken = keys[spec]
            if not taken and (spec.pattern is None or spec in by_type[1:]):
                continue
            local = spec.name == "local"
            may_be_empty = local and local_withheld and not spec.by_type
            if not taken and not may_be_empty and not any(first_match([spec], key, at_home) for key in ties):
                raise UsageError(_matches_nothing(spec, reference, at_home))
            if not taken and not local:  # it took further names of tied weights only
                continue
            size = sum(reference[key].nbytes for key in taken)
            name = ", ".join(each.part for each in by_type) if spec.by_type else spec.part
            parts.append(Part(
                name=name, keys=tuple(taken), rule=None if local else load_rule(spec),
                memory_key=f"{spec.part}={spec.kind}", row=PartRow(name, len(taken), size, spec.rule),
            ))  # fmt: skip
        if reference and all(part.rule is None for part in parts):
            raise UsageError("every entry is local: nothing is left for the server to merge")
        return cls(parts=tuple(parts), ties=ties)

    @property
    def min_updates(self) -> int:
        """With fewer updates in a round than this, one of the rules refuses."""
        return max((part.rule.min_updates for part in self.parts if part.rule is not None), default=1)

    @property
    def reads_extra(self) -> bool:
        """Whether a rule may read the extra tensors of an update."""
        return any(getattr(part.rule, "reads_extra", True) for part in self.parts if part.rule is not None)

    def start_round(
        self, *, server_round: int, total_rounds: int, previous: Mapping[str, Tensor], seed: int,
        memory: dict[str, dict[str, Any]], extra: StateDict | None = None,
        rank_extra: Mapping[int, StateDict] | None = None, ranks: Sequence[int] = (), num_ranks: int = 0,
    ) -> RoundMerger:  # fmt: skip
        """Begin the merging of one round; rounds count from 1.

        `previous` is the global state that the clients started from, `seed` the run's, and `memory` what the rules
        remember, by `Part.memory_key`: it is changed in place, and saved with the checkpoint of the round. The others
        are as in `AggregationContext`.
        """
        extra = dict(extra or {})
        rank_extra = {rank: dict(own) for rank, own in (rank_extra or {}).items()}
        rules, local = [], {key for part in self.parts if part.rule is None for key in part.keys}
        for part in self.parts:
            if part.rule is not None:
                context = AggregationContext(
                    server_round=server_round, total_rounds=total_rounds, part=part.name,
                    previous={key: previous[key] for key in part.keys}, memory=memory.setdefault(part.memory_key, {}),
                    generator=seeded_generator(seed, server_round, part.name), extra=extra, rank_extra=rank_extra,
                    ranks=tuple(ranks), num_ranks=num_ranks,
                )  # fmt: skip
                rules.append((part.rule, context))
        kept = {key: tensor for key, tensor in previous.items() if key not in local}
        return RoundMerger(rules, kept, self.ties, extra, rank_extra)


class RoundMerger:
    """The merging of one round: an accumulator for each part, and the watch over what its rule does to its inputs.

    It is a `fedsplit.server.strategy.Merge`. `count` is how many updates were added; `extra` and `rank_extra` are the
    extra tensors, as the rules leave them.
    """

    def __init__(
        self, rules: Sequence[tuple[Rule, AggregationContext]], previous: StateDict, ties: Mapping[str, str],
        extra: StateDict, rank_extra: dict[int, StateDict],
    ) -> None:  # fmt: skip
        self._previous = previous
        self._ties = ties
        self.extra, self.rank_extra = extra, rank_extra
        self._extra_before = [Watched("the extra tensors", dict(each)) for each in (extra, *rank_extra.values())]
        self.count = 0
        self.retains = not all(rule.one_pass for rule, _ in rules)
        self._parts = []
        for rule, context in rules:
            watched = [Watched("the previous global state", context.previous)]
            with _naming(rule, context):
                self._parts.append((rule, context, rule.accumulator(context), watched))
        size = sum(tensor.nbytes for tensor in previous.values())
        is_mean = len(rules) == 1 and rules[0][0].accumulator is MeanAccumulator
        self.at_once = max(1, min(_AT_ONCE, _AT_ONCE_BYTES // max(1, size))) if is_mean else 1

    def add_all(self, updates: Sequence[Update]) -> dict[int, str]:
        """Merge updates whose numbers nobody has looked at; returns the ranks refused for them, and why."""
        ((rule, context, accumulator, _),) = self._parts
        parts = [
            replace(update, state_dict={key: update.state_dict[key] for key in context.previous}) for update in updates
        ]
        with _naming(rule, context):
            if cast(MeanAccumulator, accumulator).add_all(parts):
                self.count += len(updates)
                return {}
        # Something is not finite, perhaps rightly so: one by one, each looked at before it is merged.
        refused = {}
        for update in updates:
            if reason := check_numbers(update.state_dict, self._previous):
                refused[update.rank] = reason
            else:
                self.add(update)
        return refused

    def add(self, update: Update) -> None:
        """Merge, or keep, one update; raises AggregationError, naming rule and part, if a rule fails on it."""
        self.count += 1
        for rule, context, accumulator, watched in self._parts:
            state = {key: update.state_dict[key] for key in context.previous}
            who = f"the update of rank {update.rank}"
            given = [Watched(who, state), Watched(f"the extra tensors of {who}", update.extra)]
            with _naming(rule, context):
                accumulator.add(replace(update, state_dict=state))
                if not rule.one_pass:
                    watched += given
                    continue
                for each in given:
                    each.check()

    def finish(self) -> StateDict:
        """Return the new global state without the local parts; without a single update, the previous tensors.

        Raises AggregationError, naming rule and part, if a rule fails, returns wrong keys, shapes, dtypes or values,
        changes what it was given, or remembers what no checkpoint can hold.
        """
        merged = dict(self._previous)
        for rule, context, accumulator, watched in self._parts if self.count else ():
            with _naming(rule, context):
                result = accumulator.result()
                for given in watched + self._extra_before:
                    given.check()
                check_output(result, context.previous)
                check_memory(context.memory)
                for extra in (self.extra, *self.rank_extra.values()):
                    if reason := extra_reason(extra):
                        raise AggregationError(f"it left {reason}")
            merged |= result
        return merged | {key: merged[kept] for key, kept in self._ties.items()}


@contextmanager
def _naming(rule: Rule, context: AggregationContext) -> Iterator[None]:
    """Turn what a rule raises into an `AggregationError` that names it."""
    who = f"the rule {rule.name} of part {context.part!r}"
    try:
        yield
    except FedSplitError as exc:
        raise AggregationError(f"{who}: {exc}") from exc
    except Exception as exc:  # a rule may be anybody's code
        raise AggregationError(f"{who} failed: {type(exc).__name__}: {exc}") from exc


def _matches_nothing(spec: RuleSpec, reference: Mapping[str, Tensor], at_home: Container[str]) -> str:
    taken = [key for key in reference if first_match([spec], key, at_home)]
    if spec.by_type and taken:
        return f"the pattern of {spec} is for nothing: patterns over keys keep {named(taken)} at home; leave it out"
    if spec.by_type:
        return (
            f"the pattern of {spec} matches nothing: the trainer that gave the initial state kept no entry for it; "
            "choose by the keys of the state_dict, or begin a new run if this one began without the pattern"
        )
    if taken:
        return f"the pattern of {spec} comes too late: earlier patterns take {named(taken)}; put it first"
    return f"the pattern of {spec} matches no entry; there are {named(reference)}"


def check_rules(specs: Sequence[RuleSpec]) -> None:
    """Load every rule once, before the server waits for anybody; raises UsageError as `load_rule` does."""
    for spec in specs:
        if spec.name != "local":
            load_rule(spec)


def load_rule(spec: RuleSpec) -> Rule:
    """Bind a rule other than `local`; raises UsageError if a function, class, parameter or package is not there."""
    if spec.inner is not None and spec.name == "secure":
        # Once the sum is there every update has the mean in its place (`fedsplit.server.secure_rounds`).
        threshold = spec.params.get("threshold", 2)
        return replace(load_rule(spec.inner), name=spec.rule, min_updates=threshold if threshold >= 2 else 2)
    if spec.inner is not None:
        from fedsplit.aggregation.privacy import private_rule

        return private_rule(spec.rule, load_rule(spec.inner), averages=spec.inner.name == "fedavg", **spec.params)
    if spec.name in BUILTIN:
        return BUILTIN[spec.name].bind(spec.rule, **spec.params)
    if ":" in spec.name:
        return _user_rule(spec)
    from fedsplit.aggregation.flower import flower_rule

    return flower_rule(spec.rule, spec.name.removeprefix("flower."), spec.params)


def _user_rule(spec: RuleSpec) -> Rule:
    """Load a function of the user's, or a class of theirs that makes a rule."""
    target = find_object(spec.name, f"the rule {spec.name}")
    if not callable(target):
        module_name, _, path = spec.name.partition(":")
        raise UsageError(f"{spec.name}: the module {module_name!r} has no function {path!r}")
    given = () if inspect.isclass(target) else ("updates", "context")
    try:
        inspect.signature(target).bind(*given, **spec.params)
    except (TypeError, ValueError) as exc:
        call = ", ".join(["updates", "context", *spec.params])
        raise UsageError(f"{spec.name} cannot be called as rule({call}): {exc}") from exc
    if inspect.isclass(target):
        return cast(Rule, target(**spec.params))
    return Rule.of_function(spec.rule, partial(target, **spec.params), reads_extra=True)


def find_object(name: str, what: str) -> Any:
    """Return what ``package.module:name`` means, or None if the module has no such name.

    Raises UsageError, which says that `what` wanted the module, if it cannot be imported.
    """
    module_name, _, path = name.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    except Exception as exc:  # the module is the user's: whatever it raises is for them to read, in one line
        raise UsageError(
            f"cannot import {module_name!r} for {what}: {type(exc).__name__}: {exc}; "
            "it is looked for in the directory that the program was started from and on PYTHONPATH"
        ) from exc
    for each in path.split("."):
        target = getattr(target, each, None)
    return target
