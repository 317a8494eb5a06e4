"""Waiting for a record to be renamed into place.

On a local disk of Linux, inotify wakes the process within a fraction of a millisecond, however long it has waited. On a
network file system there are no events for what another machine did, so the process also polls: every millisecond at
first, then less often, at least every 20 ms. Once an event of a record has been seen, events are relied on, and polling
goes on every 80 ms only.
"""

import os
import select
import time
from functools import cached_property
from pathlib import Path

try:
    from inotify_simple import INotify, flags
except ImportError:  # not on Linux
    INotify = None

_FIRST_POLL_S = 0.001
_LAST_POLL_S = 0.020
_RELIED_POLL_S = 0.080
_READ_S = 1.0
_EVENT_BYTES = 1 << 16


class Watch:
    """Waits for any of a directory's records, written by the other side, to change.

    Polling is a `stat`: a record that was renamed into place is another file. Without events the records count as
    changed every 80 ms even if they look the same: a file system may reuse a file's number within one tick of its
    clock, or show another machine an old file.
    """

    def __init__(self, *paths: Path) -> None:
        self._directory = paths[0].parent
        self._paths = [str(path) for path in paths]
        # As they are in an event.
        self._names = [os.fsencode(path.name) + b"\0" for path in paths]
        self._has_events = False
        self.begin()

    def begin(self) -> None:
        """Begin to wait: `has_changed` is true the first time."""
        self._began = time.monotonic()
        self._seen: list[tuple[int, int] | None] = []
        self._read_at = 0.0

    def has_changed(self) -> bool:
        """Tell whether it is time to read the records."""
        now = time.monotonic()
        found = [_identity(path) for path in self._paths]
        if found == self._seen and now - self._read_at < (_READ_S if self._has_events else _RELIED_POLL_S):
            return False
        self._seen, self._read_at = found, now
        return True

    def sleep(self) -> None:
        """Sleep until it is time to ask `has_changed` again."""
        waited = time.monotonic() - self._began
        pause = _RELIED_POLL_S if self._has_events else min(_LAST_POLL_S, max(_FIRST_POLL_S, waited / 20))
        if self._events is None:
            time.sleep(pause)
            return
        events, until = self._events, time.monotonic() + pause
        # Not read by the library: it takes each event apart, also those of all that this process itself renames.
        while (left_s := until - time.monotonic()) > 0 and self._poll.poll(1000 * left_s):
            found = os.read(events.fileno(), _EVENT_BYTES)
            if any(name in found for name in self._names):
                self._has_events = True
                self._seen = []
                return

    @cached_property
    def _events(self) -> INotify | None:
        try:
            events = INotify() if INotify else None
            if events:
                events.add_watch(self._directory, flags.MOVED_TO)
                self._poll = select.poll()
                self._poll.register(events, select.POLLIN)
            return events
        except OSError:  # the user has no watches left, or there is no inotify
            return None


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path, follow_symlinks=False)  # noqa: PTH116  (called a thousand times a second)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
