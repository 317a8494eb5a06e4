"""From what was asked for to a rule that can be called: built-in, Flower's, the user's, or a wrapped one."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

from fedsplit.aggregation import rules
from fedsplit.aggregation.base import Accumulator, AggregationContext, Rule, RuleFunction
from fedsplit.aggregation.spec import RuleSpec
from fedsplit.errors import UsageError


class Builtin(NamedTuple):
    """A rule of ours: its function, its accumulator if one pass is enough, and how many updates it needs."""

    function: RuleFunction
    accumulator: Callable[[AggregationContext], Accumulator] | None = None
    min_updates: Callable[..., int] = lambda **_: 1

    def bind(self, name: str, **params: Any) -> Rule:
        """Return the rule with these parameters; `name` is how messages call it."""
        if self.accumulator is not None:
            return Rule(name=name, accumulator=self.accumulator, one_pass=True)
        return Rule.of_function(name, partial(self.function, **params), min_updates=self.min_updates(**params))


# Their parameters are in `fedsplit.aggregation.spec.BUILTIN_RULES`; `dp` and `local` are handled apart.
BUILTIN: dict[str, Builtin] = {
    "fedavg": Builtin(rules.fedavg, rules.MeanAccumulator),
    "max": Builtin(rules.maximum_of_all, rules.MaxAccumulator),
    "frozen": Builtin(rules.frozen, rules.FrozenAccumulator),
    "median": Builtin(rules.median),
    "trimmed-mean": Builtin(rules.trimmed_mean),
    "krum": Builtin(rules.krum, min_updates=rules.krum_needs),
    "multi-krum": Builtin(rules.multi_krum, min_updates=rules.multi_krum_needs),
    "geometric-median": Builtin(rules.geometric_median),
}


def check_rules(specs: Sequence[RuleSpec]) -> None:
    """Load every rule once, before the server waits for anybody; raises UsageError as `load_rule` does."""
    for spec in specs:
        if spec.name != "local":
            load_rule(spec)


def load_rule(spec: RuleSpec) -> Rule:
    """Bind a rule other than `local`; raises UsageError if a function, class, parameter or package is not there."""
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
    try:
        inspect.signature(target).bind(*([] if inspect.isclass(target) else ["updates", "context"]), **spec.params)
    except (TypeError, ValueError) as exc:
        raise UsageError(
            f"{spec.name} cannot be called as rule({', '.join(['updates', 'context', *spec.params])}): {exc}"
        ) from exc
    if inspect.isclass(target):
        return cast(Rule, target(**spec.params))
    return Rule.of_function(spec.rule, partial(target, **spec.params))


def find_object(name: str, what: str) -> Any:
    """Return the object that ``package.module:name`` means, or None if the module has no such name.

    Raises UsageError if the module cannot be imported; `what` is what the message says it was imported for.
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
