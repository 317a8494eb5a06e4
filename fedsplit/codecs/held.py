"""The state that a trainer's tasks start from, kept so that the server need not send more than what has changed.

The server names it by the SHA-256 of the plain payload, and sends a packed one that differs from it. The trainer
unpacks it here, once, and looks whether the digest is the one that must come out. A trainer that does not hold the
state before says so, and is sent the whole.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedsplit.codecs.packed import Description, describe, in_parts, pack, unpack
from fedsplit.codecs.spec import parse_wire
from fedsplit.disk.payload_store import PayloadStore
from fedsplit.errors import RecordError
from fedsplit.states.extra import MOST_BYTES, MOST_STATES, separate
from fedsplit.states.state_dict import StateDict, check_travels, decode, encode, map_file

log = logging.getLogger("fedsplit")

# What of a part travels, and what it lacks: that is carried over to the next update.
Part = tuple[StateDict, StateDict]


class Held:
    """The newest state of a rank, in a directory of the trainer's; `digest` is None where no codec is asked for."""

    def __init__(self, directory: Path) -> None:
        self.digest: str | None = None
        self._store = PayloadStore(directory)
        # What this process wrote, or checked.
        self._checked = ""

    def take(self, path: Path, digest: str) -> bool:
        """Take up the payload of a task; returns False if it differs from a state that is not here."""
        self.digest, payload = None, map_file(path)
        try:
            found = describe(payload, str(path))
            self._store.open(keep={digest, *((found.base, found.state) if found else ())})
            if found:
                digest = found.state
            if found and not self._holds(digest):
                self._unpack(payload, found, str(path))
        except RecordError as exc:
            log.warning("%s; asking the server for the whole state", exc)
            return False
        if found is None and not self._holds(digest):
            self._store.give(path, digest)
        self._checked = self.digest = digest
        self._store.open(keep={digest})
        return True

    def state(self) -> StateDict:
        """Return the state, mapped; writing to it changes nothing elsewhere."""
        return decode(self._store.map(str(self.digest), own=True), "the state that is held")

    def pack(
        self, state: StateDict, wire: tuple[str, ...], carried: Callable[[], StateDict], part_bytes: float
    ) -> list[Callable[[], Part]]:
        """Return what packs the parts of an update, each of about so many bytes before."""
        if self.digest is None:
            return [lambda: (state, {})]
        for name, tensor in state.items():
            check_travels(name, tensor)
        base, residual = separate(self.state())[0], carried()
        codecs, digest, parts = parse_wire(wire), self.digest, in_parts(state, part_bytes)

        def packed(part: StateDict) -> Part:
            start = base if part.keys() == state.keys() else {name: base[name] for name in part if name in base}
            found = pack(part, codecs, base=start, digest=digest, carried=residual)
            return (found.entries(), found.residual) if found else (part, {})

        return [partial(packed, part) for part in parts]

    def _unpack(self, payload: StateDict, found: Description, where: str) -> None:
        if not self._holds(found.base):
            raise RecordError(f"{where}: the state that it differs from is not in {self._store.root}")
        base = decode(self._store.map(found.base, own=True))
        most = MOST_BYTES + MOST_STATES * sum(tensor.nbytes for tensor in base.values())
        state = unpack(payload, found, separate(base)[0], extra_bytes=most, where=where)
        if (made := self._store.put(encode(state)).digest) != found.state:
            raise RecordError(f"{where} makes a state with digest {made[:12]}…, expected {found.state[:12]}…")

    def _holds(self, digest: str) -> bool:
        """Tell whether a state is here with the right bytes."""
        if not digest or self._store.take(digest) is None:
            return False
        if digest != self._checked:
            try:
                self._store.map(digest)
            except RecordError as exc:
                log.warning("%s", exc)
                return False
            self._checked = digest
        return True
