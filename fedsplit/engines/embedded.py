"""Flower's embedded gRPC engine, and the only module that calls functions which Flower marks deprecated.

A connection can die silently, as when a cable is pulled. The server notices when a question or a ping stays
unanswered, the client when it hears nothing at all for `_SILENCE_S`. Either drops the connection, and the client comes
back with the exchange directory that it had.
"""

from __future__ import annotations

import logging
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import fedsplit.wire.flower_env  # noqa: F401  (first: it keeps Flower from calling home)

# isort: split
from fedsplit.engines.allocator import keep_freed_memory
from fedsplit.engines.tls import check_server, client_context
from fedsplit.errors import ConnectionFailedError, UsageError
from fedsplit.wire.protocol import EMBEDDED, MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from types import FrameType

    from flwr.server import Server

    from fedsplit.client.relay import Relay

log = logging.getLogger("fedsplit")

_FIRST_WAIT_S = 0.05
_LAST_WAIT_S = 2.0
_REMIND_S = 30.0
_CONNECT_S = 5.0
# The server pings after 10 s, so this is several of its pings; a server busy with a merge still sends them.
_SILENCE_S = 45.0
# A message to or from the server holds one piece of a state, and a record.
_MOST_MESSAGE_BYTES = 4 * EMBEDDED.piece_bytes


class _SilentError(BaseException):
    """Raised in the main thread when the server was silent for too long; no `except Exception` catches it."""


def choose_engine(wanted: str) -> str:
    """Return the engine to run on: the wanted one, unless this release of Flower no longer has it."""
    import flwr.client
    import flwr.server

    # By its name alone: to touch start_client would import its module, which takes a second.
    is_available = "start_client" in flwr.client.__all__ and hasattr(flwr.server, "start_server")
    if wanted != "embedded" or is_available:
        return wanted
    log.warning(
        "this release of Flower has no start_server and start_client any more: using --engine superlink, which takes "
        "seconds where the embedded engine takes milliseconds; server and clients must be on the same engine"
    )
    return "superlink"


