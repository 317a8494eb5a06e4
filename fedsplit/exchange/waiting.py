"""Waiting for a record to be renamed into place: by the kernel's word where it gives one, by looking everywhere else.

On a local disk of Linux, inotify wakes whoever waits within a fraction of a millisecond, however long it has waited.
On a network file system nobody is told what another machine did, so whoever waits also looks by himself: every
millisecond at first, less often the longer it was in vain, at most 20 ms apart. Once events of a record have been seen
they are relied on, and a look every 80 ms remains.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

try:
    from inotify_simple import INotify, flags
except ImportError:  # not on Linux
    INotify = None

_FIRST_LOOK_S = 0.001
_LAST_LOOK_S = 0.020
_RELIED_LOOK_S = 0.080
_READ_S = 1.0


class Watch:
    """Waits for any of a directory's records to change.

    A look is a `stat`: a record that is renamed into place is another file. Where there are no events, records are read
    anew every 80 ms even so: a file system may reuse a file's number within one tick of its clock, or show another
    machine an old one.

    Parameters
    ----------
    paths
        The records, all of one directory, written by the other side.
    """

    def __init__(self, *paths: Path) -> None:
        self._directory = paths[0].parent
        self._paths = {path.name: str(path) for path in paths}
        self._events: INotify | None = None
        self._tells = False
        self._tried = False
        self.begin()

    def begin(self) -> None:
        """Begin to wait: the first look finds everything changed."""
        self._began = time.monotonic()
        self._seen: list[tuple[int, int] | None] = []
        self._read_at = 0.0

    def has_changed(self) -> bool:
        """Tell whether it is time to read the records."""
        now = time.monotonic()
        found = [_identity(path) for path in self._paths.values()]
        if found == self._seen and now - self._read_at < (_READ_S if self._tells else _RELIED_LOOK_S):
            return False
        self._seen, self._read_at = found, now
        return True

    def sleep(self) -> None:
        """Sleep until the next look."""
        waited = time.monotonic() - self._began
        pause = _RELIED_LOOK_S if self._tells else min(_LAST_LOOK_S, max(_FIRST_LOOK_S, waited / 20))
        if not self._tried:
            self._listen()
        if self._events is None:
            time.sleep(pause)
        elif any(event.name in self._paths for event in self._events.read(timeout=1000 * pause)):
            self._tells = True
            self._seen = []

    def _listen(self) -> None:
        self._tried = True
        try:
            self._events = INotify() if INotify else None
            if self._events:
                self._events.add_watch(self._directory, flags.MOVED_TO)
        except OSError:  # the user's share of watches is used up, or there is no inotify
            self._events = None


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path, follow_symlinks=False)  # noqa: PTH116  (called a thousand times a second)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
