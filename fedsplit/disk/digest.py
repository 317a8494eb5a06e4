"""SHA-256 as lower-case hex: the name of a payload, and the proof that bytes are those that were written."""

import hashlib
import mmap
import re
from pathlib import Path

from fedsplit.disk.files import Buffer, open_regular
from fedsplit.errors import RecordError

_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_digest(value: object) -> bool:
    """Return whether this is a SHA-256 in lower-case hex: the only file name that a payload store opens."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def checked(digest: str) -> str:
    """Return the digest; raises RecordError if it is not one."""
    if not is_digest(digest):
        raise RecordError(f"{digest!r} is not a SHA-256 digest")
    return digest


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes; raises OSError as `open_regular` does."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_digest(content: Buffer | mmap.mmap) -> str:
    """Return the SHA-256 of bytes in memory."""
    return hashlib.sha256(content).hexdigest()
