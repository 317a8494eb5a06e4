"""Runs a program on a terminal of its own, and returns what it showed there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Sequence
from pathlib import Path

from tests.bounds import BOUND_S

ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")


def on_a_terminal(command: Sequence[str], directory: Path) -> tuple[int, str]:
    """Run a program to its end; returns its exit code and its output without the escapes."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        command, cwd=directory, stdin=end, stdout=end, stderr=end, env=os.environ | {"TERM": "xterm-256color"}
    )
    os.close(end)
    output = b""
    with contextlib.suppress(OSError):  # how a terminal says that the last writer has gone
        while piece := os.read(terminal, 65536):
            output += piece
    os.close(terminal)
    return process.wait(BOUND_S), ESCAPES.sub(b"", output).decode()
