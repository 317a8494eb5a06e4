"""A rank's side of a secure sum: its secrets, and an answer to each stage, from what lies on the disk.

With an update a session begins: its secrets and the change that is summed are in one file, written before anybody has
the keys. A process that is killed and started again answers the next stage from there. What the server asks in a stage
is kept too, on the disk before the answer leaves. The same stage may be asked again with the same content, and never
with another: a second list of survivors would let the server take both masks off one update.

`fedsplit.trainer.secure_steps` has this for the trainer's tensors, `fedsplit.client.masks` for a client's files.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import to_builtins

from fedsplit.disk.files import make_private_directory, map_regular, remove, write_chunks
from fedsplit.errors import CheckpointError, FedSplitError, OutOfRangeError, RecordError, UsageError
from fedsplit.exchange.records import Request
from fedsplit.secure import messages, protocol
from fedsplit.secure.protocol import Group, Secrets
from fedsplit.secure.vector import to_fixed, weighted
from fedsplit.states.arrays import Array, Arrays, encode
from fedsplit.states.header import PREFIX

# Of an entry that is summed: its name, how far it may move, where it is now, and where it was.
Moved = tuple[str, float, Array, Array | None]
# The length of what each stage is asked with, for each of some ranks.
_ASKED = {1: messages.LENGTHS[0], 2: messages.LENGTHS[1], 3: 1}


@dataclass(frozen=True, kw_only=True)
class _Session:
    """An update on its way into a sum: its secrets, and its change in steps."""

    secrets: Secrets
    weight: int
    fixed: Array


class Steps:
    """Keeps the session of a rank in a directory, and answers the stages of its round."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._directory, self._rank = directory, rank
        self._session_path = directory / "session.safetensors"

    def begin(self, request: Request, entries: Iterable[Moved], weight: int) -> dict[str, Array]:
        """Begin a session with an update, and end the one before; returns what is sent first, the keys.

        Raises UsageError, naming the entry, for a change that is beyond the range of its part.
        """
        if request.secure is None or weight < 1:
            raise UsageError(f"an update of {weight} examples cannot be summed: its weight must be at least 1")
        fixed = [_change(*entry) for entry in entries]
        secrets = Secrets.new()
        session = {
            "about": _bytes(json.dumps(_about(request)).encode()),
            "secrets": _bytes(secrets.channel + secrets.mask + secrets.own),
            "weight": np.array(weight, np.int64), "fixed": np.concatenate([np.zeros(0, np.int32), *fixed]),
        }  # fmt: skip
        self.forget()
        make_private_directory(self._directory, CheckpointError)
        write_chunks(self._session_path, encode(session))
        return messages.rows({self._rank: messages.to_row(secrets.advert(weight))})

    def forget(self) -> None:
        """End the session, and remove all of it; the directory and locks in it stay."""
        # The secrets first: a process that is killed here must not have them without what was asked.
        remove(self._session_path)
        for path in self._directory.glob("*"):
            if path.suffix != ".lock":
                remove(path)

    def is_unasked(self, request: Request) -> bool:
        """Tell whether a session of this round, on these terms, is here, and nothing was asked of it yet."""
        try:
            return self._found(self._read(request), 1) is None
        except RecordError:
            return False

    def ask(self, request: Request, question: Mapping[str, Array]) -> None:
        """Note what a stage is asked with; raises RecordError if it was asked with something else before."""
        session, step = self._read(request), request.step or 0
        if step not in _ASKED:
            raise RecordError(f"a secure sum has no stage {step}")
        rows, found = messages.read_rows(question, _ASKED[step]), self._found(session, step)
        if found is None:
            own = {"session": _bytes(protocol.public_key(session.secrets.mask))}
            write_chunks(self._path(step), encode({**messages.rows(rows), **own}), durable=True)
        elif found != rows:
            raise RecordError(f"the server asked for stage {step} again, with something else than before: refused")

    def answer(self, request: Request) -> dict[str, Array]:
        """Return the answer to a stage that was asked; raises RecordError if none must be given."""
        session = self._read(request)
        group = self._group(request, session)
        if request.step == 1:
            return messages.rows(protocol.deal(session.secrets, self._rank, group))
        boxes = self._asked(session, 2)
        if request.step == 2:
            words = weighted(session.fixed, session.weight, group.weight)
            protocol.mask(session.secrets, self._rank, group, list(boxes), words)
            return {PREFIX + messages.MASKED: words.view(np.int32)}
        survivors = list(self._asked(session, 3))
        return messages.rows(protocol.reveal(session.secrets, self._rank, group, boxes, survivors))

    def _group(self, request: Request, session: _Session) -> Group:
        keys = self._asked(session, 1)
        own = messages.to_row(session.secrets.advert(session.weight))
        if request.secure is None or keys.get(self._rank) != own:
            raise RecordError("the server gave other keys or another weight for this rank than it had sent")
        return messages.group_of(request.run_id, request.server_round, request.secure, keys)

    def _read(self, request: Request) -> _Session:
        try:
            found = Arrays(map_regular(self._session_path), str(self._session_path))
        except (FedSplitError, OSError) as exc:
            raise RecordError(f"the secrets of this round are not here: {exc}") from exc
        if json.loads(bytes(found["about"])) != _about(request):
            raise RecordError("the secrets that are here are of another round, or of other terms")
        channel, mask, own = (bytes(part) for part in found["secrets"].reshape(3, protocol.KEY_BYTES))
        secrets = Secrets(channel=channel, mask=mask, own=own)
        return _Session(secrets=secrets, weight=int(found["weight"]), fixed=found["fixed"])

    def _asked(self, session: _Session, step: int) -> dict[int, bytes]:
        found = self._found(session, step)
        if found is None:
            raise RecordError(f"the server left out stage {step}")
        return found

    def _found(self, session: _Session, step: int) -> dict[int, bytes] | None:
        """Return what a stage of this session was asked with; None if it was not, or that was an earlier session."""
        path = self._path(step)
        if not path.exists():
            return None
        found = Arrays(map_regular(path), str(path))
        is_own = bytes(found["session"]) == protocol.public_key(session.secrets.mask)
        return messages.read_rows(found, _ASKED[step]) if is_own else None

    def _path(self, step: int) -> Path:
        return self._directory / f"stage-{step}.safetensors"


def _about(request: Request) -> list[Any]:
    return [request.run_id, request.server_round, to_builtins(request.secure)]


def _bytes(content: bytes) -> Array:
    return np.frombuffer(content, np.uint8)


def _change(name: str, most: float, end: Array, start: Array | None) -> Array:
    """Return how far an entry has moved, in steps."""
    if start is None or start.shape != end.shape or end.dtype.kind != "f":
        raise UsageError(f"{name!r} cannot be summed: expected floating point entries of the shape that was received")
    change = np.subtract(end, start, dtype=np.float64).reshape(-1)
    # Also where it is NaN or infinite.
    if change.size and not (furthest := float(np.abs(change).max())) <= most:
        raise OutOfRangeError(
            f"{name!r} moved by {furthest:.6g} in this round, beyond the range of {most:g} of its secure rule: nothing "
            "is clipped, so nothing of it is summed; give the rule a larger range, or train in smaller steps"
        )
    return to_fixed(change, most)
