"""Files that their writer no longer needs, kept to be written over: their memory is there already.

New memory for a file costs more than to write to what is there: on a virtual machine five times as much. So who wrote a
large file keeps it under a name of its own instead of removing it, and writes a later one over it.

Nobody's bytes change by that. A file is written over only if it has no other name left, and if the kernel grants a
lease for writing (``F_SETLEASE``, fcntl(2)), which it does only for a file that no process has open or mapped. Where
there are no leases (they are Linux's; a network file system may have none) a new file is written, as ever.
"""

import fcntl
import itertools
import os
import shutil
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
_numbers = itertools.count()
_of_this_process: WeakSet["Spares"] = WeakSet()


class Spares:
    """The spare files of one writer, in a directory under names that begin with ``.<prefix>`` and end with ``.tmp``."""

    def __init__(self, directory: Path, prefix: str) -> None:
        self._directory, self._prefix = directory, prefix
        # The oldest first, it is the first that nobody needs any more; and at the end those that were looked at.
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        _of_this_process.add(self)

    def give(self, path: Path) -> None:
        """Take a file away from its path, if it is there."""
        with self._lock, suppress(FileNotFoundError):
            size = path.lstat().st_size
            if not _LEASE or size < _LEAST_BYTES:
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
    for spares in list(_of_this_process):
        spares.clear()


def _is_unused(path: Path) -> bool:
    """Tell whether a file has one name, and no process has it open or mapped; False where the kernel does not say."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            if os.fstat(descriptor).st_nlink != 1:
                return False
            fcntl.fcntl(descriptor, _LEASE, fcntl.F_WRLCK)
            fcntl.fcntl(descriptor, _LEASE, fcntl.F_UNLCK)
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return True
