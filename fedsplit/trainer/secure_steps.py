"""The trainer's side of a secure sum, in tensors: `fedsplit.secure.steps`, and the entries that are not summed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from fedsplit.disk.files import wait_for_space, write_chunks
from fedsplit.exchange.records import TaskRecord
from fedsplit.secure import messages
from fedsplit.secure.steps import Moved, Steps
from fedsplit.states.arrays import Array
from fedsplit.states.extra import join
from fedsplit.states.local_keys import IsOfType
from fedsplit.states.state_dict import StateDict, encode, map_file


class SecureSteps:
    """Keeps the update of a rank in a directory, and answers the stages of its round."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._steps = Steps(directory, rank)
        self.forget = self._steps.forget
        # The entries with other rules; they travel beside the masked vector.
        self._open_path = directory / "open.safetensors"

    def check_nothing_is_open(self, names: Iterable[str], record: TaskRecord, is_of_type: IsOfType) -> None:
        """Raise UsageError if any of these entries of an update would reach the server openly."""
        messages.check_nothing_is_open(names, record, "this trainer", is_of_type)

    def begin(
        self, record: TaskRecord, update: StateDict, start: StateDict, weight: int, is_of_type: IsOfType
    ) -> StateDict:
        """Begin a session with an update that was trained from ``start``; returns what is sent first, the keys.

        Raises UsageError, naming the entry, for a change that is beyond the range of its part.
        """
        ranges = messages.ranges_of(update, record.split, record.secure, is_of_type) if record.secure else {}

        def moved() -> Iterator[Moved]:
            for name, most in ranges.items():
                yield name, most, _array(update[name]), _array(start[name]) if name in start else None

        keys = wait_for_space(lambda: self._steps.begin(record, moved(), weight))
        # Nobody has the keys before this is there too.
        openly = join({name: tensor for name, tensor in update.items() if name not in ranges}, {})
        wait_for_space(lambda: write_chunks(self._open_path, encode(openly)))
        return _tensors(keys)

    def answer(self, record: TaskRecord, question: StateDict) -> StateDict:
        """Return the answer to a stage; raises RecordError if none must be given."""
        asked = {name: each.numpy() for name, each in question.items() if each.dtype in (torch.int64, torch.uint8)}
        wait_for_space(lambda: self._steps.ask(record, asked))
        found = _tensors(self._steps.answer(record))
        return {**map_file(self._open_path), **found} if record.step == 2 else found


def _array(tensor: torch.Tensor) -> Array:
    plain = tensor.detach().cpu()
    found: Array = (plain.double() if plain.is_floating_point() else plain).numpy()
    return found


def _tensors(arrays: dict[str, Array]) -> StateDict:
    return {name: torch.from_numpy(each if each.flags.writeable else each.copy()) for name, each in arrays.items()}