def parse_address(address: str) -> tuple[str, int]:
    """Split ``HOST:PORT`` (an IPv6 host in brackets); raises UsageError."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise UsageError(f"{address!r} is not an address; expected HOST:PORT, for example 127.0.0.1:8080")
    return host.strip("[]"), int(port)


@contextmanager
def claim_port(address: str) -> Iterator[None]:
    """Hold an address for the length of the block; raises ConnectionFailedError if something else has it.

    gRPC shares ports: a second server would start without a word and take half of the clients. And of two that start at
    the same moment both would find the port free. So each first takes a name that the kernel gives to one process of a
    machine and takes back when that ends; on Linux only, which has such names.
    """
    host, port = parse_address(address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as claim:
        if sys.platform == "linux":
            try:
                claim.bind(f"\0fedsplit server at {address}")
            except OSError as exc:
                raise ConnectionFailedError(
                    f"cannot listen at {address}: another server has it; stop that one, or choose another --address"
                ) from exc
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
                probe.listen(1)
        except socket.gaierror as exc:
            raise UsageError(f"cannot resolve the host of --address {address}: {exc.strerror}") from exc
        except OSError as exc:
            raise ConnectionFailedError(
                f"cannot listen at {address}: {exc.strerror}; stop what uses the port, or choose another --address"
            ) from exc
        yield


def serve(server: Server, address: str, *, certificates: tuple[bytes, bytes, bytes] | None = None) -> None:
    """Run a Flower server at an address, which the caller has claimed, until its rounds are over.

    `certificates` are the CA's, the server's, and the server's key, PEM; None listens without TLS.
    """
    from flwr.server import ServerConfig, start_server

    keep_freed_memory()
    start_server(
        server_address=address, server=server, config=ServerConfig(num_rounds=1), certificates=certificates,
        grpc_max_message_length=_MOST_MESSAGE_BYTES,
    )  # fmt: skip


def connect(
    relay: Relay, address: str, *, root_certificates: bytes | None = None, max_wait_s: float | None = None
) -> None:
    """Keep a relay connected until the run is over; waits for a server that is not up yet, and for one that went away.

    Raises RefusedError if the server turned this client away, and ConnectionFailedError as `wait_for_server` does.
    """
    import grpc

    keep_freed_memory()
    context = None if root_certificates is None else client_context(root_certificates)
    while True:
        wait_for_server(address, max_wait_s, context)
        # Not earlier: a client that waits needs no more than a socket.
        from fedsplit.engines.flower_client import start_client

        began = time.monotonic()
        relay.begin_connection()
        try:
            with _watching(relay):
                start_client(
                    server_address=address, client=relay, root_certificates=root_certificates,
                    insecure=root_certificates is None, grpc_max_message_length=MAX_MESSAGE_BYTES,
                )  # fmt: skip
            pause_s = _LAST_WAIT_S
            problem = f"the server at {address} ended the connection without a word; connecting again"
        except _SilentError:
            pause_s = 0.0
            problem = f"heard nothing of the server at {address} for {_SILENCE_S:.0f} s; connecting again"
        except (grpc.RpcError, StopIteration) as exc:
            # A server that accepts and drops at once must not be asked in a busy loop.
            pause_s = max(0.0, _FIRST_WAIT_S - (time.monotonic() - began))
            problem = f"lost the server at {address} ({_reason(exc)}); connecting again"
        if relay.refused:
            raise relay.refused
        if relay.outcome:
            return
        log.warning("%s", problem)
        time.sleep(pause_s)


def quiet_flower(verbose: bool) -> None:
    """Show Flower's own log only when asked, and never its advice to use another engine."""

    def wanted(record: logging.LogRecord) -> bool:
        return verbose and "deprecated" not in record.getMessage().lower()

    # A filter and not a level: Flower sets its level when it is imported.
    logging.getLogger("flwr").addFilter(wanted)


@contextmanager
def _watching(relay: Relay) -> Iterator[None]:
    """Interrupt the block when the server has been silent for too long.

    gRPC waits for ever on a connection whose packets vanish, and Flower offers no way to set its keepalive. A timer's
    signal interrupts the block, if it is in the main thread; another thread cannot be interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def look(_number: int, _frame: FrameType | None) -> None:
        if relay.silence_s() > _SILENCE_S:
            # Only once: the closing of the connection must not be interrupted.
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise _SilentError

    previous = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def wait_for_server(
    address: str, max_wait_s: float | None, context: ssl.SSLContext | None, *, grpc: bool = True
) -> None:
    """Wait until a server answers at an address, with growing pauses and for ever if `max_wait_s` is None.

    Raises ConnectionFailedError if it did not come in time, or `fedsplit.engines.tls.check_server` finds that this
    client, with that `context` and `grpc`, can never talk to it.
    """
    host, port = parse_address(address)
    began, reminded, pause = time.monotonic(), 0.0, _FIRST_WAIT_S
    while True:
        try:
            check_server(host, port, context, _CONNECT_S, grpc=grpc)
            return
        except socket.gaierror as exc:
            raise UsageError(f"cannot resolve the host of --server-address {address}: {exc.strerror}") from exc
        except OSError as exc:
            now = time.monotonic()
            if max_wait_s is not None and now - began > max_wait_s:
                raise ConnectionFailedError(
                    f"no server at {address} within {max_wait_s:g} s ({exc.strerror or exc}); start server_main.py, "
                    "check --server-address, or raise --max-wait"
                ) from exc
            if now - reminded > _REMIND_S:
                reminded = now
                log.info("waiting for the server at %s (%s)", address, exc.strerror or exc)
            time.sleep(pause)
            pause = min(2 * pause, _LAST_WAIT_S)


def _reason(exc: BaseException) -> str:
    code = getattr(exc, "code", None)
    return str(code().name) if callable(code) else type(exc).__name__
