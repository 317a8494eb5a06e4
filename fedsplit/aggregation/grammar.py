"""Reads ``name`` or ``name(key=value, …)``: one rule of `--aggregate`, or the class of `--strategy`.

The syntax is that of a Python call, read by Python's own parser. Three things are added: a name may contain hyphens
and a colon (``trimmed-mean``, ``package.module:function``), ``true`` and ``false`` may be written in lower case, and a
value that is a plain word need not be quoted. The first argument may be a rule: ``dp(fedavg, clip=1.0)``.
"""

from __future__ import annotations

import ast
import re
from typing import NamedTuple, NoReturn

from fedsplit.errors import UsageError

Literal = bool | int | float | str

_SHAPE = "expected name or name(key=value, …)"
# Strings are matched so that nothing inside them is taken for a name.
_STRING_OR_NAME = re.compile(
    r"""'(?:[^'\\]|\\.)*' | "(?:[^"\\]|\\.)*" | (?<![\w.])[A-Za-z_][\w.]*(?:[:-][A-Za-z_][\w.]*)+""", re.VERBOSE
)
# Letters to Python, so that a name with these marks is one identifier; as long as what they stand for, so that the
# positions in messages are right.
_TO_LETTERS = str.maketrans({"-": "\ua7f7", ":": "\u02d0"})
_FROM_LETTERS = str.maketrans({"\ua7f7": "-", "\u02d0": ":"})


class Call(NamedTuple):
    """A name, its parameters, and the rule inside: the first argument, or the parameter ``rule``."""

    name: str
    params: dict[str, Literal]
    rule: Call | None = None


def literal_text(value: Literal) -> str:
    """Return the text that is read as this value."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def parse_call(text: str) -> Call:
    """Read one rule or class; raises UsageError that says what was expected, what was found and where."""
    source = _STRING_OR_NAME.sub(lambda m: m[0] if m[0][0] in "'\"" else m[0].translate(_TO_LETTERS), text.strip())
    try:
        return _Reader(text, source).call(ast.parse(source, mode="eval").body)
    except UsageError:
        raise
    except SyntaxError as exc:
        # Nothing but blanks has no line to show.
        rest = (exc.text or "")[(exc.offset or 1) - 1 :].strip()
        problem = f"{exc.msg} at {rest!r}" if rest else exc.msg if source else "found nothing"
        raise UsageError(f"cannot read {text!r}: {problem}; {_SHAPE}".translate(_FROM_LETTERS)) from exc
    except (ValueError, MemoryError, RecursionError) as exc:
        raise UsageError(f"cannot read {text!r}: {str(exc) or 'it is nested too deeply'}; {_SHAPE}") from exc


class _Reader:
    """Turns the tree of one text into a `Call`."""

    def __init__(self, text: str, source: str) -> None:
        self._text = text
        self._source = source

    def call(self, node: ast.expr) -> Call:
        name = _name(node)
        if name is None:
            self._refuse(node, "name or name(key=value, …)")
        params: dict[str, Literal] = {}
        rule: Call | None = None
        if not isinstance(node, ast.Call):
            return Call(name, params)
        for argument in node.args:
            if rule or _name(argument) is None:
                self._refuse(argument, "key=value")
            rule = self.call(argument)
        for keyword in node.keywords:
            if keyword.arg is None:
                self._refuse(keyword.value, "key=value")
            key = keyword.arg.translate(_FROM_LETTERS)
            if key in params or (key == "rule" and rule):
                raise UsageError(f"cannot read {self._text!r}: {key!r} is given twice")
            if key == "rule":
                rule = self.call(keyword.value)
            else:
                params[key] = self._literal(key, keyword.value)
        return Call(name, params, rule)

    def _literal(self, key: str, node: ast.expr) -> Literal:
        word = _word(node)
        if word is not None:
            return word.lower() == "true" if word.lower() in ("true", "false") else word
        try:
            value = ast.literal_eval(node)
        except ValueError:
            value = None
        if not isinstance(value, bool | int | float | str):
            self._refuse(node, f"a number, true, false, a word or quoted text for {key}")
        return value

    def _refuse(self, node: ast.expr, expected: str) -> NoReturn:
        found = (ast.get_source_segment(self._source, node) or "").translate(_FROM_LETTERS)
        raise UsageError(f"cannot read {self._text!r}: expected {expected}, found {found!r}")


def _name(node: ast.expr) -> str | None:
    return _word(node.func if isinstance(node, ast.Call) else node)


def _word(node: ast.expr) -> str | None:
    """Return a name, dotted or not, or None for anything else."""
    text = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
    return text.translate(_FROM_LETTERS) if all(map(str.isidentifier, text.split("."))) else None
