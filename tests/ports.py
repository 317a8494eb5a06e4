"""Ports for servers of the tests: no two tests get the same one, in whichever process they run."""

from __future__ import annotations

import errno
import os
import socket
from itertools import count

# Below the range from which Linux takes the ports of outgoing connections.
FIRST, LAST = 16_000, 32_000

_numbers = count(os.getpid() * 37)
# A port is taken by holding its number as a UDP port. No server of ours speaks UDP, and the kernel lets go of it when
# this process ends.
_held: list[socket.socket] = []


def free_port() -> int:
    """Return a port of loopback that nothing listens at, and that no other test gets while this process lives."""
    for _ in range(FIRST, LAST):
        port = FIRST + next(_numbers) % (LAST - FIRST)
        token = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            token.bind(("127.0.0.1", port))
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError as exc:
            token.close()
            if exc.errno != errno.EADDRINUSE:
                raise
            continue
        _held.append(token)
        return port
    raise RuntimeError(f"no port of 127.0.0.1 from {FIRST} to {LAST - 1} is free")
