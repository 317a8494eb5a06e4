"""SHA-256 as lower-case hex: what payloads are called, and what says that bytes are still those that were written."""

from __future__ import annotations

import hashlib
import mmap
import re
from pathlib import Path

from fedsplit.disk.files import Buffer, open_regular

_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_digest(value: object) -> bool:
    """Return whether this is a SHA-256 in lower-case hex: the only file name that a payload store opens."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes.

    Raises
    ------
    OSError
        If it is missing, cannot be read, or is a symbolic link or anything else that is not a regular file.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_digest(content: Buffer | mmap.mmap) -> str:
    """Return the SHA-256 of bytes in memory."""
    return hashlib.sha256(content).hexdigest()
