"""Files that their writer no longer needs, kept to be written over: their memory is there already.

New memory for a file costs more than to write to what is there: on a virtual machine twice as much and more. So who
wrote a large file keeps it under a name of its own instead of removing it, and writes a later one over it.

Nobody's bytes change by that. A file is written over only if it has no other name left, and if the kernel grants a
lease for writing (``F_SETLEASE``, fcntl(2)), which it does only for a file that no process has open or mapped. That
holds on Linux and on file systems of this machine alone; on others, such as those of a network or a container's own
layers, which do not see all readers, files are removed as ever.
"""

import fcntl
import itertools
import os
import re
import shutil
import signal
import threading
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

# For smaller files it saves nothing.
_LEAST_BYTES = 1 << 19
# How much is kept: so many bytes, or five files if these are larger (a state may wait until three checkpoints no longer
# have it); so many files; and never more than is free beside them. How many are looked at to find one.
_MOST_BYTES, _MOST_STATES, _MOST, _LOOKS = 1 << 28, 5, 64, 4
_LEASE: int = getattr(fcntl, "F_SETLEASE", 0)
_SEE_ALL_READERS = ("tmpfs", "ext4", "xfs", "btrfs")
_numbers = itertools.count()
_of_this_process: WeakSet["Spares"] = WeakSet()
_adding = threading.Lock()


class Spares:
    """The spare files of one writer, in a directory under names that begin with ``.<prefix>`` and end with ``.tmp``."""

    def __init__(self, directory: Path, prefix: str) -> None:
        self._directory, self._prefix = directory, prefix
        # The oldest first, it is the first that nobody needs any more; and at the end those that were looked at.
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        # Whether they can be used again where they are; None before that was looked up.
        self._is_possible: bool | None = None
        with _adding:
            _of_this_process.add(self)

    def give(self, path: Path) -> None:
        """Take a file away from its path, if it is there."""
        with self._lock, suppress(FileNotFoundError):
            size = path.lstat().st_size
            if self._is_possible is None:
                self._is_possible = bool(_LEASE) and _file_system(self._directory) in _SEE_ALL_READERS
            if not self._is_possible or size < _LEAST_BYTES:
                path.unlink()
                return
            spare = self._directory / f".{self._prefix}.spare-{os.getpid()}-{next(_numbers)}.tmp"
            path.rename(spare)
            self._files[spare] = size
            most = min(max(_MOST_BYTES, _MOST_STATES * size), shutil.disk_usage(self._directory).free)
            while len(self._files) > _MOST or sum(self._files.values()) > most:
                self._remove(next(iter(self._files)))

    def take(self, path: Path, size: int) -> bool:
        """Give a file that nobody needs any more this name and size, and make it writable; False if there is none."""
        with self._lock:
            for spare, found in list(self._files.items())[:_LOOKS] if size >= _LEAST_BYTES else ():
                del self._files[spare]
                if not size // 2 <= found <= 2 * size or not _is_unused(spare):
                    self._files[spare] = found
                    continue
                with suppress(OSError):
                    spare.chmod(0o600)
                    # Once more: who had found the file under its name, and opened or linked it only now, is seen now.
                    if _is_unused(spare):
                        os.truncate(spare, size)
                        spare.rename(path)
                        return True
                spare.unlink(missing_ok=True)
        return False

    def clear(self) -> None:
        """Remove all of them."""
        with self._lock:
            while self._files:
                self._remove(next(iter(self._files)))

    def _remove(self, spare: Path) -> None:
        del self._files[spare]
        spare.unlink(missing_ok=True)


def clear_spares() -> None:
    """Remove all spare files of this process: a disk is full."""
    with _adding:
        found = list(_of_this_process)
    for spares in found:
        spares.clear()


def _file_system(directory: Path) -> str:
    """Return the type of the file system that a directory is on; empty if that cannot be told."""
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return ""
    # A space in a path is written as its number there.
    mounts = [
        (re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), line.split()[1]), line.split()[2]) for line in lines
    ]
    place = directory.resolve()
    # Of two at one place the later one is seen.
    over = [(len(point), number, kind) for number, (point, kind) in enumerate(mounts) if place.is_relative_to(point)]
    return max(over)[2] if over else ""


def _is_unused(path: Path) -> bool:
    """Tell whether a file has one name, and no process has it open or mapped; False where the kernel does not say."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            if os.fstat(descriptor).st_nlink != 1:
                return False
            # Who opens the file now has the holder of the lease sent a signal, by default one that ends it.
            fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(descriptor, _LEASE, fcntl.F_WRLCK)
            fcntl.fcntl(descriptor, _LEASE, fcntl.F_UNLCK)
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return True
