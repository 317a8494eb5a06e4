"""Which rule takes which entry of a state_dict, and so which entries stay with their trainer. Free of torch.

A pattern is a glob over keys or, as ``<BatchNorm*>``, over the types of the modules that an entry is in. Server and
trainer both decide with this, so that they can never disagree.
"""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import TypeVar

T = TypeVar("T")
# Tells whether an entry is in a module of a type that a glob matches.
IsOfType = Callable[[str, str], bool]
_SHOWN_KEYS = 3


def first_match(
    name: str, choices: Iterable[tuple[str, T]], is_of_type: IsOfType = lambda name, glob: False
) -> T | None:
    """Return what belongs to the first pattern that matches a key, or None; ``*`` matches dots too."""
    for pattern, choice in choices:
        glob = type_glob(pattern)
        if fnmatchcase(name, pattern) if glob is None else is_of_type(name, glob):
            return choice
    return None


def is_local(name: str, split: Iterable[tuple[str, bool]], is_of_type: IsOfType = lambda name, glob: False) -> bool:
    """Return whether a key stays with its trainer, given ``(pattern, local)`` in the order of the rules."""
    return first_match(name, split, is_of_type) or False


def type_glob(pattern: str) -> str | None:
    """Return the glob over types in ``<BatchNorm*>``; None for a pattern over keys."""
    return pattern[1:-1] if pattern.startswith("<") and pattern.endswith(">") else None


def named(names: Iterable[str]) -> str:
    """Return the first few names for a message, and how many more there are; empty if there are none."""
    known = list(names)
    more = f" and {len(known) - _SHOWN_KEYS} more" if len(known) > _SHOWN_KEYS else ""
    return ", ".join(map(repr, known[:_SHOWN_KEYS])) + more
