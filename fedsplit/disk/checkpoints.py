"""Checkpoints of the server and of each trainer: one directory a round, complete or not there.

``<directory>/round-000003/`` holds a round's files and ``manifest.json``, which names each file with its length and
SHA-256. A round is written under a temporary name, its manifest last, and renamed into place: a round without a valid
manifest does not exist.

Not promised: that a checkpoint written with ``durable=False`` survives the death of the machine before `flush`. Its
digests then show that it is corrupt, and the one before is used.
"""

import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import fedsplit.disk.files as disk
from fedsplit.disk.digest import file_digest
from fedsplit.errors import CheckpointError, FedSplitError

log = logging.getLogger("fedsplit")

SCHEMA = "fedsplit-checkpoint/1"
_NOT_VALID = (OSError, ValueError, KeyError, TypeError, RecursionError)
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_ROUND = re.compile(r"round-([0-9]{6,})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A round whose files were checked: the SHA-256 of each name in `files`, and in `info` what the writer noted."""

    directory: Path
    run_id: str
    server_round: int
    files: Mapping[str, str]
    metrics: Mapping[str, Any]
    info: Mapping[str, Any]

    def path(self, name: str) -> Path:
        """Return the path of one of its files."""
        return self.directory / name


class CheckpointStore:
    """Writes, lists, verifies and prunes the rounds in a directory, which the first one makes.

    `prune` leaves the newest `keep` rounds, at least 2: a corrupt newest one must have a predecessor.
    """

    def __init__(self, directory: Path, keep: int = 3) -> None:
        if keep < 2:
            raise CheckpointError(f"at least 2 checkpoints must be kept, not {keep}: the newest may be the corrupt one")
        self.directory = directory
        self.keep = keep
        self._is_checked = False

    def round_directory(self, server_round: int) -> Path:
        """Return the directory of a round, whether it is there or not."""
        return self.directory / f"round-{server_round:06d}"

    def rounds(self) -> list[int]:
        """Return the rounds that have a manifest, in order."""
        names = os.listdir(self.directory) if self.directory.is_dir() else ()  # noqa: PTH208  (several times a task)
        matches = [match for name in names if (match := _ROUND.fullmatch(name))]
        return sorted(int(each[1]) for each in matches if (self.directory / each[0] / "manifest.json").exists())

    def save(
        self, *, run_id: str, server_round: int, files: Mapping[str, Iterable[disk.Buffer] | Path],
        metrics: Mapping[str, Any] = _NOTHING, info: Mapping[str, Any] = _NOTHING,
        digests: Mapping[str, str] = _NOTHING, durable: bool = True,
    ) -> Path:  # fmt: skip
        """Write a round; a file given as a path is linked, not copied, where the file system can.

        A file whose SHA-256 is in `digests` is not read again. Raises CheckpointError if the round cannot be written,
        for example on a full disk; the rounds before are as they were.
        """
        target = self.round_directory(server_round)
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            if not self._is_checked or not self.directory.is_dir():
                disk.make_private_directory(self.directory, CheckpointError)
                self._is_checked = True
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(mode=0o700)
            found = {name: _put(temporary / name, content, digests.get(name)) for name, content in files.items()}
            manifest = {
                "schema": SCHEMA, "run_id": run_id, "round": server_round,
                "files": found, "metrics": dict(metrics), "info": dict(info),
            }  # fmt: skip
            for name in files if durable else ():
                disk.sync(temporary / name)
            # With `durable` this syncs the directory too, after the manifest.
            disk.write_json(temporary / "manifest.json", manifest, durable=durable)
            # It exists only if the round is done again, with the same outcome.
            self.remove(server_round)
            temporary.rename(target)
            if durable:
                disk.sync(self.directory)
        except (OSError, FedSplitError) as exc:
            shutil.rmtree(temporary, ignore_errors=True)
            newest = self.newest()
            raise CheckpointError(
                f"cannot write the checkpoint of round {server_round}: {exc}; "
                f"the last good one is {newest.directory if newest else 'none'}"
            ) from exc
        return target

    def flush(self, server_round: int) -> None:
        """Bring a round that was written with ``durable=False`` to the disk."""
        directory = self.round_directory(server_round)
        try:
            for path in [*directory.iterdir(), directory, self.directory]:
                disk.sync(path)
        except FileNotFoundError:
            log.debug("round %d was pruned before it was flushed", server_round)
        except OSError as exc:
            raise CheckpointError(f"the checkpoint {directory} did not reach the disk: {exc}") from exc

    def read(self, server_round: int, *, verify: bool = True) -> Checkpoint:
        """Read a round and check its files against the manifest; with ``verify=False`` they need only be there.

        Raises CheckpointError if the round does not exist, or a file differs from its manifest; names the file.
        """
        directory = self.round_directory(server_round)
        try:
            manifest = _manifest(directory)
            files = manifest["files"]
            if manifest["schema"] != SCHEMA:
                raise CheckpointError(f"{directory} has schema {manifest['schema']!r}, expected {SCHEMA!r}")
            if manifest["round"] != server_round:
                raise CheckpointError(f"{directory} has the manifest of round {manifest['round']!r}")
            for name, expected in files.items():
                _check_file(directory, name, expected, verify)
            return Checkpoint(
                directory=directory, run_id=str(manifest["run_id"]), server_round=server_round,
                files={name: str(line["sha256"]) for name, line in files.items()},
                metrics=manifest["metrics"], info=manifest["info"],
            )  # fmt: skip
        except (*_NOT_VALID, AttributeError) as exc:
            raise CheckpointError(f"{directory} has no valid manifest ({type(exc).__name__}: {exc})") from exc

    def newest(self, *, run_id: str | None = None, before: int | None = None, verify: bool = True) -> Checkpoint | None:
        """Return the newest valid round, of this run and before this round if given; corrupt ones are skipped."""
        rounds = [number for number in self.rounds() if before is None or number < before]
        for server_round in reversed(rounds):
            try:
                checkpoint = self.read(server_round, verify=verify)
            except CheckpointError as exc:
                log.warning("checkpoint passed over: %s", exc)
                continue
            if run_id is None or checkpoint.run_id == run_id:
                return checkpoint
        return None

    def prune(self, *, best: int | None = None) -> None:
        """Remove all but the newest ``keep`` rounds and the best one."""
        for server_round in self.rounds()[: -self.keep]:
            if server_round != best:
                self.remove(server_round)

    def remove(self, server_round: int) -> None:
        """Remove a round. It is renamed first, so that half a round never looks like a whole one."""
        directory = self.round_directory(server_round)
        removed = directory.with_name(f".{directory.name}.removed.tmp")
        shutil.rmtree(removed, ignore_errors=True)
        with suppress(FileNotFoundError):
            directory.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)

    def begin_run(self, run_id: str) -> None:
        """Move rounds of other runs to ``old-runs/<their id>/``, and delete what a writer that was killed left."""
        disk.make_private_directory(self.directory, CheckpointError)
        for path in self.directory.glob(".round-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
        disk.remove_leftovers(self.directory, "")
        for server_round in self.rounds():
            directory = self.round_directory(server_round)
            try:
                found = str(_manifest(directory)["run_id"])
            except _NOT_VALID:
                found = "unknown"
            if found != run_id:
                self.put_aside(found, directory)

    def put_aside(self, run_id: str, *paths: Path) -> None:
        """Move files or directories of an old run out of the way; nothing is deleted."""
        aside = self.directory / "old-runs" / re.sub(r"[^0-9A-Za-z_-]", "_", run_id or "unknown")
        disk.make_private_directory(aside, CheckpointError)
        for path in paths:
            target, count = aside / path.name, 1
            while target.exists():  # the same run was put aside before
                count += 1
                target = aside / f"{path.name}.{count}"
            with disk.explained(target, f"move {path} to", CheckpointError), suppress(FileNotFoundError):
                path.rename(target)


class BackgroundWriter:
    """Runs one job at a time in a thread of its own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None
        self._lock = threading.RLock()

    def submit(self, job: Callable[[], None]) -> None:
        """Start a job once the one before is done; raises what that one raised."""
        with self._lock:
            self.wait()
            self._pending = self._pool.submit(job)

    def wait(self) -> None:
        """Wait for the last job; raises what it raised."""
        with self._lock:
            pending, self._pending = self._pending, None
            if pending:
                pending.result()

    def check(self) -> None:
        """Raise what a finished job raised, without waiting for a running one."""
        if self._pending and self._pending.done():
            self.wait()

    def close(self) -> None:
        """Wait for the last job and stop the thread; raises what the job raised."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()


def _put(path: Path, content: Iterable[disk.Buffer] | Path, digest: str | None) -> dict[str, Any]:
    """Write or link one file; returns its line in the manifest."""
    if isinstance(content, Path):
        disk.link_or_copy(content, path)
    else:
        digest, _ = disk.write_hashed(path, content)
    return _manifest_line(path, digest)


def _check_file(directory: Path, name: str, expected: Mapping[str, Any], verify: bool) -> None:
    path = directory / name
    if path.name != name or path.is_symlink():
        raise CheckpointError(f"{directory}: {name!r} is not the name of a file in it")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if verify and (found := _manifest_line(path)) != expected:
        raise CheckpointError(f"{path} is corrupt: its manifest says {expected}, found {found}")


def _manifest_line(path: Path, digest: str | None = None) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": digest or file_digest(path)}


def _manifest(directory: Path) -> Any:
    return json.loads((directory / "manifest.json").read_bytes())
