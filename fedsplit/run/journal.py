"""The order of merges of an asynchronous run: ``journal.jsonl``, one line a merge, on the disk before the merge counts.

A line: ``{"round": 7, "state": digest, "asked": {"2": {"digest": …, "config": {}}}, "updates": {"1": {"base_round": 5,
"digest": …}}, "refused": {"3": 4}}``. ``state`` is the state after the merge. ``asked`` are the ranks that began to
train from the state before it, with the digest of what they were given; ``updates`` are what was merged, by rank, with
the round whose state the update started from and its own digest; ``refused`` the ranks whose training came to nothing,
with that round; ``num_ranks`` is how many ranks there were. Line 0 has only the first state.
"""

import json
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta, ValidationError, convert

from fedsplit.disk import files
from fedsplit.run.history import keep_if_damaged

Entry = dict[str, Any]
Rank = Annotated[str, Meta(pattern="^[0-9]{1,9}$")]


class _Given(TypedDict):
    digest: str
    config: dict[str, Any]


class _Merged(TypedDict):
    base_round: int
    digest: str


class _Line(TypedDict):
    round: int
    state: str
    asked: NotRequired[dict[Rank, _Given]]
    updates: NotRequired[dict[Rank, _Merged]]
    refused: NotRequired[dict[Rank, int]]
    num_ranks: NotRequired[int]


class Journal:
    """The lines of a run, in memory and in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = read_journal(path)
        keep_if_damaged(path, len(self.entries))

    def append(self, entry: Entry) -> None:
        """Add a merge, durably."""
        files.append_line(self.path, json.dumps(entry))
        files.sync(self.path)
        self.entries.append(entry)

    def keep_up_to(self, server_round: int) -> None:
        """Drop the merges after a round: their checkpoint never came to be, so nobody trained from them."""
        self.entries = [entry for entry in self.entries if entry["round"] <= server_round]
        files.write_chunks(self.path, [(json.dumps(entry) + "\n").encode() for entry in self.entries], durable=True)

    def at_work(self) -> dict[int, tuple[int, Entry]]:
        """Return the ranks that were training when the last merge was written: base round, and what they were given."""
        found: dict[int, tuple[int, Entry]] = {}
        for entry in self.entries:
            for rank, given in entry.get("asked", {}).items():
                found[int(rank)] = (entry["round"] - 1, given)
            for rank in (*entry.get("updates", {}), *entry.get("refused", {})):
                found.pop(int(rank), None)
        return found


def read_journal(path: Path) -> list[Entry]:
    """Return the lines of a journal, up to the first that cannot be read; none without a file.

    The last may be one that a dying process left unfinished. What stands after another one says nothing without it.
    """
    entries: list[Entry] = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            convert(entry, _Line)
        except (ValueError, RecursionError, ValidationError):
            break
        entries.append(entry)
    return entries
