"""Which entries of a state_dict a pattern means; shared by the server's rules and the trainer, and free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase


def first_match(name: str, patterns: Sequence[str]) -> int | None:
    """Return the index of the first glob that matches a key, or None."""
    return next((index for index, pattern in enumerate(patterns) if fnmatchcase(name, pattern)), None)


def is_local(name: str, split: Sequence[tuple[str, bool]]) -> bool:
    """Tell whether a key stays with its trainer, given ``(pattern, local)`` in the order of the rules."""
    index = first_match(name, [pattern for pattern, _ in split])
    return index is not None and split[index][1]
