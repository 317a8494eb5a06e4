"""Files that a reader sees whole or not at all; the only place that opens files for writing.

A write goes to a temporary file beside the target, which then replaces the target in one step. A process that dies in
between leaves ``.<name>.<pid>.tmp`` behind and the target as it was. With ``durable=True`` the bytes and the directory
entry are on the disk when the call returns; without it they survive the death of the process, not of the machine.
"""

import errno
import hashlib
import itertools
import json
import logging
import math
import mmap
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fedsplit.disk.spares import Spares, clear_spares
from fedsplit.errors import ExchangeError, FedSplitError, NoSpaceError, RecordError

log = logging.getLogger("fedsplit")

Done = TypeVar("Done")
Buffer = bytes | bytearray | memoryview
# Of a file that is never written again.
UNWRITABLE = 0o400

_OVERWRITE = os.O_WRONLY | os.O_NOFOLLOW
_CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_COPY_BYTES = 1 << 24
# What fits into the cache of a core, and is joined to one piece if all of it is so small.
_CACHED_BYTES = 1 << 18
_SPACE_CHECK_S, _REMIND_S = 0.5, 30.0


@contextmanager
def atomic_file(
    path: Path, *, durable: bool = False, mode: int = 0o600, size: int = 0, spares: Spares | None = None
) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes ``path`` when the block ends, and vanishes when the block raises.

    It may be one of the `spares`, if exactly `size` bytes are to be written. Raises ExchangeError, which names the
    path, if the disk is full or the directory cannot be written.
    """
    temporary = _temporary(path)
    with explained(path):
        try:
            is_spare = spares is not None and spares.take(temporary, size)
            descriptor = os.open(temporary, _OVERWRITE) if is_spare else _create(temporary, mode)
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                yield file
                if is_spare:
                    os.fchmod(file.fileno(), mode)
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(path)
            if durable:
                sync(path.parent)
        except BaseException:
            remove(temporary)
            raise


def write_chunks(path: Path, chunks: Iterable[Buffer], *, durable: bool = False, mode: int = 0o600) -> None:
    """Write buffers one after the other, each without a copy."""
    with atomic_file(path, durable=durable, mode=mode) as file:
        for chunk in chunks:
            write_all(file, chunk)


def write_all(file: BinaryIO, chunk: Buffer) -> None:
    """Write a whole buffer to an unbuffered file: one ``write`` stops at 2 GiB, and may stop earlier."""
    view = memoryview(chunk).cast("B")
    while len(view):
        view = view[file.write(view) :]


def write_hashed(
    path: Path, chunks: Iterable[Buffer], *, mode: int = 0o600, spares: Spares | None = None
) -> tuple[str, int]:
    """Write buffers one after the other; returns the SHA-256 of all in hex, and their length in bytes."""
    buffers, digest = list(chunks), hashlib.sha256()
    size = sum(memoryview(chunk).nbytes for chunk in buffers)
    with atomic_file(path, mode=mode, size=size, spares=spares) as file:
        for chunk in buffers if size > _CACHED_BYTES else [b"".join(buffers)]:
            write_digested(file, chunk, digest)
    return digest.hexdigest(), size


def write_digested(file: BinaryIO, chunk: Buffer, digest: Any) -> None:
    """Write a whole buffer to an unbuffered file, and digest each part of it while the cache still has it."""
    view = memoryview(chunk).cast("B")
    for begin in range(0, len(view), _CACHED_BYTES):
        part = view[begin : begin + _CACHED_BYTES]
        write_all(file, part)
        digest.update(part)


def write_json(path: Path, record: dict[str, Any], *, durable: bool = False) -> None:
    """Write a small JSON object, keys in the order given."""
    write_chunks(path, [json.dumps(record).encode()], durable=durable)


def write_at(path: Path, offset: int, chunk: Buffer, digest: Any, *, size: int, spares: Spares) -> None:
    """Write a piece of a file of `size` bytes, and digest it; the piece at 0 begins a new file, maybe a spare one.

    Nobody reads the file before it is whole.
    """
    with explained(path):
        # A later piece must find the file there: one that vanished would come back with a hole in place of its start.
        # What is there at the start may be a second name of a finished file, that somebody reads.
        if not offset and not spares.take(path, size):
            path.unlink(missing_ok=True)
            os.close(os.open(path, _OVERWRITE | os.O_CREAT | os.O_EXCL, 0o600))
        with os.fdopen(os.open(path, _OVERWRITE), "wb", buffering=0) as file:
            file.seek(offset)
            write_digested(file, chunk, digest)


def append_line(path: Path, line: str) -> None:
    """Append one line, whole or not at all; raises ExchangeError."""
    with explained(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            write_all(file, line.encode() + b"\n")
        except OSError:
            # The next line must not be glued to half of this one.
            file.truncate(before)
            raise


def overwrite_in_place(path: Path, text: str) -> None:
    """Replace the content and keep the inode: for a lock file, whose lock lives on the inode."""
    with explained(path), os.fdopen(os.open(path, os.O_WRONLY | os.O_NOFOLLOW), "wb", buffering=0) as file:
        write_all(file, text.encode())
        file.truncate()


def link_or_copy(source: Path, target: Path) -> None:
    """Give a finished file a second name, or a copy where the file system cannot link (another disk, no links)."""
    temporary = _temporary(target)
    with explained(target, f"link {source} to"):
        try:
            try:
                # Whole at once, and without a rename, which would wake those who wait for a record.
                _link(source, target)
            except FileExistsError:
                remove(temporary)
                _link(source, temporary)
                temporary.replace(target)
                # rename(2) between two names of one inode does nothing and leaves both.
                remove(temporary)
        except OSError as exc:
            if exc.errno not in _CANNOT_LINK:
                raise
            with open_regular(source) as reader, atomic_file(target) as writer:
                while chunk := reader.read(_COPY_BYTES):
                    write_all(writer, chunk)


def _link(source: Path, name: Path) -> None:
    """Link; again if another file took the source's name meanwhile: one without a name left cannot be linked."""
    while True:
        try:
            return os.link(source, name, follow_symlinks=False)
        except FileNotFoundError:
            if not (os.path.lexists(source) and name.parent.is_dir()):
                raise


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; a symbolic link, a pipe or a directory is an OSError at once."""
    return os.fdopen(_open_regular(path)[0], "rb")


def read_regular(path: Path, most: int) -> bytes:
    """Read up to so many bytes of a regular file; for small ones that are read often, as cheaply as can be."""
    descriptor, size = _open_regular(path)
    try:
        return os.read(descriptor, min(size, most))
    finally:
        os.close(descriptor)


def _open_regular(path: Path) -> tuple[int, int]:
    """Return the descriptor and the length of a regular file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symbolic link, which is not followed", str(path)) from exc
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return descriptor, status.st_size


