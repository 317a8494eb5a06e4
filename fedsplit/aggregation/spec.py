"""Reads the values of `--aggregate`, and checks them as far as that is possible without importing torch.

One value is ``@rules.toml``, ``rule`` or ``PATTERN=rule``; `fedsplit.aggregation.grammar` says how a rule is written. A
pattern is a glob over state_dict keys. The first pattern that matches a key wins, and the rule without a pattern takes
the other keys. `fedsplit.aggregation.check_rules` checks whether classes of Flower's and functions of the user's exist.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fedsplit.aggregation.grammar import Call, Literal, literal_text, parse_call
from fedsplit.errors import UsageError
from fedsplit.states import local_keys


class Param(NamedTuple):
    """A parameter of a built-in rule: the numbers it takes, in words and as a test."""

    says: str
    allows: Callable[[Any], bool]
    whole: bool = False
    required: bool = False

    def accepts(self, value: object) -> bool:
        """Return whether this is such a number."""
        kinds = int if self.whole else int | float
        return isinstance(value, kinds) and not isinstance(value, bool) and self.allows(value)


_BYZANTINE = Param("a whole number, 0 or more", lambda n: n >= 0, whole=True)
_COUNT = Param("a whole number, 1 or more", lambda n: n >= 1, whole=True)
_POSITIVE = Param("a number above 0", lambda x: x > 0)

# Not read from the functions, as importing those would import torch; a test compares the two.
BUILTIN_RULES: Mapping[str, Mapping[str, Param]] = {
    "fedavg": {},
    "median": {},
    "trimmed-mean": {"fraction": Param("a number from 0 to below 0.5", lambda x: 0 <= x < 0.5)},
    "krum": {"byzantine": _BYZANTINE},
    "multi-krum": {"byzantine": _BYZANTINE, "selected": _COUNT},
    "geometric-median": {"iterations": _COUNT, "smoothing": _POSITIVE},
    "max": {},
    "frozen": {},
    "local": {},
    "dp": {
        "clip": _POSITIVE._replace(required=True),
        "noise": Param("a number, 0 or more", lambda x: x >= 0, required=True),
        "delta": Param("a number between 0 and 1", lambda x: 0 < x < 1),
    },
}
_WRAPPER = "dp"
# The entries of `local` never reach the server, `frozen` releases nothing, and a second `dp` would count noise twice.
_NOT_WRAPPABLE = frozenset({"local", "frozen", "dp"})

_FLOWER_NAME = re.compile(r"flower\.[A-Za-z_]\w*")
_USER_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True, kw_only=True)
class RuleSpec:
    """One rule of the split, as asked for.

    Parameters
    ----------
    pattern : str or None
        Glob over state_dict keys; None is the rule for all keys that no pattern matches.
    name : str
        A name in `BUILTIN_RULES`, `flower.<Strategy>`, or `package.module:function`.
    params : mapping
        Keyword arguments. The rule inside `dp` is the `RuleSpec` under ``"rule"``.

    Raises
    ------
    UsageError
        For an unknown name, or a parameter that a built-in rule does not take or that is out of its range.
    """

    pattern: str | None = None
    name: str
    params: Mapping[str, Literal | RuleSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", dict(self.params))
        _check_pattern(self.pattern)
        _check_name(self.name)
        _check_values(self)
        if self.name == _WRAPPER:
            _check_wrapper(self)
        if self.name in BUILTIN_RULES:
            _check_parameters(self, BUILTIN_RULES[self.name])

    @property
    def rule(self) -> str:
        """The rule as text, without its pattern."""
        arguments = [self.inner.rule] if self.inner is not None else []
        arguments += [f"{key}={literal_text(value)}" for key, value in self.options.items()]
        return f"{self.name}({', '.join(arguments)})" if arguments else self.name

    @property
    def inner(self) -> RuleSpec | None:
        """The rule inside `dp`."""
        inner = self.params.get("rule")
        return inner if isinstance(inner, RuleSpec) else None

    @property
    def options(self) -> dict[str, Any]:
        """The parameters without the rule inside."""
        return {key: value for key, value in self.params.items() if not isinstance(value, RuleSpec)}

    @property
    def part(self) -> str:
        """The name of the part of the model that this rule merges: its pattern, or ``"*"``."""
        return "*" if self.pattern is None else self.pattern

    def matches(self, key: str) -> bool:
        """Return whether this rule would take `key` if no earlier one did."""
        return local_keys.first_match(key, [self.part]) is not None

    def __str__(self) -> str:
        return self.rule if self.pattern is None else f"{self.pattern}={self.rule}"

    def __hash__(self) -> int:
        return hash(str(self))


def _check_pattern(pattern: str | None) -> None:
    if pattern is not None and (
        not pattern or pattern != pattern.strip() or pattern.startswith("@") or any(c in pattern for c in "=()")
    ):
        raise UsageError(
            f"{pattern!r} is not a pattern: expected a glob over state_dict keys such as 'body.*', "
            "without spaces around it, '=', brackets '()' or a leading '@'"
        )


def _check_name(name: str) -> None:
    if name in BUILTIN_RULES or _FLOWER_NAME.fullmatch(name) or _USER_NAME.fullmatch(name):
        return
    raise UsageError(
        f"unknown rule {name!r}{_suggestion(name, BUILTIN_RULES)}: known are {', '.join(BUILTIN_RULES)}, "
        "flower.<Strategy> and package.module:function"
    )


def _check_values(spec: RuleSpec) -> None:
    for key, value in spec.params.items():
        if not key.isidentifier():
            raise UsageError(f"{spec.name}: {key!r} is not a parameter name")
        if isinstance(value, RuleSpec):
            if key != "rule" or spec.name != _WRAPPER:
                raise UsageError(f"{spec.name} takes no rule inside; only {_WRAPPER} does")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{spec.name}({key}={value}): expected a finite number")


def _check_parameters(spec: RuleSpec, known: Mapping[str, Param]) -> None:
    for key, value in spec.options.items():
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise UsageError(f"{spec.name} has no parameter {key!r}{_suggestion(key, known)}: {takes}")
        if not known[key].accepts(value):
            raise UsageError(f"{spec.name}({key}={literal_text(value)}): {key} is {known[key].says}")
    missing = [key for key, param in known.items() if param.required and key not in spec.params]
    if missing:
        raise UsageError(f"{spec.name} needs {' and '.join(missing)}, for example {spec.name}(…, {missing[0]}=1.0)")


def _check_wrapper(spec: RuleSpec) -> None:
    inner = spec.inner
    if inner is None:
        raise UsageError(f"{spec.name} needs a rule as its first argument: {spec.name}(fedavg, …)")
    if inner.pattern is not None:
        raise UsageError(f"{spec.name}: the rule inside has the pattern {inner.pattern!r}; put it before {spec.name}")
    if inner.name in _NOT_WRAPPABLE:
        raise UsageError(f"{spec.name} cannot wrap {inner.name}")


def _suggestion(found: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(found, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def parse_rules(texts: Sequence[str]) -> tuple[RuleSpec, ...]:
    """Read the values of the repeated `--aggregate` flag; none at all means `fedavg`.

    Returns
    -------
    tuple of RuleSpec
        In the order given; the one without a pattern, if any, comes last as it takes what the others leave.

    Raises
    ------
    UsageError
        For anything malformed, naming the value; for two rules without a pattern.
    """
    specs = [spec for text in texts for spec in _parse_value(text)]
    bare = [spec for spec in specs if spec.pattern is None]
    if len(bare) > 1:
        raise UsageError(
            f"--aggregate: two rules without a pattern, {bare[0]} and {bare[1]}: only one can take what the "
            f"patterns leave; give one a pattern, such as 'body.*={bare[0]}'"
        )
    if not specs:
        bare = [RuleSpec(name="fedavg")]
    return (*(spec for spec in specs if spec.pattern is not None), *bare)


def first_match(specs: Sequence[RuleSpec], key: str) -> RuleSpec | None:
    """Return the rule that takes `key`: the first whose pattern matches, else the one without a pattern, else None."""
    ordered = sorted(specs, key=lambda spec: spec.pattern is None)
    index = local_keys.first_match(key, [spec.part for spec in ordered])
    return None if index is None else ordered[index]


def _parse_value(text: str) -> Iterator[RuleSpec]:
    try:
        if text.strip().startswith("@"):
            yield from _parse_toml(Path(text.strip()[1:]))
        else:
            yield parse_rule(text)
    except UsageError as exc:
        raise UsageError(f"--aggregate {text}: {exc}") from exc


def parse_rule(text: str) -> RuleSpec:
    """Read one `rule` or `PATTERN=rule`; raises UsageError for what is neither."""
    head, equals, tail = text.partition("=")
    if equals and "(" not in head:
        return _build(parse_call(tail), head.strip())
    return _build(parse_call(text))


def _build(call: Call, pattern: str | None = None) -> RuleSpec:
    params = {key: _build(value) if isinstance(value, Call) else value for key, value in call.params.items()}
    return RuleSpec(pattern=pattern, name=call.name, params=params)


def _parse_toml(path: Path) -> Iterator[RuleSpec]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except ValueError as exc:
        raise UsageError(f"{path} is not a TOML file: {exc}") from exc
    parts = tables.get("part")
    if set(tables) != {"part"} or not isinstance(parts, list) or not all(isinstance(p, dict) for p in parts):
        raise UsageError(f"{path}: expected [[part]] tables and nothing else, found {', '.join(tables) or 'none'}")
    for number, part in enumerate(parts, start=1):
        yield _parse_toml_part(f"{path}, part {number}", part)


def _parse_toml_part(where: str, part: Mapping[str, object]) -> RuleSpec:
    rule, pattern = part.get("rule"), part.get("pattern")
    if not set(part) <= {"rule", "pattern"} or not isinstance(rule, str) or not isinstance(pattern, str | None):
        raise UsageError(f'{where}: expected rule = "…" and perhaps pattern = "…", found {", ".join(part)}')
    try:
        return _build(parse_call(rule), pattern)
    except UsageError as exc:
        raise UsageError(f"{where}: {exc}") from exc
