"""A run on the server's disk: how it begins or goes on there, what it notes, and every path of it.

docs/checkpoints.md shows what is in the directory. Besides, for the server alone: ``server.lock``, held for life (one
server a directory), and ``payloads/``, the payload store, of which nothing outlives the run.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from filelock import FileLock, Timeout

from fedsplit.disk import files
from fedsplit.disk.checkpoints import Checkpoint, CheckpointStore
from fedsplit.disk.payload_store import PayloadStore, StoredPayload
from fedsplit.disk.remote_store import without_password
from fedsplit.errors import CheckpointError, ExchangeError, FedSplitError
from fedsplit.run.history import History, PartRow
from fedsplit.run.journal import Journal

if TYPE_CHECKING:
    import torch

log = logging.getLogger("fedsplit")

HISTORY_FILE = "history.jsonl"
STATE_FILE = "state.safetensors"


class Places:
    """The paths in a checkpoint directory, which has ``server/`` and ``rank-<k>/`` in it."""

    def __init__(self, checkpoint_dir: Path) -> None:
        self.server = checkpoint_dir / "server"
        self.lock = self.server / "server.lock"
        self.run = self.server / "run.json"
        self.history = self.server / HISTORY_FILE
        self.journal = self.server / "journal.jsonl"
        self.payloads = self.server / "payloads"
        self.final_plot = self.server / "plot.png"
        self.old_runs = self.server / "old-runs"
        self.logs = checkpoint_dir / "logs"
        self.exchange = checkpoint_dir / "exchange"
        self.settings = checkpoint_dir / "settings.json"


class Run:
    """The server's directory, opened to begin a run or to go on with one.

    With ``resume`` the run that is there goes on; without one a new run begins, as after a death before the first
    checkpoint. ``initial`` makes the state to start from; None asks a trainer for it.
    """

    def __init__(
        self, checkpoint_dir: Path, *, keep_checkpoints: int = 3, resume: bool = False,
        settings: Mapping[str, Any] | None = None, initial: Callable[[], list[files.Buffer]] | None = None,
    ) -> None:  # fmt: skip
        self.places = Places(checkpoint_dir)
        self.directory = self.places.server
        self.checkpoints = CheckpointStore(self.directory, keep_checkpoints)
        self.payloads = PayloadStore(self.places.payloads)
        self.initial = initial
        self.resumed: Checkpoint | None = None
        self._resume = resume
        self._settings = {name: without_password(value) for name, value in (settings or {}).items()}
        self._record: dict[str, Any] = {}
        self._lock = FileLock(self.places.lock, fallback_to_soft=False, mode=0o600)
        self._saved_digest: str | None = None

    @property
    def run_id(self) -> str:
        """The run's id, kept over every resume."""
        return str(self._record["run_id"])

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the run was begun with."""
        return dict(self._record.get("settings", {}))

    def __enter__(self) -> Self:
        try:
            return self._open()
        except ExchangeError as exc:
            # The server has no exchange: what it cannot write or read is its run's.
            raise CheckpointError(str(exc)) from exc

    def _open(self) -> Self:
        files.make_private_directory(self.directory, CheckpointError)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise CheckpointError(
                f"another server is using {self.directory}; stop it, or take another --checkpoint-dir"
            ) from None
        previous = self._previous_record()
        if self._resume and previous:
            self._record = previous
            self.resumed = self.checkpoints.newest(run_id=self.run_id)
        if self.resumed is None and (not self._record or self._has_results()):
            # Also where there is something and no checkpoint of it can be read.
            self._begin(previous)
        self.journal = Journal(self.places.journal)
        if self.journal.entries:
            self.journal.keep_up_to(self.resumed.server_round if self.resumed else -1)
        self.payloads.open(keep={given["digest"] for _, given in self.journal.at_work().values()})
        self.history = History(self.places.history)
        self.history.keep_up_to(self.resumed.server_round if self.resumed else 0)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.payloads.clear()
        except FedSplitError as error:
            # On a disk that cannot be written nothing is lost by that; the next server clears them.
            log.debug("%s", error)
        finally:
            self._lock.release()

    def payload_of(self, checkpoint: Checkpoint) -> StoredPayload:
        """Bring a checkpoint's state back into the payload store; its digest was checked when it was read."""
        return self.payloads.give(checkpoint.path(STATE_FILE), checkpoint.files[STATE_FILE])

    def partial_line(self) -> dict[str, Any]:
        """Return what the resumed round's line had when its state was saved."""
        return dict(self.resumed.info["line"]) if self.resumed else {}

    def save(
        self, server_round: int, digest: str, contents: Mapping[str, Any], metrics: Mapping[str, Any],
        line: Mapping[str, Any], best: int | None,
    ) -> None:  # fmt: skip
        """Write a round's checkpoint and let go of what came before it."""
        info = {"line": dict(line), "local_entries": self._record.get("local_entries", {})}
        self.checkpoints.save(
            run_id=self.run_id, server_round=server_round, files=contents, metrics=metrics, info=info,
            digests={STATE_FILE: digest},
        )  # fmt: skip
        self.checkpoints.prune(best=best)
        if self._saved_digest not in (None, digest):
            self.payloads.drop(str(self._saved_digest))
        self._saved_digest = digest

    def note_local_entries(self, entries: Mapping[str, Any]) -> None:
        """Note which entries stay with the trainers: name to (dtype, shape)."""
        if entries:
            self._note(local_entries=dict(entries))

    def note_split(self, rows: Sequence[PartRow]) -> None:
        """Note the resolved split, for the report."""
        self._note(split=[row._asdict() for row in rows])

    def note_session(self, *, command: str, software: Mapping[str, str]) -> None:
        """Note what the server was started with this time, for the report: a resumed run has had several sessions."""
        session = {"began": _now(), "command": without_password(command), "software": dict(software)}
        self._note(sessions=[*self._record.get("sessions", []), session])

    def local_entries(self) -> dict[str, torch.Tensor]:
        """Return the entries that stay with the trainers as tensors without data, to show and check the split."""
        from fedsplit.states.state_dict import described_state

        return described_state(self._record.get("local_entries", {}))

    def _previous_record(self) -> dict[str, Any] | None:
        path = self.places.run
        if not path.exists():
            return None
        try:
            record: dict[str, Any] = json.loads(path.read_bytes())
            if isinstance(record["run_id"], str):
                return record
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as exc:
            log.debug("%s: %s", path, exc)
        kept = files.unreadable_name(path)
        try:
            path.rename(kept)
        except OSError as exc:
            raise CheckpointError(f"{path} cannot be read, nor moved to {kept.name}: {exc.strerror}") from exc
        log.warning("%s cannot be read; it is kept as %s", path, kept)
        # What a resumed run needs of it is in the checkpoints too.
        found = self.checkpoints.newest()
        if found is None:
            return None
        local = found.info.get("local_entries", {})
        return {"run_id": found.run_id, "began": _now(), "settings": self._settings, "local_entries": local}

    def _has_results(self) -> bool:
        history = self.places.history
        return bool(self.checkpoints.rounds()) or (history.exists() and history.stat().st_size > 0)

    def _begin(self, previous: dict[str, Any] | None) -> None:
        if self._resume:
            log.warning("there is no run to resume in %s: a new one begins", self.directory)
        places = self.places
        if previous or places.history.exists():
            old = previous["run_id"] if previous else "unknown"
            self.checkpoints.put_aside(old, places.run, places.history, places.journal, places.final_plot)
            log.info("the run that was here is now in %s", places.old_runs / old)
        self._record = {"run_id": uuid.uuid4().hex[:16], "began": _now(), "settings": self._settings}
        self.checkpoints.begin_run(self.run_id)
        self._note()

    def _note(self, **entries: Any) -> None:
        self._record |= entries
        try:
            files.write_json(self.places.run, self._record, durable=True)
        except ExchangeError as exc:
            raise CheckpointError(str(exc)) from exc


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
