"""The payload store: immutable files named by the SHA-256 of their bytes, seen by server and clients of one machine.

On one machine a state crosses no socket: the server writes it here once, a client links it into its exchange directory,
and the trainer maps it; a result is linked back in the same way. Neither side opens a path that the other one names,
only ``<root>/<digest>``, and the client uses the root only after it has read a nonce that the server put there.
"""

import hashlib
import mmap
import secrets
import stat
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fedsplit.disk import files
from fedsplit.disk.digest import bytes_digest, checked, is_digest
from fedsplit.disk.identity import Identity, identity_of
from fedsplit.disk.spares import Spares
from fedsplit.errors import CheckpointError, FedSplitError, RecordError

_NONCE_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class StoredPayload:
    """A payload in a store."""

    digest: str
    bytes: int
    path: Path
    # Of the file under whose name its bytes were digested; None if a reader has to digest them.
    identity: Identity | None = field(default=None, compare=False)


class Incoming:
    """A payload that arrives in pieces, each of which is written and hashed as it comes.

    Nobody reads `path` before it is whole: `have` bytes of `size` are there, and in the end `digest` must be theirs.
    """

    def __init__(self, path: Path, digest: str, size: int, spares: Spares) -> None:
        if not is_digest(digest) or size < 0:
            raise RecordError(f"a payload of {size} bytes with digest {digest!r} was announced")
        files.check_space(path.parent, size)
        self.path = path
        self.digest = digest
        self.size = size
        self.have = 0
        # Of the whole file.
        self.identity: Identity | None = None
        self._hash = hashlib.sha256()
        self._spares = spares

    @property
    def is_whole(self) -> bool:
        """Whether all of it is there, with the right digest."""
        return self.have == self.size

    def add(self, offset: int, piece: files.Buffer) -> None:
        """Take a piece; one that does not begin where the file ends changes nothing.

        Raises RecordError if there is more than was announced, or all of it has another digest.
        """
        if offset != self.have:
            return
        if self.have + len(piece) > self.size:
            raise RecordError(f"a payload of {self.size:,} bytes was announced, more came")
        files.write_at(self.path, offset, piece, self._hash, size=self.size, spares=self._spares)
        self.have += len(piece)
        if not self.is_whole:
            return
        if (found := self._hash.hexdigest()) != self.digest:
            self.discard()
            raise RecordError(f"the bytes that came have digest {found[:12]}…, announced was {self.digest[:12]}…")
        with files.explained(self.path):
            self.path.chmod(files.UNWRITABLE)
            self.identity = identity_of(self.path.lstat())

    def map(self) -> mmap.mmap:
        """Map all of it; raises RecordError if it is no longer there."""
        return files.map_regular(self.path)

    def discard(self) -> None:
        """Let go of the file; a process that mapped it can still read it."""
        files.retire(self.path, self._spares)


