"""Processes that a script starts and always ends: with everything they start, and also when the script is killed."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fedsplit.errors import FedSplitError

log = logging.getLogger("fedsplit")

_STOP_S = 10.0
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_PR_SET_PDEATHSIG = 1


class Command:
    """One of Flower's commands, with every process that it starts.

    Parameters
    ----------
    command
        The command line.
    environment
        Its environment.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.name = command[0]
        self.tail: deque[str] = deque(maxlen=30)
        self._sent = threading.Event()
        self._process = subprocess.Popen(
            [str(path_of(command[0])), *command[1:]], env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=tie_to_parent(),
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, name=f"log of {self.name}", daemon=True)
        self._reader.start()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def problem(self) -> str:
        """Return the line of its output that most likely says why it ended."""
        lines = [text for line in self.tail if (text := _COLOURS.sub("", line).strip())]
        for index, line in enumerate(lines[:-2]):
            if "Exit Code" in line:
                # The first line is what failed, the second why.
                return " ".join(lines[index + 1 : index + 3])
        telling = [line for line in lines if "error" in line.lower()]
        return (telling or lines or ["it said nothing"])[-1]

    def stop(self) -> None:
        """End it, first by asking, and all that it started; returns when none of them is left."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            deadline = time.monotonic() + _STOP_S
            while time.monotonic() < deadline:
                self._process.poll()
                try:
                    os.killpg(self._process.pid, 0)
                except ProcessLookupError:
                    self._reader.join(1.0)
                    return
                time.sleep(0.05)

    def _read(self) -> None:
        assert self._process.stdout is not None  # it was given a pipe
        for raw in self._process.stdout:
            line = raw.decode(errors="replace").rstrip()
            self.tail.append(line)
            log.debug("%s: %s", self.name, line)


def tie_to_parent() -> Callable[[], None] | None:
    """Return what a child does first, so that it is told when the parent dies; None where Linux is not."""
    if not sys.platform.startswith("linux"):
        return None
    # Looked up here: between fork and exec as little as possible should happen.
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # it died before the call
            os._exit(1)

    return tie


@contextmanager
def on_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle signals that ask to stop, where there is a main thread to do so."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {each: signal.signal(each, handler) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for each, old in previous.items():
            signal.signal(each, old)


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """End the script in order: whatever was started is stopped on the way out."""
    raise KeyboardInterrupt


def free_port() -> int:
    """Return a port of loopback that nothing listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def path_of(command: str) -> Path:
    """Return the command that was installed beside this interpreter, whatever PATH says."""
    path = Path(sys.executable).parent / command
    if not path.exists():
        raise FedSplitError(f"{path} is not there; install Flower in this environment: pip install flwr")
    return path
