"""Options of a workload, read by name and type. An option is known once it has been read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fedsplit.errors import UsageError


class OptionReader:
    """Reads ``key=value`` options; what cannot be understood is a `UsageError` that says why.

    Parameters
    ----------
    options : Mapping[str, object]
        Values are str when they come from a command line, and bool, int, float or str from a server.
    source : str
        What a message calls the place where an option was given.

    Examples
    --------
    >>> reader = OptionReader({"epochs": "2"})
    >>> reader.integer("epochs", default=1), reader.number("lr", default=0.1)
    (2, 0.1)
    >>> reader.finish()
    """

    def __init__(self, options: Mapping[str, object], *, source: str = "--workload-option") -> None:
        self._options = options
        self._source = source
        self._known: set[str] = set()

    def integer(self, name: str, *, default: int) -> int:
        """Read a whole number of at least 1."""
        value = self._get(name)
        if value is None:
            return default
        number = _as_float(value)
        if number is None or not number.is_integer() or number < 1:
            raise self._error(name, "a whole number of at least 1", value)
        return int(number)

    def number(self, name: str, *, default: float, above: float | None = None, below: float = math.inf) -> float:
        """Read a finite number of at least 0, or greater than `above`, and less than `below`."""
        value = self._get(name)
        if value is None:
            return default
        number = _as_float(value)
        if number is None or not 0 <= number < below or (above is not None and number <= above):
            lower = "at least 0" if above is None else f"more than {above:g}"
            upper = "" if math.isinf(below) else f" and less than {below:g}"
            raise self._error(name, f"a number of {lower}{upper}", value)
        return number

    def choice(self, name: str, *, default: str, choices: Sequence[str]) -> str:
        """Read one of a few words."""
        value = self._get(name)
        if value is None:
            return default
        if value not in choices:
            raise self._error(name, f"one of {', '.join(choices)}", value)
        return str(value)

    def finish(self) -> None:
        """Refuse options that were given and never read."""
        unknown = sorted(set(self._options) - self._known)
        if unknown:
            known = ", ".join(sorted(self._known)) or "none"
            raise UsageError(f"{self._source}: this workload has no option {', '.join(unknown)}; it knows: {known}")

    def _get(self, name: str) -> object | None:
        self._known.add(name)
        return self._options.get(name)

    def _error(self, name: str, expected: str, found: object) -> UsageError:
        return UsageError(f"{self._source} {name}: expected {expected}, found {found!r}")


def _as_float(value: object) -> float | None:
    """Return the finite number that `value` is or spells, or None. A bool is not a number here."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
