"""A lock that is held for microseconds, many times a second: flock of the standard library, and nothing around it.

It is the lock that `filelock` takes on Linux and macOS, so either side may have it from there. The kernel drops it when
its holder dies. Not promised, as there: that a child which is forked during the turn, and outlives its parent, lets go.
"""

import fcntl
import os
import time
from pathlib import Path

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
_POLL_S = 0.001


def take(path: Path, timeout_s: float) -> int | None:
    """Return a descriptor that holds the lock on a file, for `give_up`; None if it is not free in time.

    Raises OSError if there is no such file system, or something else is there.
    """
    over = time.monotonic() + timeout_s
    while True:
        descriptor = os.open(path, _FLAGS, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Removed meanwhile, it guards nothing: the next one makes another.
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except (BlockingIOError, PermissionError):  # which of them it is depends on the file system
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() >= over:
            return None
        time.sleep(_POLL_S)


def give_up(descriptor: int) -> None:
    """End the turn."""
    try:
        # Also for a child that was forked meanwhile: closing alone would leave it the lock.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)
