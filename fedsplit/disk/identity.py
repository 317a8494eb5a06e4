"""What a finished file is known by: whoever finds it again need not digest it again.

A writer that digested the bytes while it wrote them passes the file's identity on beside the digest. A reader that
finds this identity believes the digest. It names this boot of this machine, the file system, the inode, the length and
the time of the last write, and there is one only for a file that belongs to this user and that nobody may write. So a
copy has none, nor has what came from another machine or user, or may have been changed since.

Not promised: that a process of the same user, or of root, is found out if it makes the file writable, changes it and
sets mode and time back. It could change the reader's memory as well. ``--verify always`` digests each file again.
"""

import os
import stat
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

Verify = Literal["auto", "always"]
Identity = Annotated[str, Meta(max_length=200)]


def identity_of(status: os.stat_result) -> Identity | None:
    """Return the identity of the file with this status, or None if it can have been changed."""
    boot = _boot()
    if not boot or not stat.S_ISREG(status.st_mode) or status.st_mode & 0o222 or status.st_uid != os.geteuid():
        return None
    # Not the time of the inode's last change: every further name of the file sets that.
    return f"{boot}/{status.st_dev}/{status.st_ino}/{status.st_size}/{status.st_mtime_ns}"


@cache
def _boot() -> str:
    """Return the name of this boot of this machine; empty where there is none: only Linux has it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