class PayloadStore:
    """A directory of payloads under their digests; only the server makes and clears it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # Digests that `drop` leaves alone: of states that somebody still trains from.
        self.kept: Container[str] = ()
        # Whether what has the identity that its writer gave is not digested again: ``--verify auto``.
        self.trusts = True
        self._spares = Spares(root, "writing")
        # The digests of what was written here, and not linked.
        self._written: set[str] = set()

    def open(self, keep: Container[str] = ()) -> None:
        """Make the directory, or clear what an earlier server left in it, but for the digests to ``keep``."""
        files.make_private_directory(self.root, CheckpointError)
        for path in self.root.iterdir():
            if path.name not in keep:
                files.remove(path)

    def path(self, digest: str) -> Path:
        """Return the path of a payload; raises RecordError unless the name is a digest: no other is ever opened."""
        return self.root / checked(digest)

    def take(self, digest: str, scratch: Path | None = None) -> Path | None:
        """Return the path of a payload, or None if it is no regular file there; a remote store needs the scratch."""
        path = self.path(digest)
        try:
            return path if stat.S_ISREG(path.lstat().st_mode) else None
        except OSError:
            return None

    def give(self, source: Path, digest: str, identity: Identity | None = None) -> StoredPayload:
        """Put a finished file into the store; `identity` is what its writer gave."""
        path = self.path(digest)
        files.link_or_copy(source, path)
        return StoredPayload(digest=digest, bytes=source.stat().st_size, path=path, identity=identity)

    @property
    def announced_root(self) -> str | None:
        """Where a client on the same machine is told to look for the nonce."""
        return str(self.root.resolve())

    def put(self, chunks: Iterable[files.Buffer]) -> StoredPayload:
        """Write a payload under its digest."""
        temporary = self.root / f"writing-{secrets.token_hex(8)}"
        digest, size = files.write_hashed(temporary, chunks, mode=files.UNWRITABLE, spares=self._spares)
        self._written.add(digest)
        path = self.path(digest)
        with files.explained(path):
            identity = identity_of(temporary.lstat())
            temporary.replace(path)
        return StoredPayload(digest=path.name, bytes=size, path=path, identity=identity)

    def park(self, content: files.Buffer) -> mmap.mmap:
        """Write bytes that have to wait into a file without a name, and map it; they go with the mapping.

        Under the name of their digest they would go when another rank's result of the same bytes is dropped.
        """
        temporary = self.root / f"writing-{secrets.token_hex(8)}"
        try:
            files.write_chunks(temporary, [content])
            return files.map_regular(temporary)
        finally:
            files.remove(temporary)

    def map(self, digest: str, *, own: bool = False, identity: Identity | None = None) -> mmap.mmap:
        """Map a payload after checking its bytes against its name, unless this process wrote or checked them (`own`).

        Nor are they checked if the file has the `identity` that its writer gave. Raises RecordError if it is not there
        or its bytes have another digest.
        """
        path = self.path(digest)
        content, status = files.map_with_status(path)
        is_known = self.trusts and identity is not None and identity == identity_of(status)
        if not (own or is_known) and (found := bytes_digest(content)) != digest:
            raise RecordError(f"{path} has digest {found[:12]}…: it was changed after it was written")
        return content

    def receive(self, digest: str, size: int) -> Incoming:
        """Make room for a payload that comes in pieces, under a name of its own."""
        return Incoming(self.root / f"writing-{secrets.token_hex(8)}", digest, size, self._spares)

    def drop(self, digest: str) -> None:
        """Delete a payload, unless it is kept; a process that mapped or linked it can still read it."""
        if digest in self.kept:
            return
        if digest in self._written:
            self._written.discard(digest)
            files.retire(self.path(digest), self._spares)
        else:
            # Its writer, who has another name for it, may use the file again.
            files.remove(self.path(digest))

    def clear(self) -> None:
        """Delete every payload but those that are kept. Temporary names are left alone: a client may be linking one."""
        self._spares.clear()
        for path in self.root.glob("*"):
            if is_digest(path.name) and path.name not in self.kept:
                files.remove(path)

    def put_nonce(self) -> tuple[str, str]:
        """Write a nonce under a random name; returns the name and the content that proves one can read here."""
        name, content = secrets.token_hex(_NONCE_BYTES), secrets.token_hex(_NONCE_BYTES)
        files.write_chunks(self.path(name), [content.encode()])
        return name, content

    def read_nonce(self, name: str) -> str | None:
        """Return the nonce if this process can use the store: private to its own user and readable; else None."""
        try:
            if not self.root.is_dir():
                return None
            files.make_private_directory(self.root)
            content = read_part(self.path(name), 0, 4 * _NONCE_BYTES + 1)
            return content.decode() if len(content) <= 4 * _NONCE_BYTES else None
        except (OSError, FedSplitError, UnicodeDecodeError):
            return None


def read_part(path: Path, offset: int, size: int) -> bytes:
    """Return a piece of a payload file, a shorter one at its end."""
    with files.open_regular(path) as file:
        file.seek(offset)
        return file.read(size)
