"""Child processes: started, watched, and always ended, together with everything that they start in turn.

A child gets a session of its own, so that a terminal's Ctrl-C reaches only this process, which ends its children in
order. If this process is killed, the kernel sends its children SIGTERM (on Linux; elsewhere they go on).
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from fedsplit.engines.forked import Forked

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STOP_S = 10.0
_POLL_S = 0.02
_TAIL_LINES = 12
_PR_SET_PDEATHSIG = 1


class Child:
    """A child process. Its output goes to the file `log`; without one, to this process's stderr.

    `exit_code` is None until `poll` or `is_running` found that it has ended; the negative number of a signal, as in
    `subprocess`.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path | None = None) -> None:
        self.name, self.command, self.log = name, list(command), log
        self.exit_code: int | None = None
        self._process: subprocess.Popen[bytes] | Forked | None = None

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self.poll() is None

    def start(self, environment: Mapping[str, str]) -> None:
        """Start it with these environment variables; raises OSError if it or its log cannot be opened.

        Its log is empty then; once it has ended it may be started again, and its log goes on.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if self._process else os.O_TRUNC)
        self.exit_code = None
        output = None if self.log is None else os.open(self.log, flags, 0o600)
        try:
            # Of our own programs only: what a user's script imports, or expects of its process, is not known.
            if self.command[1:3] == ["-m", "fedsplit"] and Forked.can_run(self.command):
                self._process = Forked(self.command, environment, self.log)
                return
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=dict(environment),
                start_new_session=True, preexec_fn=_tie_to_parent(),
            )  # fmt: skip
        finally:
            if output is not None:
                os.close(output)

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        if self._process and self.exit_code is None:
            self.exit_code = self._process.poll()
        return self.exit_code

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the child alone, not to what it started; does nothing once it has ended."""
        if self._process:
            self._process.send_signal(number)

    def stop(self) -> None:
        """End it and everything that it started: SIGTERM, then SIGKILL after ten seconds."""
        if not self._end_group(signal.SIGTERM):
            self.kill()

    def kill(self) -> None:
        """End it and everything that it started at once."""
        self._end_group(signal.SIGKILL)

    def _end_group(self, number: signal.Signals) -> bool:
        """Signal the whole process group; tell whether no process of it is left."""
        if self._process is None:
            return True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
        deadline = time.monotonic() + _STOP_S
        while time.monotonic() < deadline:
            has_ended = self.poll() is not None
            try:
                os.killpg(self._process.pid, 0)
            except ProcessLookupError:
                if has_ended:
                    return True
                # What was forked a moment ago has no group of its own yet.
                self._process.send_signal(number)
            time.sleep(_POLL_S)
        return False

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
        if self.log is None:
            return "(see above)"
        try:
            lines = self.log.read_text("utf-8", "replace").splitlines()
        except OSError as exc:
            return f"(cannot be read: {exc.strerror})"
        return "\n".join(lines[-_TAIL_LINES:]) or "(empty)"


def _tie_to_parent() -> Callable[[], None] | None:
    """Return what a child calls first so that the kernel ends it with its parent; None where there is no such call."""
    if not sys.platform.startswith("linux"):
        return None
    # Looked up here: between fork and exec as little as possible should happen.
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # the parent died before the call
            os._exit(1)

    return tie


@contextlib.contextmanager
def handled_signals(handle: Callable[[signal.Signals], object]) -> Iterator[None]:
    """Give every signal that asks to stop to a function, for the length of a block."""
    previous = {each: signal.signal(each, lambda number, _: handle(signal.Signals(number))) for each in _SIGNALS}
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def free_port() -> int:
    """Return a port of loopback that nothing listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
