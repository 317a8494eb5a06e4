"""The trainer's side of a secure sum: its secrets, and an answer to each stage, from what lies on the disk.

With an update a session begins: its secrets and the update are in one file, written before anybody has the keys. A
process that is killed and started again answers the next stage from there. What the server asks in a stage is kept too,
on the disk before the answer leaves. The same stage may be asked again with the same content, and never with another: a
second list of survivors would let the server take both masks off one update.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import to_builtins

from fedsplit.disk.files import make_private_directory, remove, wait_for_space, write_chunks
from fedsplit.errors import CheckpointError, FedSplitError, OutOfRangeError, RecordError, UsageError
from fedsplit.exchange.records import TaskRecord
from fedsplit.secure import messages, protocol
from fedsplit.secure.protocol import Group, Secrets
from fedsplit.secure.vector import to_fixed, weighted
from fedsplit.states.extra import join, separate
from fedsplit.states.local_keys import IsOfType
from fedsplit.states.state_dict import StateDict, encode, map_file, named

_SESSION = "session.safetensors"


@dataclass(frozen=True, kw_only=True)
class _Session:
    """An update on its way into a sum: its secrets, its change in steps, and the entries that are not summed."""

    secrets: Secrets
    weight: int
    fixed: Any
    plain: StateDict


class SecureSteps:
    """Keeps the session of a rank in a directory, and answers the stages of its round."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._directory, self._rank = directory, rank

    def check_nothing_is_open(self, record: TaskRecord, sent: StateDict, is_of_type: IsOfType) -> None:
        """Raise UsageError if anything of an update would reach the server openly."""
        hidden = messages.ranges_of(sent, record.split, record.secure, is_of_type) if record.secure else {}
        if openly := [name for name in sent if name not in hidden]:
            raise UsageError(
                f"the server asks for {named(openly)} openly, and this trainer was started to send updates into secure "
                "sums only; the server's rules must be secure(…), or local, for every entry"
            )

    def begin(
        self, record: TaskRecord, update: StateDict, start: StateDict, weight: int, is_of_type: IsOfType
    ) -> StateDict:
        """Begin a session with an update that was trained from ``start``; returns what is sent first, the keys.

        Raises UsageError, naming the entry, for a change that is beyond the range of its part.
        """
        if record.secure is None or weight < 1:
            raise UsageError(f"an update of {weight} examples cannot be summed: its weight must be at least 1")
        ranges = messages.ranges_of(update, record.split, record.secure, is_of_type)
        fixed = [_change(name, update[name], start.get(name), most) for name, most in ranges.items()]
        secrets = Secrets.new()
        plain = {name: tensor for name, tensor in update.items() if name not in ranges}
        about = json.dumps(_about(record)).encode()
        own = {
            "about": _bytes(about), "secrets": _bytes(secrets.channel + secrets.mask + secrets.own),
            "weight": torch.tensor(weight), "fixed": torch.from_numpy(np.concatenate([np.zeros(0, np.int32), *fixed])),
        }  # fmt: skip
        make_private_directory(self._directory, CheckpointError)
        wait_for_space(lambda: write_chunks(self._directory / _SESSION, encode(join(plain, own))))
        return messages.rows({self._rank: messages.to_row(secrets.advert(weight))})

    def forget(self) -> None:
        """End the session: what it was asked is kept for as long as its secrets are there to answer it."""
        remove(self._directory / _SESSION)
        shutil.rmtree(self._directory, ignore_errors=True)

    def answer(self, record: TaskRecord, question: StateDict) -> StateDict:
        """Return the answer to a stage; raises RecordError if none must be given."""
        session = self._read(record)
        step = record.step or 0
        self._commit(session, step, question)
        group = self._group(record, session)
        if step == 1:
            return messages.rows(protocol.deal(session.secrets, self._rank, group))
        boxes = messages.read_rows(self._committed(session, 2), messages.LENGTHS[1])
        if step == 2:
            words = weighted(session.fixed, session.weight, group.weight)
            protocol.mask(session.secrets, self._rank, group, list(boxes), words)
            return join(session.plain, {messages.MASKED: torch.from_numpy(words.view(np.int32))})
        survivors = messages.read_rows(self._committed(session, 3), 1)
        return messages.rows(protocol.reveal(session.secrets, self._rank, group, boxes, list(survivors)))

    def _group(self, record: TaskRecord, session: _Session) -> Group:
        keys = messages.read_rows(self._committed(session, 1), messages.LENGTHS[0])
        if record.secure is None or keys.get(self._rank) != messages.to_row(session.secrets.advert(session.weight)):
            raise RecordError("the server gave other keys or another weight for this rank than it had sent")
        return messages.group_of(record.run_id, record.server_round, record.secure, keys)

    def _read(self, record: TaskRecord) -> _Session:
        try:
            plain, own = separate(map_file(self._directory / _SESSION))
        except (FedSplitError, OSError) as exc:
            raise RecordError(f"the secrets of this round are not here: {exc}") from exc
        if json.loads(bytes(own["about"].numpy())) != _about(record):
            raise RecordError("the secrets that are here are of another round, or of other terms")
        channel, mask, seed = (bytes(part) for part in own["secrets"].numpy().reshape(3, protocol.KEY_BYTES))
        secrets = Secrets(channel=channel, mask=mask, own=seed)
        return _Session(secrets=secrets, weight=int(own["weight"]), fixed=own["fixed"].numpy(), plain=plain)

    def _commit(self, session: _Session, step: int, question: StateDict) -> None:
        """Note what a stage was asked with; raises RecordError if it was asked with something else before."""
        found = self._found(session, step)
        if found is None:
            path, own = self._path(step), {"session": _bytes(protocol.public_key(session.secrets.mask))}
            wait_for_space(lambda: write_chunks(path, encode(join(question, own)), durable=True))
        elif found.keys() != question.keys() or not all(torch.equal(found[name], question[name]) for name in found):
            raise RecordError(f"the server asked for stage {step} again, with something else than before: refused")

    def _committed(self, session: _Session, step: int) -> StateDict:
        found = self._found(session, step)
        if found is None:
            raise RecordError(f"the server left out stage {step}")
        return found

    def _found(self, session: _Session, step: int) -> StateDict | None:
        """Return what a stage of this session was asked with; None if it was not, or that was an earlier session."""
        if not self._path(step).exists():
            return None
        question, own = separate(map_file(self._path(step)))
        return question if bytes(own["session"].numpy()) == protocol.public_key(session.secrets.mask) else None

    def _path(self, step: int) -> Path:
        return self._directory / f"stage-{step}.safetensors"


def _about(record: TaskRecord) -> list[Any]:
    return [record.run_id, record.server_round, to_builtins(record.secure)]


def _bytes(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _change(name: str, end: torch.Tensor, start: torch.Tensor | None, most: float) -> Any:
    """Return how far an entry has moved, in steps."""
    if start is None or start.shape != end.shape or not end.is_floating_point():
        raise UsageError(f"{name!r} cannot be summed: expected floating point entries of the shape that was received")
    change = (end.detach().cpu().double() - start.double()).reshape(-1).numpy()
    # Also where it is NaN or infinite.
    if change.size and not (furthest := float(np.abs(change).max())) <= most:
        raise OutOfRangeError(
            f"{name!r} moved by {furthest:.6g} in this round, beyond the range of {most:g} of its secure rule: nothing "
            "is clipped, so nothing of it is summed; give the rule a larger range, or train in smaller steps"
        )
    return to_fixed(change, most)
