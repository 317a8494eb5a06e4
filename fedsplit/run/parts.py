"""A row of the resolved split: what the server prints, notes in ``run.json`` and shows in its table."""

from __future__ import annotations

from typing import NamedTuple


class PartRow(NamedTuple):
    """A part of the model: its pattern, how many entries and bytes it has, and its rule."""

    part: str
    entries: int
    bytes: int
    rule: str
