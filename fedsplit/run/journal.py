"""The order of merges of an asynchronous run: ``journal.jsonl``, one line a merge, on the disk before the merge counts.

A line: ``{"round": 7, "state": digest, "asked": {"2": {"digest": …, "config": {}}}, "updates": {"1": {"base_round": 5,
"digest": …}}, "refused": {"3": 4}}``. ``state`` is the state after the merge. ``asked`` are the ranks that began to
train from the state before it, with the digest of what they were given; ``updates`` are what was merged, by rank, with
the round whose state the update started from and its own digest; ``refused`` the ranks whose training came to nothing,
with that round. Line 0 has only the first state.
"""

import json
from pathlib import Path
from typing import Any

from fedsplit.disk import files

Entry = dict[str, Any]


class Journal:
    """The lines of a run, in memory and in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = read_journal(path)

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
    """Return the lines of a journal, up to the first that a dying process left unfinished; none without a file."""
    entries: list[Entry] = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries
