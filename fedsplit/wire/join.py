"""The join token: a secret that server and clients share, and how each proves to the other that it has it.

The token itself never travels. Each side draws a nonce and sends it. Its proof is an HMAC-SHA256, with a key made from
the token, over both nonces, the run, the rank and the exchange directory's id: worth nothing in another connection, for
another rank, or as the proof of the other side. Without TLS somebody in between could pass the proofs on and read what
follows, so a token is used over TLS or on loopback only.
"""

import hashlib
import hmac
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fedsplit.errors import UsageError

_LEAST_CHARACTERS = 16
_MOST_BYTES = 4096
_NONCE_BYTES = 32
_PURPOSE = b"fedsplit join token, version 1"


def new_nonce() -> str:
    """Draw a nonce."""
    return secrets.token_hex(_NONCE_BYTES)


def read_token(path: Path | None) -> bytes | None:
    """Read a token file and return the key made from it; None without a file.

    Raises UsageError, never showing any of the content, if the file cannot be read, others can read it, it belongs to
    another user, or the token is too short to be a secret.
    """
    if path is None:
        return None
    where = f"--join-token-file {path}"
    try:
        # Mode and owner are those of the open file: no other file can be put in its place before it is read.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"{where} is not a regular file")
            # systemd gives credentials to a service's user by an access control list, and its mask is shown as the
            # group's bits: mode 0440 there means this user alone.
            credentials, mode = os.environ.get("CREDENTIALS_DIRECTORY"), stat.S_IMODE(status.st_mode)
            if mode & (0o037 if credentials and path.parent == Path(credentials) else 0o077):
                raise UsageError(f"{where} can be opened by others (mode {mode:04o}); chmod 600 {path}")
            if status.st_uid not in (os.geteuid(), 0):
                raise UsageError(f"{where} belongs to user id {status.st_uid}, this process runs as {os.geteuid()}")
            token = file.read(_MOST_BYTES + 1).strip()
    except OSError as exc:
        raise UsageError(f"{where}: {exc.strerror}") from exc
    if not _LEAST_CHARACTERS <= len(token) <= _MOST_BYTES:
        raise UsageError(
            f"{where} must hold at least {_LEAST_CHARACTERS} characters; make one: "
            f"(umask 077; openssl rand -hex 32 > {path})"
        )
    return hmac.digest(token, _PURPOSE, hashlib.sha256)


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """What both proofs of one connection are made over; both sides know it."""

    run_id: str
    rank: int
    exchange_id: str
    server_nonce: str
    client_nonce: str = field(default_factory=new_nonce)

    def proof(self, key: bytes, side: Literal["client", "server"]) -> str:
        """Return a side's proof, in hex."""
        parts = (side, self.run_id, str(self.rank), self.exchange_id, self.server_nonce, self.client_nonce)
        # Each part with its length in front: two different transcripts must never give the same bytes.
        message = b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in parts)
        return hmac.new(key, message, hashlib.sha256).hexdigest()

    def is_proof(self, key: bytes, side: Literal["client", "server"], found: object) -> bool:
        """Check a side's proof; how long it takes does not depend on where a wrong one differs."""
        return isinstance(found, str) and hmac.compare_digest(self.proof(key, side).encode(), found.encode())
