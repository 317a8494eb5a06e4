"""Which rule takes which entry of a state_dict, and so which entries stay with their trainer. Free of torch.

Server and trainer both decide with this, so that they can never disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase


def first_match(name: str, patterns: Sequence[str]) -> int | None:
    """Return the index of the first glob that matches a key, or None; ``*`` matches dots too."""
    return next((index for index, pattern in enumerate(patterns) if fnmatchcase(name, pattern)), None)


def is_local(name: str, split: Sequence[tuple[str, bool]]) -> bool:
    """Return whether a key stays with its trainer, given ``(pattern, local)`` in the order of the rules."""
    index = first_match(name, [pattern for pattern, _ in split])
    return index is not None and split[index][1]
