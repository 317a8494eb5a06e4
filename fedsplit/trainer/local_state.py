"""What a trainer keeps from round to round: what its script asked to keep, and the entries that stay at home.

Each round that was trained is kept as a checkpoint, so that a trainer which was killed, or a server which goes back a
few rounds, continues from the state that belongs to the round before.
"""

import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedsplit.disk.checkpoints import BackgroundWriter, Checkpoint, CheckpointStore
from fedsplit.disk.files import make_private_directory, wait_for_space, write_chunks
from fedsplit.errors import CheckpointError, UsageError
from fedsplit.exchange.records import TaskRecord
from fedsplit.states.state_dict import ModelSource, StateDict, encode, map_file, own_state
from fedsplit.trainer.channel import Channel
from fedsplit.trainer.keep import from_plain, to_plain

log = logging.getLogger("fedsplit")

# A server that finds its newest checkpoints damaged goes back up to its --keep-checkpoints (3) rounds. The trainer must
# still have the round before those, and may itself be one round ahead.
KEEP_ROUNDS = 5
_LOCAL_STATE = "local_state.pt"
_LOCAL_PART = "local.safetensors"
_RESIDUAL = "residual.safetensors"


@dataclass(frozen=True, kw_only=True)
class Base:
    """The round that a task continues from."""

    # None at the start of a run.
    checkpoint: Checkpoint | None
    # Whether it has to be read: the process is not itself at the end of that round.
    restore: bool

    def load_local_state(self) -> Any:
        """Return what the script asked to keep, or None."""
        path = self._path(_LOCAL_STATE)
        return None if path is None else from_plain(torch.load(path, weights_only=True, map_location="cpu"))

    def load_local_part(self) -> StateDict | None:
        """Return the entries of the state_dict that stayed at home, or None if none are kept."""
        path = self._path(_LOCAL_PART)
        return None if path is None else map_file(path)

    def load_residual(self) -> StateDict:
        """Return what the answer of that round lacked, as it travelled in fewer bytes."""
        path = self._path(_RESIDUAL)
        return {} if path is None else map_file(path)

    def _path(self, name: str) -> Path | None:
        return self.checkpoint.path(name) if self.checkpoint and name in self.checkpoint.files else None


