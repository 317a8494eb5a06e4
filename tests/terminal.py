"""Runs a program on a terminal of its own, and returns what it showed there, as text or as screens.

``python -m tests.terminal TERMINAL OUTPUT SCRIPT FLAG...`` is a script on a terminal; it can be forked, see `Forked`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import runpy
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyte

from fedsplit.engines.forked import Forked
from tests.bounds import BOUND_S

ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")


LINES, COLUMNS = 40, 120
# Set by whoever runs the tests they would count for more than the terminal itself.
SIZE = {"LINES": str(LINES), "COLUMNS": str(COLUMNS)}
Screens = list[list[str]]


def on_a_terminal(command: Sequence[str], directory: Path) -> tuple[int, str]:
    """Run a program to its end; returns its exit code and its output without the escapes."""
    process, pieces = _started(command, directory)
    output = b"".join(pieces)
    return process.wait(BOUND_S), ESCAPES.sub(b"", output).decode()


def script_on_a_terminal(script: str, directory: Path, *flags: str, output: Path | None = None) -> tuple[int, Screens]:
    """Run a script to its end; returns its exit code and the screen's lines after each picture that it shows.

    What it prints on stdout goes into the file ``output`` instead, if one is given.
    """
    process, pieces = _forked(script, directory, flags, output)
    found = _screens(pieces)
    return process.wait(BOUND_S), found


def _screens(pieces: Iterator[bytes]) -> Screens:
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    screens = []
    for piece in pieces:
        # A piece may have several pictures: each begins where the line of the one before is erased.
        for picture in re.split(rb"(?=\r\x1b\[2K)", piece):
            stream.feed(picture)
            screens.append([line.rstrip() for line in screen.display if line.strip()])
    return screens


def _forked(script: str, directory: Path, flags: Sequence[str], output: Path | None) -> tuple[Forked, Iterator[bytes]]:
    terminal, end = _opened()
    path = directory / "script.py"
    path.write_text(script)
    words = [os.ttyname(end), str(output or ""), str(path), *flags]
    command = [sys.executable, "-m", "tests.terminal", *words]
    process = Forked(command, os.environ | SIZE | {"TERM": "xterm-256color"}, directory / "script.log", directory)

    def close() -> None:
        process.wait(BOUND_S)
        os.close(end)

    # The terminal is at its end when nobody has it open any more.
    threading.Thread(target=close, daemon=True).start()
    return process, _pieces(terminal)


def _opened() -> tuple[int, int]:
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    return terminal, end


def _started(command: Sequence[str], directory: Path) -> tuple[subprocess.Popen[bytes], Iterator[bytes]]:
    terminal, end = _opened()
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


def main() -> None:
    """Take the terminal for stdin, stdout and stderr, and be the script."""
    terminal, output = sys.argv[1:3]
    # Without O_NOCTTY the terminal would be hung up at the end of this process, with what nobody has read yet.
    end = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
    for number in (0, 1, 2):
        os.dup2(end, number)
    os.close(end)
    if output:
        file = os.open(output, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(file, 1)
        os.close(file)
    del sys.argv[:3]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
