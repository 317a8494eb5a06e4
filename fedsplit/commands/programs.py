"""Programs that run side by side as children: started, watched, and always ended.

Each child has a log file of its own, and a session of its own, so that a terminal's Ctrl-C reaches only the
parent, which passes it on once. However the block of `Programs` is left, no child is left running: each is
sent SIGINT, given ``STOP_S`` seconds, then killed by its id. A parent that is itself killed by SIGKILL can
do nothing: on Linux the kernel then sends its children SIGTERM (`PR_SET_PDEATHSIG`); elsewhere they go on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from fedsplit.engines.processes import tie_to_parent
from fedsplit.errors import RunFailedError, RunStoppedError

STOP_S = 10.0
_POLL_S = 0.02
_TAIL_BYTES = 65536
_TAIL_LINES = 12


class Program:
    """One child.

    Parameters
    ----------
    name
        For people: ``trainer of rank 1``.
    module
        What is run, as ``python -m module``.
    arguments
        Its flags.
    log
        Where its output goes; what an earlier run left there is dropped.

    Attributes
    ----------
    exit_code : int or None
        None while it runs; negative if a signal ended it, as in `subprocess`.
    """

    def __init__(self, name: str, module: str, arguments: Sequence[str], log: Path) -> None:
        self.name = name
        self.module = module
        self.arguments = list(arguments)
        self.log = log
        self.exit_code: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not been seen to end."""
        return self._process is not None and self.exit_code is None

    def start(self, environment: Mapping[str, str]) -> None:
        """Start it."""
        # A stream that grows, so not one for the writers of files.py, which put whole files into place.
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module, *self.arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(environment),
                start_new_session=True, preexec_fn=tie_to_parent(),
            )  # fmt: skip
        finally:
            os.close(log)

    def poll(self) -> int | None:
        """Look whether it has ended; returns its exit code if so."""
        if self._process and self.exit_code is None:
            self.exit_code = self._process.poll()
        return self.exit_code

    def send(self, number: signal.Signals) -> None:
        """Send it a signal if it still runs; an id that may be another's by now is never signalled."""
        if self._process:
            self._process.send_signal(number)

    def describe_end(self) -> str:
        """Say how it ended."""
        code = self.exit_code
        if code is None:
            return f"the {self.name} did not end"
        if code < 0:
            return f"the {self.name} was killed by {signal.Signals(-code).name}"
        return f"the {self.name} ended with exit code {code}"

    def tail(self) -> str:
        """Return the last lines of its log."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError as exc:
            return f"(cannot be read: {exc.strerror})"
        return "\n".join(lines[-_TAIL_LINES:]) or "(empty)"


class Programs:
    """A number of children for the length of a block.

    Parameters
    ----------
    programs
        What to start, in this order.
    environment
        For all of them.
    hurry
        Asked while they are being stopped: true kills what is left at once.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        environment: Mapping[str, str],
        hurry: Callable[[], bool] = lambda: False,
    ) -> None:
        self.programs = list(programs)
        self._environment = environment
        self._hurry = hurry
        self._failed: list[Program] = []

    def __enter__(self) -> Self:
        try:
            for program in self.programs:
                program.start(self._environment)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def poll(self) -> None:
        """Look who has ended."""
        for program in self.programs:
            if program.is_running and program.poll():
                self._failed.append(program)

    @property
    def running(self) -> list[Program]:
        """Those that have not been seen to end."""
        return [program for program in self.programs if program.is_running]

    @property
    def failed(self) -> list[Program]:
        """Those that ended badly, the likely cause first, those that ended because another did last."""
        followed = (RunStoppedError.exit_code, RunFailedError.exit_code)
        return sorted(self._failed, key=lambda program: (program.exit_code in followed, self.programs.index(program)))

    def settle(self, seconds: float) -> None:
        """Wait until all have ended, at most so long: who fails for the same reason is then known too."""
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline and not self._hurry():
            time.sleep(_POLL_S)
            self.poll()

    def stop(self) -> None:
        """End all that still run: asked first, killed after ``STOP_S`` s. How they end then is no failure."""
        self._send_and_wait(signal.SIGINT, self._hurry)
        self._send_and_wait(signal.SIGKILL, lambda: False)

    def _send_and_wait(self, number: signal.Signals, hurry: Callable[[], bool]) -> None:
        for program in self.running:
            program.send(number)
        deadline = time.monotonic() + STOP_S
        while self.running and time.monotonic() < deadline and not hurry():
            time.sleep(_POLL_S)
            for program in self.running:
                program.poll()
