"""The programs of a federation as child processes: watched together, started again, shown, and ended.

They are a server, first, and a client and a trainer for each rank. Nobody is left running, whatever happens.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from fedsplit.engines.processes import Child, handled_signals
from fedsplit.errors import RunFailedError, RunStoppedError, UsageError

log = logging.getLogger("fedsplit")

_POLL_S = 0.05
# How long a program has to end by itself once it is asked to.
_STOP_S = 10.0
# When one has failed, the others are given a moment: they may fail for the same reason, or be the reason.
_SETTLE_S = 2.0
# When one has ended well, the run is over and the others have this long; a goodbye takes up to 10 s.
_FAREWELL_S = 30.0
# Exit codes of programs that end because another one did.
_FOLLOWED = (RunStoppedError.exit_code, RunFailedError.exit_code)


class Restarts:
    """Starts programs again that died, each so many times; `run_file` tells whether the server began its run."""

    def __init__(self, children: Sequence[Child], environment: Mapping[str, str], run_file: Path, most: int) -> None:
        self._server, self._environment = children[0], environment
        self._left, self._most = dict.fromkeys(children, most), most
        self._run_file, self._before = run_file, _read(run_file)
        self.told: list[str] = []

    def revive(self, child: Child) -> bool:
        """Start a program again, unless that is of no use or it was done often enough; tell whether it was started."""
        code = child.exit_code or 0
        if child is self._server and code < 0 and sys.stderr.isatty():
            # What is said next must not go on in the last line of its table.
            print(file=sys.stderr)
        # A server that ended by itself has told the others that the run is over.
        if not self._left[child] or code in (UsageError.exit_code, *_FOLLOWED) or (child is self._server and code > 0):
            return False
        self._left[child] -= 1
        # Before that, an earlier run may be there, and would go on.
        if child is self._server and _read(self._run_file) != self._before and "--resume" not in child.command:
            child.command.append("--resume")
        self.told.append(child.describe_end())
        log.warning("%s; starting it again (%d of %d)", self.told[-1], self._most - self._left[child], self._most)
        # What it has started must not be in the way.
        child.kill()
        child.start(self._environment)
        return True


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def watch(
    children: Sequence[Child], received: Sequence[signal.Signals], revive: Callable[[Child], bool],
    may_stay: Callable[[Child], bool],
) -> list[Child]:  # fmt: skip
    """Watch until all have ended, one has failed, or a signal came; returns those that failed, the cause first.

    What `may_stay` has all the time it wants once the run is over.
    """
    over_since: float | None = None
    while not received:
        if dead := [child for child in children if child.poll() and not revive(child)]:
            for child in dead:
                child.kill()  # what it has started
            _settle(children, _SETTLE_S, lambda: bool(received))
            failed = [child for child in children if child.exit_code]
            return sorted(failed, key=lambda child: (child.exit_code in _FOLLOWED, child not in dead))
        running = [child for child in children if child.exit_code is None]
        if not running:
            break
        if len(running) < len(children):
            over_since = over_since or time.monotonic()
            if time.monotonic() - over_since > _FAREWELL_S:
                _check_late(children, running, may_stay)
                over_since = None
        time.sleep(_POLL_S)
    return []


def _check_late(children: Sequence[Child], running: Sequence[Child], may_stay: Callable[[Child], bool]) -> None:
    """Raise RunFailedError if something is wrong with those that still run, long after another program has ended."""
    ended, names = [child for child in children if child not in running], ", ".join(child.name for child in running)
    if children[0] in running and all(child.name.startswith("trainer") for child in ended):
        raise RunFailedError(
            f"{ended[0].describe_end()}, and {_FAREWELL_S:.0f} s later the run was not over; a trainer has to "
            f"answer tasks until then; its log is {ended[0].log}"
        )
    if not all(map(may_stay, running)):
        raise RunFailedError(
            f"the run is over, but {_FAREWELL_S:.0f} s later these still ran and were stopped: {names}; see their logs"
        )
    log.info("the run is over; waiting for the end of: %s", names)


def explain(failed: Sequence[Child]) -> str:
    """Say how programs ended, and of the first what it said."""
    first = failed[0]
    text = f"{first.describe_end()}; what it said is above"
    if first.log:
        lines = "".join(f"\n    {line}" for line in first.tail().splitlines())
        text = f"{first.describe_end()}; the last lines of its log, {first.log}:{lines}"
    return text + "".join(f"\nalso {child.describe_end()}" for child in failed[1:])


def _settle(children: Sequence[Child], seconds: float, hurry: Callable[[], bool]) -> None:
    """Wait until all have ended, at most so long, and no longer once ``hurry`` says so."""
    deadline = time.monotonic() + seconds
    while any(child.is_running for child in children) and time.monotonic() < deadline and not hurry():
        time.sleep(_POLL_S)


def end(children: Sequence[Child], received: Sequence[signal.Signals], seconds: float = _STOP_S) -> None:
    """End all that still run: asked by SIGINT, and killed if that takes too long or the user is in a hurry."""
    running = [child for child in children if child.is_running]
    for child in running:
        child.send(signal.SIGINT)
    _settle(running, seconds, lambda: len(received) > 1)
    for child in running:
        child.kill()


@contextmanager
def shown(children: Sequence[Child]) -> Iterator[None]:
    """Show the lines of the logs as they come, each behind the name of its program, for the length of a block."""
    over = threading.Event()

    def show() -> None:
        with ExitStack() as stack, suppress(BrokenPipeError):
            logs = [(path, stack.enter_context(path.open("rb"))) for child in children if (path := child.log)]
            is_last = False
            while not is_last:
                is_last = over.wait(_POLL_S)
                for path, lines in logs:
                    _show_new(path.stem.replace("-", " "), lines, is_last=is_last)

    thread = threading.Thread(target=show)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _show_new(name: str, lines: IO[bytes], *, is_last: bool) -> None:
    while line := lines.readline():
        if not line.endswith(b"\n") and not is_last:
            # The rest of it is still to come.
            lines.seek(-len(line), os.SEEK_CUR)
            return
        print(f"{name} | {line.decode('utf-8', 'replace').rstrip()}", flush=True)


@contextmanager
def received_signals() -> Iterator[list[signal.Signals]]:
    """Collect signals instead of being interrupted: each is acted on between two steps, not inside one."""
    received: list[signal.Signals] = []
    with handled_signals(received.append):
        yield received
