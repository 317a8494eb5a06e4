"""Waiting for a record to be renamed into place, and for the other side's process to end.

On a local disk of Linux, inotify wakes the process within a fraction of a millisecond, however long it has waited. On a
network file system there are no events for what another machine did, so the process also polls: every millisecond at
first, then less often, at least every 20 ms, and every 100 ms after a minute. Once an event of a record has been seen,
events are relied on, and polling goes on every second only, until a poll finds a record that no event told of.

The kernel closes the files of a process that dies. So the lock of a role is watched too: as long as nobody closes it,
there is no need to look whether it is still held.
"""

import os
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path

try:
    from inotify_simple import INotify, flags
except ImportError:  # not on Linux
    INotify = None

_FIRST_POLL_S = 0.001
_USUAL_POLL_S = 0.020
_LAST_POLL_S = 0.100
_UNSURE_READ_S, _READ_S = 0.080, 1.0
# How often to look for the other side while its lock is quiet, and how long after it was closed it is not.
_QUIET_LOOK_S, _CLOSED_S = 2.0, 0.5


class Watch:
    """Waits for any of a directory's records, written by the other side, to change, and for its lock to be closed.

    Polling is a `stat`: a record that was renamed into place is another file. Without events the records count as
    changed every 80 ms even if they look the same: a file system may reuse a file's number within one tick of its
    clock, or show another machine an old file.
    """

    def __init__(self, *paths: Path, lock: Path | None = None) -> None:
        self._directory = paths[0].parent
        self._paths = {path.name: str(path) for path in paths}
        self._lock, self._lock_watch = lock, 0
        self._has_events = False
        self._looked_at = self._look_at = self._closed_at = 0.0
        self.begin()

    def begin(self) -> None:
        """Begin to wait: `has_changed` is true the first time."""
        self._began = time.monotonic()
        self._seen: list[tuple[int, int] | None] = []
        self._read_at = 0.0

    def has_changed(self) -> bool:
        """Tell whether it is time to read the records."""
        now = time.monotonic()
        found = [_identity(path) for path in self._paths.values()]
        if found == self._seen and now - self._read_at < (_READ_S if self._has_events else _UNSURE_READ_S):
            return False
        if self._seen and found != self._seen:
            # No event told of it: the other side may be on another machine now.
            self._has_events = False
        self._seen, self._read_at = found, now
        return True

    def is_look_due(self) -> bool:
        """Tell whether it is time to look whether the other side is there, and watch its lock from before the look."""
        if time.monotonic() < self._look_at:
            return False
        self._looked_at = time.monotonic()
        with suppress(OSError):  # it is not there yet, or the user has no watches left
            if self._events and self._lock:
                self._lock_watch = self._events.add_watch(self._lock, flags.CLOSE_WRITE)
        return True

    def looked(self, every_s: float, *, is_near: bool) -> None:
        """Note when to look again: after ``every_s``, or seldom while a lock held on this machine is not closed."""
        # The event comes just before the lock is free, so that a look at once may find it held.
        is_quiet = is_near and self._lock_watch and self._looked_at - self._closed_at > _CLOSED_S
        self._look_at = self._looked_at + (max(every_s, _QUIET_LOOK_S) if is_quiet else every_s)

    def sleep(self, most_s: float = _READ_S) -> None:
        """Sleep until it is time to ask `has_changed` or `is_look_due` again, ``most_s`` seconds at most."""
        now = time.monotonic()
        waited = now - self._began
        usual = max(_FIRST_POLL_S, min(waited / 20, _USUAL_POLL_S), min(waited / 600, _LAST_POLL_S))
        pause = max(0.0, min(_READ_S if self._has_events else usual, most_s, max(_FIRST_POLL_S, self._look_at - now)))
        if self._events is None:
            time.sleep(pause)
            return
        for event in self._events.read(timeout=1000 * pause):
            if event.wd == self._lock_watch:
                self._look_at, self._closed_at = 0.0, time.monotonic()
            elif event.name in self._paths:
                self._has_events = True
                self._seen = []

    @cached_property
    def _events(self) -> INotify | None:
        try:
            events = INotify() if INotify else None
            if events:
                events.add_watch(self._directory, flags.MOVED_TO)
            return events
        except OSError:  # the user has no watches left, or there is no inotify
            return None


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path, follow_symlinks=False)  # noqa: PTH116  (called a thousand times a second)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
