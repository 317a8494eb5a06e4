"""From what was asked for to a rule that can be called: built-in, Flower's, the user's, or a wrapped one."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Sequence
from typing import Any, cast

# Imported for their entries in the registry.
from fedsplit.aggregation import averaging as _averaging  # noqa: F401
from fedsplit.aggregation import robust as _robust  # noqa: F401
from fedsplit.aggregation.base import REGISTRY, FunctionRule, Rule
from fedsplit.aggregation.spec import RuleSpec
from fedsplit.errors import UsageError


def check_rules(specs: Sequence[RuleSpec]) -> None:
    """Load every rule once, before the server waits for anybody; raises UsageError as `load_rule` does."""
    for spec in specs:
        if spec.name != "local":
            load_rule(spec)


def load_rule(spec: RuleSpec) -> Rule:
    """Bind a rule to its parameters.

    Raises
    ------
    UsageError
        If a module, function, Flower class, parameter or extra is not there; and for `local`, which merges nothing.
    """
    if spec.name == "local":
        raise UsageError("local is not a rule that merges: these entries stay with the clients")
    if spec.inner is not None:
        from fedsplit.aggregation.privacy import private_rule

        inner = load_rule(spec.inner)
        return private_rule(spec.rule, inner, averages=spec.inner.name == "fedavg", **spec.options)
    if spec.name in REGISTRY:
        return REGISTRY[spec.name].bind(spec.rule, **spec.options)
    if ":" in spec.name:
        return _user_rule(spec)
    from fedsplit.aggregation.flower import flower_rule

    return flower_rule(spec.rule, spec.name.removeprefix("flower."), spec.options)


def _user_rule(spec: RuleSpec) -> Rule:
    """A function of the user's, or a class of theirs that makes a `Rule`."""
    target = _find(spec)
    try:
        inspect.signature(target).bind(*([] if inspect.isclass(target) else ["updates", "context"]), **spec.params)
    except (TypeError, ValueError) as exc:
        raise UsageError(
            f"{spec.name} cannot be called as rule({', '.join(['updates', 'context', *spec.params])}): {exc}"
        ) from exc
    if inspect.isclass(target):
        return cast(Rule, target(**spec.params))
    return FunctionRule(name=spec.rule, function=functools.partial(target, **spec.params))


def find_object(name: str, what: str) -> Any:
    """Return the object of a user's module that ``package.module:name`` means; None if the module has no such name.

    Raises
    ------
    UsageError
        If the module cannot be imported; ``what`` says in the message what it was imported for.
    """
    module_name, _, path = name.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    except Exception as exc:
        # The module is the user's: whatever goes wrong while it runs is for them to read, in one line.
        raise UsageError(
            f"cannot import {module_name!r} for {what}: {type(exc).__name__}: {exc}; "
            "it is looked for beside the script and on PYTHONPATH"
        ) from exc
    for each in path.split("."):
        target = getattr(target, each, None)
    return target


def _find(spec: RuleSpec) -> Any:
    target = find_object(spec.name, f"the rule {spec.name}")
    if not callable(target):
        module_name, _, path = spec.name.partition(":")
        raise UsageError(f"{spec.name}: the module {module_name!r} has no function {path!r}")
    return target
