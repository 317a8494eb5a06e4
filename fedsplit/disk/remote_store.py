"""A payload store that several machines see: any URL that fsspec knows, such as ``s3://bucket/prefix``, a shared mount.

Immutable files named by the SHA-256 of their bytes, as in the local store: what is uploaded is never written again, and
what is downloaded is checked against its name. A digest is passed on only after its upload is complete. The bytes of a
state travel between each side and the store, and never in the server's messages.
"""

import hashlib
import logging
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsplit.disk.digest import checked, is_digest
from fedsplit.disk.files import atomic_file, write_all
from fedsplit.errors import ExchangeError, RecordError, UsageError

log = logging.getLogger("fedsplit")

_BLOCK_BYTES = 1 << 24
_NONCE_BYTES = 32
_PASSWORD = re.compile(r"(?<=://)[^/\s]+@")
# A put is all or nothing there; elsewhere a file is written under another name and moved.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "memory"}


class RemoteStore:
    """Payloads at a URL, under their digests; each side knows it from its own ``--payload-store``.

    Raises UsageError if fsspec, or what it needs for this kind of URL, is not installed, or the URL cannot be used.
    """

    announced_root = None  # neither side opens a place that the other one names

    def __init__(self, url: str) -> None:
        try:
            import fsspec

            self._fs, self._root = fsspec.core.url_to_fs(url)
        except ImportError as exc:
            raise UsageError(
                f"--payload-store {without_password(url)}: {exc}; try pip install 'fedsplit[store]'"
            ) from exc
        except (ValueError, OSError) as exc:
            raise UsageError(f"--payload-store {without_password(url)} cannot be used: {exc}") from exc
        self.url = without_password(url)
        protocols = self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,)
        self._puts_whole = bool(_OBJECT_STORES & set(protocols))
        self._root = self._root.rstrip("/")

    def give(self, source: Path, digest: str) -> None:
        """Bring a payload file there, unless it is there already; raises ExchangeError."""
        target = self._place(digest)
        with self._explained(f"write {digest[:12]}… to"):
            if self._fs.exists(target):
                return
            temporary = target if self._puts_whole else f"{self._root}/writing-{secrets.token_hex(8)}"
            self._make_root()
            self._fs.put_file(str(source), temporary)
            if temporary != target:
                self._fs.mv(temporary, target)

    def take(self, digest: str, scratch: Path) -> Path:
        """Bring a payload to ``scratch``; raises RecordError if it is not there or its bytes have another digest."""
        found = hashlib.sha256()
        place = self._place(digest)
        with self._explained(f"read {digest[:12]}… from"):
            if not self._fs.exists(place):
                raise RecordError(f"payload {digest[:12]}… is not in {self.url}")
            with self._fs.open(place, "rb", block_size=_BLOCK_BYTES) as reader, atomic_file(scratch) as writer:
                while block := reader.read(_BLOCK_BYTES):
                    found.update(block)
                    write_all(writer, block)
                if found.hexdigest() != digest:
                    raise RecordError(f"payload {digest[:12]}… in {self.url} has digest {found.hexdigest()[:12]}…")
        return scratch

    def drop(self, digest: str) -> None:
        """Remove a payload that no round needs; one that cannot be removed is left there."""
        try:
            self._fs.rm_file(self._place(digest))
        except Exception as exc:  # noqa: BLE001  (each backend has its own errors; leaving a file behind harms nobody)
            log.debug("%s was not removed from %s: %s", digest[:12], self.url, exc)

    def put_nonce(self) -> tuple[str, str]:
        """Write a nonce under a random name; returns the name and the content that proves one can read here."""
        name, content = secrets.token_hex(_NONCE_BYTES), secrets.token_hex(_NONCE_BYTES)
        with self._explained("write to"):
            self._make_root()
            self._fs.pipe_file(self._place(name), content.encode())
        return name, content

    def read_nonce(self, name: str) -> str | None:
        """Return the nonce that the server put there, or None if this is not the server's store."""
        if not is_digest(name):
            return None
        try:
            content: bytes = self._fs.cat_file(self._place(name))
            return content[: 4 * _NONCE_BYTES].decode()
        except Exception as exc:  # noqa: BLE001  (each backend has its own errors; the answer is the same: not seen)
            log.warning("the payload store %s is not the server's, or cannot be read: %s", self.url, exc)
            return None

    def _make_root(self) -> None:
        if not self._puts_whole:
            self._fs.makedirs(self._root, exist_ok=True)

    def _place(self, digest: str) -> str:
        return f"{self._root}/{checked(digest)}"

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except ExchangeError:  # a RecordError is one too
            raise
        except Exception as exc:  # each backend has its own errors
            raise ExchangeError(f"cannot {doing} the payload store {self.url}: {type(exc).__name__}: {exc}") from exc


def without_password(value: Any) -> Any:
    """Return a text without the user and password of a URL in it: what is told or noted of a run is shown to others."""
    return _PASSWORD.sub("…@", value) if isinstance(value, str) else value


def open_remote(setting: str) -> RemoteStore | None:
    """Return the store that ``--payload-store`` asks for; None for ``auto`` and ``none``."""
    return None if setting in ("auto", "none") else RemoteStore(setting)
