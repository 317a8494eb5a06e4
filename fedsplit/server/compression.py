"""The server's side of ``--wire``: updates are read back, and ranks get what has changed since the last state.

Where a codec loses something, the next state is what the ranks can make of what they are sent. So the server, its
checkpoints and every rank have the same state; what it lacks of the merge is added to the next one. A rank that does
not hold the state before, or whose client takes payloads by reference, gets the whole, as ever.

Importing this module imports torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.codecs.packed import describe, pack, unpack
from fedsplit.codecs.spec import parse_wire
from fedsplit.disk.checkpoints import Checkpoint
from fedsplit.disk.files import Buffer
from fedsplit.disk.payload_store import PayloadStore, StoredPayload
from fedsplit.errors import MissingPackageError, RecordError, UsageError
from fedsplit.run.history import Line
from fedsplit.server.conversation import HEADER_BYTES
from fedsplit.server.state import GlobalState
from fedsplit.states.extra import separate
from fedsplit.states.header import PREFIX
from fedsplit.states.local_keys import first_match
from fedsplit.states.state_dict import StateDict, decode, encode, map_file

if TYPE_CHECKING:
    from fedsplit.server.round import Task

log = logging.getLogger("fedsplit")

_RESIDUAL, _SHORT = "residual.safetensors", "short.safetensors"


class Compression:
    """What `wire`, the values of the flag, say of a run's states and updates; without any, all is as it is."""

    def __init__(self, wire: tuple[str, ...], state: GlobalState, store: PayloadStore) -> None:
        # The digest of the state that each rank's trainer said it holds.
        self.holds: dict[int, str | None] = {}
        self._wire, self._state, self._store = wire, state, store
        self._residual = StateDict()
        # What has changed, the newest last: the checkpoint with the one before may still be under way. And the digests
        # of the states that the newest leads from and to; none if the state was not packed.
        self._shorts: list[StoredPayload] = []
        self._ends: tuple[str, ...] = ()

    def begin(self, resumed: Checkpoint | None, payload_store: str) -> None:
        """Say what is lost, and take up what was not sent yet; raises UsageError for a pattern without entries."""
        wire, entries = parse_wire(self._wire), self._state.entries
        taken = [first_match(name, ((pattern, pattern) for pattern, _ in wire)) for name in entries]
        for pattern, codec in wire:
            sizes = [entry.nbytes for entry, by in zip(entries.values(), taken, strict=True) if by == pattern]
            if not sizes and not pattern.startswith(PREFIX):
                raise UsageError(f"--wire {pattern}={codec}: no entry of the state is left for {pattern!r}")
            lost = f"{codec.loses}, and sent later" if codec.loses else "nothing is lost"
            log.info("wire: %s: %d entries, %s bytes, %s: %s", pattern, len(sizes), f"{sum(sizes):,}", codec, lost)
        if wire and payload_store != "none":
            log.info("wire: clients that see the payload store get and give states as files, which no codec changes")
        if resumed and _RESIDUAL in resumed.files:
            self._residual = map_file(resumed.path(_RESIDUAL))
        if wire and resumed and _SHORT in resumed.files:
            # Whoever trains from it must not begin anew.
            self._note_short(self._store.give(resumed.path(_SHORT), resumed.files[_SHORT]))

    def files(self) -> dict[str, list[Buffer] | Path]:
        """Return what belongs into the checkpoint."""
        found: dict[str, list[Buffer] | Path] = {_RESIDUAL: encode(self._residual)} if self._residual else {}
        return found | ({_SHORT: self._shorts[-1].path} if self._ends else {})

    def put(self, merged: StateDict, tasks: Sequence[Task]) -> None:
        """Make what was merged of these tasks the state, as far as it can be sent."""
        before, packed = self._state.payload.digest, None
        # On one machine nothing travels, and nothing need be lost.
        if self._wire and any(task.reply.payload and task.reply.payload.via != "store" for task in tasks):
            down = [(pattern, codec.down) for pattern, codec in parse_wire(self._wire)]
            packed = pack(merged, down, base=self._state.entries, digest=before, carried=self._residual)
        self._state.put(encode(packed.state if packed else merged))
        self._ends = ()
        if packed:
            self._residual = packed.residual
            self._note_short(self._store.put(encode(packed.entries(self._state.payload.digest))))
        for past in self._shorts[:-2]:
            self._state.drop({past.digest} - {short.digest for short in self._shorts[-2:]})
        del self._shorts[:-2]

    def short(self, payload: StoredPayload) -> StoredPayload | None:
        """Return what has changed since the last state, if what a rank is to be given is the state itself."""
        return self._shorts[-1] if self._ends and payload.digest == self._state.payload.digest else None

    def can_unpack(self, rank: int) -> bool:
        """Tell whether a rank said that it holds what that differs from."""
        return self.holds.get(rank) in self._ends

    def reader(self, task: Task) -> Callable[[Any, str], StateDict]:
        """Return what reads the update of a task, packed or not; it raises RecordError."""

        def read(content: Any, where: str) -> StateDict:
            entries = decode(content, where)
            if (found := describe(entries, where)) is None:
                return entries
            if found.base != task.state.digest:
                raise RecordError(f"{where} differs from the state {found.base[:12]}…, it was given another one")
            start, _ = separate(decode(self._store.map(found.base, own=True)))
            try:
                state = unpack(entries, found, start, extra_bytes=task.extra_bytes + HEADER_BYTES, where=where)
            except MissingPackageError as exc:
                # A run that did not ask for it must not end by it.
                raise RecordError(f"{where}: {exc}") from exc
            task.plain_bytes += sum(tensor.nbytes for tensor in state.values())
            return state

        return read

    def _note_short(self, short: StoredPayload) -> None:
        found = describe(map_file(short.path), str(short.path))
        if found and short.bytes < self._state.payload.bytes:
            self._ends = (found.base, found.state)
        self._shorts.append(short)

    def note(self, line: Line, tasks: Sequence[Task]) -> None:
        """Note in a round's line how many bytes states and updates of these tasks were, and would be as they are."""
        if not self._wire:
            return
        sums = line.setdefault("wire", dict.fromkeys(("sent", "sent_plain", "received", "received_plain"), 0))
        for task in tasks:
            sums["sent"] += task.sent_bytes
            sums["sent_plain"] += task.state.bytes if task.sent_bytes else 0
            sums["received"] += task.update_bytes
            sums["received_plain"] += task.plain_bytes or task.update_bytes
