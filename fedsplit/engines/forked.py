"""Starts Python programs by forking a process that has imported PyTorch and Flower: quickly, and with shared memory.

Each is a process of its own all the same, with its own session, environment and output. `multiprocessing` keeps the
process that they are forked from, and ends it with this one.
"""

import atexit
import ctypes
import faulthandler
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

_PR_SET_NAME = 15
FORKS = multiprocessing.get_context("forkserver")
# What all programs import, also late: torch._dynamo with the first optimizer, Flower's client with a connection. What
# is not installed is left out.
PRELOADED = (
    "torch", "torch._dynamo", "flwr.server", "fedsplit.engines.flower_client", "fedsplit.trainer.trainer",
    "fedsplit.workloads.runner", "fedsplit.engines.embedded", "fedsplit.server.round", "fedsplit.client.relay",
)  # fmt: skip
FORKS.set_forkserver_preload([*PRELOADED])


class Forked:
    """A program in a forked process, which gets SIGTERM if this one is killed; it has what is used of a `Popen`."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path | None = None,
        directory: Path | None = None,
    ) -> None:  # fmt: skip
        self.args = list(command)
        self._process = FORKS.Process(target=_run, args=(self.args, dict(environment), log, directory or Path.cwd()))
        self._process.start()
        assert self._process.pid
        self.pid: int = self._process.pid

    @staticmethod
    def can_run(command: Sequence[str]) -> bool:
        """Whether a command is ``python script.py ...`` or ``python -m module ...``, by this interpreter, on Linux."""
        is_python = command[0] == sys.executable and (command[1] == "-m" or command[1].endswith(".py"))
        return is_python and sys.platform.startswith("linux")

    @property
    def returncode(self) -> int | None:
        """Its exit code, the negative number of a signal, or None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return `returncode`."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns its exit code, or raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal; does nothing once it has ended."""
        # It may have ended already, and what it was forked from be about to tell.
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL; does nothing once it has ended."""
        self.send_signal(signal.SIGKILL)


def _run(command: list[str], environment: dict[str, str], log: Path | None, directory: Path) -> None:
    """Be the program."""
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    if log is not None:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for number in (1, 2):
            os.dup2(output, number)
        os.close(output)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if environment.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    is_module = command[1] == "-m"
    # For top and ps, which else show what it was forked from.
    ctypes.CDLL(None).prctl(_PR_SET_NAME, (command[3] if is_module and command[3:] else Path(command[1]).stem).encode())
    sys.argv = command[2:] if is_module else command[1:]
    sys.path.insert(0, str(directory if is_module else Path(command[1]).absolute().parent))
    try:
        if is_module:
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(command[1], run_name="__main__")
    finally:
        # `multiprocessing` ends a process without them.
        atexit._run_exitfuncs()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
