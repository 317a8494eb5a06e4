"""The text of one rule, read into names and values; what they mean is for `fedsplit.aggregation.spec` to say.

Grammar::

    rule    = name [ "(" [ rule "," ] key "=" literal { "," key "=" literal } ")" ]
    literal = number | true | false | 'string' | bare-word
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from fedsplit.errors import UsageError

Literal = bool | int | float | str


@dataclass(frozen=True, kw_only=True)
class Call:
    """A name and what stands in its brackets; a rule given without a key has the key ``"rule"``."""

    name: str
    params: dict[str, Literal | Call]


def literal_text(value: Literal) -> str:
    """The text that is read as this value."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def parse_call(text: str) -> Call:
    """Read `name` or `name(…)`.

    Raises
    ------
    UsageError
        Naming what was expected and what was found instead.
    """
    return _Parser(text).parse()


_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
      | (?P<string>'(?:[^'\\]|\\.)*' | "(?:[^"\\]|\\.)*")
      | (?P<name>[A-Za-z_][\w.:-]*)
      | (?P<mark>[(),=])
      | (?P<end>\Z)
    )""",
    re.VERBOSE,
)


class _Parser:
    """Recursive descent over the tokens of one rule."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(_tokens(text))

    def parse(self) -> Call:
        call = self._rule()
        if self._tokens[0][0] != "end":
            raise self._unexpected("the end")
        return call

    def _rule(self) -> Call:
        kind, name = self._tokens[0]
        if kind != "name":
            raise self._unexpected("the name of a rule")
        self._tokens.pop(0)
        return Call(name=name, params=self._arguments() if self._take("(") else {})

    def _arguments(self) -> dict[str, Literal | Call]:
        params: dict[str, Literal | Call] = {}
        while not self._take(")"):
            key, value = self._argument(first=not params)
            if key in params:
                raise UsageError(f"{key!r} is given twice")
            params[key] = value
            if not self._take(",") and self._tokens[0] != ("mark", ")"):
                raise self._unexpected("',' or ')'")
        return params

    def _argument(self, *, first: bool) -> tuple[str, Literal | Call]:
        named = self._tokens[0][0] == "name" and self._tokens[1:2] == [("mark", "=")]
        if not named:
            if not first or self._tokens[0][0] != "name":
                raise self._unexpected("key=value")
            return "rule", self._rule()
        key = self._tokens.pop(0)[1]
        self._tokens.pop(0)
        return key, self._rule() if key == "rule" else self._literal()

    def _literal(self) -> Literal:
        kind, text = self._tokens[0]
        if kind not in ("number", "string", "name"):
            raise self._unexpected("a value")
        self._tokens.pop(0)
        if kind == "number":
            return int(text) if text.lstrip("+-").isdigit() else float(text)
        if kind == "string":
            return str(ast.literal_eval(text))
        return text.lower() == "true" if text.lower() in ("true", "false") else text

    def _take(self, mark: str) -> bool:
        if self._tokens[0] != ("mark", mark):
            return False
        self._tokens.pop(0)
        return True

    def _unexpected(self, expected: str) -> UsageError:
        found = repr(self._tokens[0][1]) if self._tokens[0][0] != "end" else "the end"
        return UsageError(f"cannot read the rule {self._text!r}: expected {expected}, found {found}")


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    position = 0
    while True:
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            raise UsageError(f"cannot read the rule {text!r} from {text[position:].strip()!r} on")
        yield match.lastgroup, match[match.lastgroup]
        if match.lastgroup == "end":
            return
        position = match.end()
