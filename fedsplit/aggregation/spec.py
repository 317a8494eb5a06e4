"""Reads the values of `--aggregate`, and checks them as far as that is possible without importing torch.

One value is ``@rules.toml``, ``rule`` or ``PATTERN=rule``: `fedsplit.aggregation.grammar` says how a rule is written,
`fedsplit.states.local_keys` what a pattern is. The first pattern that matches a key wins, and a rule without one
takes the others. `check_rules` in `fedsplit.aggregation.split` looks for classes of Flower's and for functions.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
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
    required: bool = False


_BYZANTINE = Param("a whole number, 0 or more", lambda n: isinstance(n, int) and n >= 0)
_COUNT = Param("a whole number, 1 or more", lambda n: isinstance(n, int) and n >= 1)
_POSITIVE = Param("a number above 0", lambda x: x > 0)

# Not read from the functions, as importing those would import torch; a test compares the two.
BUILTIN_RULES: Mapping[str, Mapping[str, Param]] = {
    "fedavg": {}, "median": {},
    "trimmed-mean": {"fraction": Param("a number from 0 to below 0.5", lambda x: 0 <= x < 0.5)},
    "krum": {"byzantine": _BYZANTINE},
    "multi-krum": {"byzantine": _BYZANTINE, "selected": _COUNT},
    "geometric-median": {"iterations": _COUNT, "smoothing": _POSITIVE},
    "max": {}, "frozen": {}, "local": {},
    "dp": {
        "clip": _POSITIVE._replace(required=True),
        "noise": Param("a number, 0 or more", lambda x: x >= 0, required=True),
        "delta": Param("a number between 0 and 1", lambda x: 0 < x < 1),
    },
    "secure": {
        "range": _POSITIVE._replace(required=True),
        "threshold": Param(
            "a whole number of ranks, 2 or more, or a share of them from 0.5 to below 1",
            lambda x: 0.5 <= x < 1 or (isinstance(x, int) and x >= 2),
        ),
        "neighbours": Param("an even whole number, 4 or more", lambda n: isinstance(n, int) and n >= 4 and n % 2 == 0),
    },
}  # fmt: skip
# The entries of `local` never reach the server, `frozen` releases nothing, a second `dp` would count noise twice, and
# `secure` leaves no single update to be clipped.
_NOT_INSIDE_DP = frozenset({"local", "frozen", "dp", "secure"})
# These need nothing but the weighted mean of the updates.
OF_THE_MEAN = (
    "fedavg", "flower.FedAvg", "flower.FedAvgM", "flower.FedAdagrad", "flower.FedAdam", "flower.FedYogi",
    "flower.FedOpt",
)  # fmt: skip

# flower.<Strategy>, or package.module:function
_OTHER_RULE = re.compile(r"flower\.[A-Za-z_]\w*|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


_TYPE_PATTERN = re.compile(r"<[\w*?\[\]!-]+>")


@dataclass(frozen=True, kw_only=True)
class RuleSpec:
    """One rule of the split, as asked for; raises UsageError for a name or parameter that cannot be."""

    pattern: str | None = None  # glob over keys, or <glob over types>; None takes all keys that no pattern matches
    name: str  # in BUILTIN_RULES, flower.<Strategy>, or package.module:function
    params: Mapping[str, Any] = field(default_factory=dict)
    inner: RuleSpec | None = None  # the rule inside dp or secure

    def __post_init__(self) -> None:
        if self.pattern is not None:
            _check_pattern(self.pattern)
        if self.name not in BUILTIN_RULES and not _OTHER_RULE.fullmatch(self.name):
            raise UsageError(
                f"unknown rule {self.name!r}{_suggestion(self.name, BUILTIN_RULES)}: known are "
                f"{', '.join(BUILTIN_RULES)}, flower.<Strategy> and package.module:function"
            )
        if self.by_type and self.name != "local":
            raise UsageError(
                f"{self.pattern} goes with local only, not with {self.name}: the server has no model, and so no types "
                "of modules; choose these entries by a glob over state_dict keys"
            )
        _check_inner(self.name, self.inner)
        _check_params(self.name, self.params)

    @property
    def rule(self) -> str:
        """The rule as text, without its pattern."""
        arguments = [self.inner.rule] if self.inner else []
        arguments += [f"{key}={literal_text(value)}" for key, value in self.params.items()]
        return f"{self.name}({', '.join(arguments)})" if arguments else self.name

    @property
    def kind(self) -> str:
        """The rule without its parameters: what it remembers is of use to another rule of the same kind."""
        return f"{self.name}({self.inner.kind})" if self.inner else self.name

    @property
    def by_type(self) -> bool:
        """Whether the pattern is over types of modules."""
        return local_keys.type_glob(self.part) is not None

    @property
    def part(self) -> str:
        """The name of the part that this rule merges: its pattern, or ``"*"``."""
        return "*" if self.pattern is None else self.pattern

    def __str__(self) -> str:
        return self.rule if self.pattern is None else f"{self.pattern}={self.rule}"

    def __hash__(self) -> int:
        return hash(str(self))


def _check_pattern(pattern: str) -> None:
    if not pattern or pattern != pattern.strip() or pattern.startswith("@") or any(c in pattern for c in "=()"):
        raise UsageError(
            f"{pattern!r} is not a pattern: expected a glob over state_dict keys such as 'body.*', "
            "without spaces around it, '=', brackets '()' or a leading '@'"
        )
    if (pattern.startswith("<") or pattern.endswith(">")) and not _TYPE_PATTERN.fullmatch(pattern):
        raise UsageError(
            f"{pattern!r} is not a pattern over types: expected a glob over names of classes, without their modules, "
            "in angle brackets, such as '<BatchNorm*>'"
        )


def _check_inner(name: str, inner: RuleSpec | None) -> None:
    if inner and name not in ("dp", "secure"):
        raise UsageError(f"{name} takes no rule inside; only dp does, and secure")
    if name in ("dp", "secure") and not inner:
        raise UsageError(f"{name} needs a rule as its first argument: {name}(fedavg, …)")
    if inner and name == "dp" and inner.name in _NOT_INSIDE_DP:
        raise UsageError(f"dp cannot wrap {inner.name}")
    if inner and name == "secure" and inner.name not in OF_THE_MEAN:
        why = (
            "dp clips single updates and adds noise on the server, which sees only their sum"
            if inner.name == "dp" else f"{inner.name} needs single updates, and the server sees only their mean"
        )  # fmt: skip
        raise UsageError(f"secure cannot wrap {inner.name}: {why}; it goes with {', '.join(OF_THE_MEAN)}")


def _check_params(name: str, params: Mapping[str, Literal]) -> None:
    known = BUILTIN_RULES.get(name)
    for key, value in params.items():
        if not key.isidentifier():
            raise UsageError(f"{name}: {key!r} is not a parameter name")
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{name}({key}={value}): expected a finite number")
        if known is None:
            continue
        if key not in known:
            takes = ", ".join(known) or "none"
            raise UsageError(f"{name} has no parameter {key!r}{_suggestion(key, known)}: it takes {takes}")
        if isinstance(value, bool | str) or not known[key].allows(value):
            raise UsageError(f"{name}({key}={literal_text(value)}): {key} is {known[key].says}")
    if missing := [key for key, param in (known or {}).items() if param.required and key not in params]:
        raise UsageError(f"{name} needs {' and '.join(missing)}, for example {name}(…, {missing[0]}=1.0)")


def _suggestion(found: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(found, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def parse_rules(texts: Sequence[str]) -> tuple[RuleSpec, ...]:
    """Read the values of the repeated `--aggregate` flag; none at all means `fedavg`.

    They come back in the order given, but the one without a pattern is the last, as it takes what the others leave.
    Raises UsageError for anything malformed, naming the value, and for two rules without a pattern.
    """
    specs: list[RuleSpec] = []
    for text in texts:
        try:
            file = text.strip().removeprefix("@")
            specs += [parse_rule(text)] if file == text.strip() else _parse_toml(Path(file))
        except UsageError as exc:
            raise UsageError(f"--aggregate {text}: {exc}") from exc
    bare = [spec for spec in specs if spec.pattern is None]
    if len(bare) > 1:
        raise UsageError(
            f"--aggregate: two rules without a pattern, {bare[0]} and {bare[1]}: only one can take what the "
            f"patterns leave; give one a pattern, such as 'body.*={bare[0]}'"
        )
    return tuple(sorted(specs or [RuleSpec(name="fedavg")], key=lambda spec: spec.pattern is None))


def first_match(specs: Sequence[RuleSpec], key: str, at_home: Container[str] = ()) -> RuleSpec | None:
    """Return the first of the rules that takes a key, or None; they come in the order of `parse_rules`.

    Of an entry that stayed `at_home` only its trainer knows the types: if none kept it by name, a type did.
    """
    choices = [(spec.part, spec) for spec in specs]
    by_name = local_keys.first_match(key, choices)
    if by_name and by_name.name == "local":
        return by_name
    return local_keys.first_match(key, choices, lambda name, _: name in at_home)


def parse_rule(text: str) -> RuleSpec:
    """Read one `rule` or `PATTERN=rule`; raises UsageError for what is neither."""
    head, equals, tail = text.partition("=")
    if equals and "(" not in head:
        return _build(parse_call(tail), head.strip())
    return _build(parse_call(text))


def _build(call: Call, pattern: str | None = None) -> RuleSpec:
    return RuleSpec(pattern=pattern, name=call.name, params=call.params, inner=_build(call.rule) if call.rule else None)


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
        rule, pattern = part.get("rule"), part.get("pattern")
        try:
            if not set(part) <= {"rule", "pattern"} or not isinstance(rule, str) or not isinstance(pattern, str | None):
                raise UsageError(f'expected rule = "…" and perhaps pattern = "…", found {", ".join(part)}')
            yield _build(parse_call(rule), pattern)
        except UsageError as exc:
            raise UsageError(f"{path}, part {number}: {exc}") from exc