class LocalStates:
    """The local states of one rank: process 0 keeps its own in the rank's directory, each other process one below."""

    def __init__(self, directory: Path, channel: Channel, model: ModelSource | None, *, reset: bool) -> None:
        self._first_store = self._store = CheckpointStore(directory, keep=KEEP_ROUNDS)
        if channel.process:
            self._store = CheckpointStore(directory / f"process-{channel.process}", keep=KEEP_ROUNDS)
        self._channel, self._model, self._reset = channel, model, reset
        self._has_snapshot = isinstance(model, torch.nn.Module | Mapping)
        self._initial_path = self._store.directory / "initial.safetensors"
        self._writer = BackgroundWriter()
        self._run_id: str | None = None
        # Where this process is: at the end of (run, round), (None, 0) when it is new, None in the middle of a round.
        self._position: tuple[str | None, int] | None = (None, 0)

    def open(self) -> None:
        """Make the directory, and note the state that the model has now."""
        make_private_directory(self._store.directory, CheckpointError)
        if self._has_snapshot:
            # Training changes the model in place; a later run must start from what it was.
            write_chunks(self._initial_path, encode(own_state(self._model)))  # type: ignore[arg-type]

    def close(self) -> None:
        """Wait until everything is written."""
        self._writer.close()

    def initial(self) -> torch.nn.Module | Mapping[str, torch.Tensor]:
        """Return the state that the model had at the start, or what the function makes; empty without a model."""
        if self._has_snapshot:
            return map_file(self._initial_path)
        return self._model() if callable(self._model) else {}

    def begin(self, record: TaskRecord) -> Base:
        """Find the round that a task continues from; raises CheckpointError if its local state is no longer kept."""
        if record.run_id != self._run_id:
            self._store.begin_run(record.run_id)
            self._run_id = record.run_id
        # An evaluation belongs to the round that was just trained.
        checkpoint = self._find(record.run_id, before=record.server_round + (record.kind == "evaluate"))
        if checkpoint is None and not self._reset:
            # Do not start afresh in a run whose earlier local states were removed to save space.
            rounds = self._store.rounds()
            if rounds and self._store.read(rounds[0], verify=False).info.get("base") is not None:
                raise CheckpointError(
                    f"the server asks for round {record.server_round}, but the local states in {self._store.directory} "
                    f"begin with round {rounds[0]}; resume the server from a later round, or start with --state reset"
                )
        restore = self._position != ((record.run_id, checkpoint.server_round) if checkpoint else (None, 0))
        if record.kind == "train" or restore:
            self._position = None
        return Base(checkpoint=checkpoint, restore=restore or self._reset)

    def save(
        self, record: TaskRecord, base: Base, local_part: StateDict, local_state: Any, residual: StateDict
    ) -> bool:
        """Keep what belongs to a round, if it was trained; returns False if there is nothing to keep.

        It is kept before the result is offered: whoever sees the result can rely on the state that made it.
        """
        if record.kind != "train":
            return False
        files: dict[str, Any] = {}
        if local_state is not None:
            files[_LOCAL_STATE] = [_dump(local_state)]
        if local_part:
            files[_LOCAL_PART] = encode(local_part)
        if residual:
            files[_RESIDUAL] = encode(residual)
        # Several processes save each round or none, even if only one of them has something to keep.
        if not files and not self._store.rounds() and self._channel.processes == 1:
            return False
        self._writer.wait()
        for later in self._store.rounds():
            if later > record.server_round:  # the server went back: these rounds are trained again
                self._store.remove(later)
        before = base.checkpoint.server_round if base.checkpoint else None
        wait_for_space(
            lambda: self._store.save(
                run_id=record.run_id, server_round=record.server_round, files=files, durable=False,
                info={"base": before, "processes": self._channel.processes},
            )
        )  # fmt: skip
        self._store.prune()
        return True

    def settle(self, record: TaskRecord, *, saved: bool, accepted: bool) -> None:
        """Note whether the result of a round was accepted: only then does the next round continue from it."""
        if accepted and record.kind == "train":
            self._position = (record.run_id, record.server_round)
        if saved and accepted:
            self._writer.submit(lambda: self._store.flush(record.server_round))
        elif saved:
            self._store.remove(record.server_round)

    def _find(self, run_id: str, before: int) -> Checkpoint | None:
        """Return the newest round before a round: process 0 chooses it, and each process reads its own state of it."""
        found = self._store.newest(run_id=run_id, before=before, verify=False)
        if found and self._position != (run_id, found.server_round):
            # This process did not write it a moment ago, so its bytes are checked.
            found = self._store.newest(run_id=run_id, before=before)
        chosen = self._channel.share(found.server_round if found else -1)
        saved_by = self._channel.share(found.info.get("processes", 1) if found else 0)
        if chosen >= 0 and saved_by != self._channel.processes:
            log.warning(
                "the local state of round %d was saved by %d processes, now there are %d: each takes that of process 0",
                chosen, saved_by, self._channel.processes,
            )  # fmt: skip
        if self._channel.process == 0:
            return found
        if chosen < 0:
            return None
        return (self._store if saved_by == self._channel.processes else self._first_store).read(chosen)


def _dump(local_state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(to_plain(local_state), buffer)
    buffer.seek(0)
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(buffer):  # type: ignore[arg-type]
        raise UsageError(
            f"local_state holds {', '.join(sorted(map(str, unsafe)))}, which cannot be read back safely; "
            "use tensors, arrays, numbers, strings, generators, and lists, tuples and dicts of these"
        )
    return buffer.getvalue()
