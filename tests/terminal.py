"""Runs a program on a terminal of its own, and returns what it showed there, as text or as screens."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyte

from tests.bounds import BOUND_S

ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")


LINES, COLUMNS = 40, 120
# Set by whoever runs the tests they would count for more than the terminal itself.
SIZE = {"LINES": str(LINES), "COLUMNS": str(COLUMNS)}


def on_a_terminal(command: Sequence[str], directory: Path) -> tuple[int, str]:
    """Run a program to its end; returns its exit code and its output without the escapes."""
    process, pieces = _started(command, directory)
    output = b"".join(pieces)
    return process.wait(BOUND_S), ESCAPES.sub(b"", output).decode()


def screens_of(command: Sequence[str], directory: Path) -> tuple[int, list[list[str]]]:
    """Run a program to its end; returns its exit code and the screen's lines after each piece of its output."""
    process, pieces = _started(command, directory)
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    screens = []
    for piece in pieces:
        stream.feed(piece)
        screens.append([line.rstrip() for line in screen.display if line.strip()])
    return process.wait(BOUND_S), screens


def _started(command: Sequence[str], directory: Path) -> tuple[subprocess.Popen[bytes], Iterator[bytes]]:
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    process = subprocess.Popen(
        command, cwd=directory, stdin=end, stdout=end, stderr=end, env=os.environ | SIZE | {"TERM": "xterm-256color"}
    )
    os.close(end)
    return process, _pieces(terminal)


def _pieces(terminal: int) -> Iterator[bytes]:
    with contextlib.suppress(OSError):  # how a terminal says that the last writer has gone
        while piece := os.read(terminal, 65536):
            yield piece
    os.close(terminal)
