"""Starts a script in a process that is forked from one which has imported PyTorch and Flower: that takes no time.

It is a process of its own all the same, with its own session, working directory, output and environment. What is
different from `subprocess` is how it came to be: what happens while a program imports is tested with that one.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
# One list for all tests: the process that is forked from is started once, by whoever is first. What is imported late
# is named too: torch._dynamo with the first optimizer, Flower's client with a connection, matplotlib at the end.
FORKS.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.distributed", "sklearn.datasets", "flwr.client", "flwr.compat.client.app",
     "flwr.server", "matplotlib.figure", "matplotlib.ticker", "matplotlib.backends.backend_agg",
     "fedsplit.trainer.trainer", "fedsplit.trainer.process_group", "fedsplit.workloads.image",
     "fedsplit.engines.embedded", "fedsplit.server.round", "fedsplit.client.relay"]
)  # fmt: skip


class Forked:
    """A process that runs a script; what `subprocess.Popen` has and the tests use."""

    def __init__(self, command: Sequence[str], directory: Path, log: Path, environment: Mapping[str, str]) -> None:
        self.args = list(command)
        target = (self.args[1:], directory, log, dict(environment))
        self._process = FORKS.Process(target=_run, args=target)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, the negative number of a signal, or None while it runs."""
        return self._process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns its exit code."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, if it has not ended."""
        self._process.kill()


def _run(arguments: list[str], directory: Path, log: Path, environment: dict[str, str]) -> None:
    """Be the script."""
    os.setsid()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    os.close(output)
    faulthandler.enable()
    sys.argv = arguments
    of_the_test = ("", str(Path(__file__).parent.parent))
    sys.path[:] = [str(Path(arguments[0]).absolute().parent), *(each for each in sys.path if each not in of_the_test)]
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        # `multiprocessing` ends a process without them.
        atexit._run_exitfuncs()