def map_regular(path: Path) -> mmap.mmap:
    """Map a payload file; raises RecordError if it is missing, empty, or not a regular file.

    The mapping is private: what is written to it never reaches the file.
    """
    return map_with_status(path)[0]


def map_with_status(path: Path) -> tuple[mmap.mmap, os.stat_result]:
    """Map a payload file as `map_regular` does; returns the status of that very file too."""
    try:
        with open_regular(path) as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), os.fstat(file.fileno())
    except (OSError, ValueError) as exc:  # an empty file cannot be mapped: ValueError
        raise RecordError(f"cannot read the payload {path}: {exc}") from exc


def unreadable_name(path: Path) -> Path:
    """Return a free name beside a file, to keep it under if it cannot be read."""
    names = (path.with_name(f"{path.name}.unreadable-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def sync(path: Path) -> None:
    """Flush a finished file, or a directory's entries: without these a rename may be lost although the file is not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file if it is there."""
    with explained(path, "remove"):
        path.unlink(missing_ok=True)


def retire(path: Path, spares: Spares) -> None:
    """Take a file that this process wrote from its path, to be written over later."""
    with explained(path, "remove"):
        spares.give(path)


def remove_leftovers(directory: Path, prefix: str) -> None:
    """Delete temporary files that a dead process left; the caller holds the lock of those who write them."""
    for path in directory.glob(f".{prefix}*.tmp"):
        remove(path)


def make_private_directory(path: Path, error: type[FedSplitError] = ExchangeError) -> None:
    """Make a directory (mode 0700) or check one that is there; raises `error` with the reason.

    A symbolic link is refused, and what belongs to somebody else, or can be written by others.
    """
    try:
        for parent in [*reversed(path.parents), path]:
            if not parent.exists():
                parent.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as exc:
        raise error(f"cannot make the directory {path}: {exc.strerror}; choose another one") from exc
    if not stat.S_ISDIR(status.st_mode):
        raise error(f"{path} is not a directory (a symbolic link is not followed); remove it or choose another one")
    if status.st_uid != os.geteuid():
        raise error(f"{path} belongs to user id {status.st_uid}, this process runs as {os.geteuid()}; choose another")
    if status.st_mode & 0o022:
        raise error(f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):04o}); chmod go-w {path}")
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise error(f"{path} is not writable (mode {stat.S_IMODE(status.st_mode):04o}); chmod u+rwx {path}")


def check_space(directory: Path, needed_bytes: int) -> None:
    """Raise NoSpaceError if a file of this size would not fit: better than half of it."""
    if shutil.disk_usage(directory).free < needed_bytes:
        clear_spares()
    if (free := shutil.disk_usage(directory).free) < needed_bytes:
        raise NoSpaceError(
            f"too little space in {directory}: {needed_bytes:,} bytes are needed, {free:,} are free; "
            "free some or move the directory"
        )


def wait_for_space(write: Callable[[], Done]) -> Done:
    """Call a function until it does not fail for want of space, and say so meanwhile."""
    reminded = -math.inf
    while True:
        try:
            return write()
        except FedSplitError as exc:
            if not _lacks_space(exc):
                raise
            if time.monotonic() - reminded > _REMIND_S:
                reminded = time.monotonic()
                log.warning("%s; waiting for space", exc)
            time.sleep(_SPACE_CHECK_S)


def _lacks_space(exc: BaseException | None) -> bool:
    """Tell whether an error, or what it was raised from, says that a disk is full."""
    if isinstance(exc, OSError):
        return exc.errno in _FULL
    return exc is not None and (isinstance(exc, NoSpaceError) or _lacks_space(exc.__cause__))


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _create(temporary: Path, mode: int) -> int:
    # The mode from the start: set after the first byte, it would leave a moment in which others can read.
    try:
        return os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        # What a dead process of the same id left may be a second name of a finished file: never write into it.
        remove(temporary)
        return os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)


@contextmanager
def explained(path: Path, verb: str = "write", error: type[FedSplitError] = ExchangeError) -> Iterator[None]:
    """Turn an error of the operating system into one that names the path and the way out."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in _FULL:
            raise error(f"cannot {verb} {path}: {exc.strerror or exc}") from exc
        # Room for the next attempt.
        clear_spares()
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        reason = f"no space left to write {path} ({free:,} bytes free); free some or move the directory"
        raise NoSpaceError(reason) from exc
