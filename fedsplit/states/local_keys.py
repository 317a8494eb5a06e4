"""Which rule takes which entry of a state_dict, and so which entries stay with their trainer. Free of torch.

Server and trainer both decide with this, so that they can never disagree.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TypeVar

T = TypeVar("T")


def first_match(name: str, choices: Iterable[tuple[str, T]]) -> T | None:
    """Return what belongs to the first glob that matches a key, or None; ``*`` matches dots too."""
    return next((choice for pattern, choice in choices if fnmatchcase(name, pattern)), None)


def is_local(name: str, split: Iterable[tuple[str, bool]]) -> bool:
    """Return whether a key stays with its trainer, given ``(pattern, local)`` in the order of the rules."""
    return first_match(name, split) or False
