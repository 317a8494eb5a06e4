"""What the tests of complicated training share: federations whose trainers are any program, and clients in the test."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedsplit.exchange.records import ResultRecord
from tests.bounds import BOUND_S
from tests.programs import ROOT, Programs
from tests.test_trainer import Federation as HandOff

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@dataclass
class Federation(Programs):
    """Five programs of which the trainers are started by any command; ``{rank}`` in it is the rank.

    ``trainer`` is what follows the interpreter, or a whole command if it begins with one.
    """

    trainer: Sequence[str] = ()

    def command(self, name: str) -> list[str]:
        kind, _, rank = name.partition("-")
        if kind != "model":
            return super().command(name)
        return [part.format(rank=rank) for part in self.trainer]

    def children(self, name: str) -> list[psutil.Process]:
        """Return what a program has started, and what these have."""
        try:
            return psutil.Process(self.processes[name].pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def stop(self) -> None:
        """Kill what still runs, with what it has started: torchrun's processes would outlive it."""
        children = [child for name in self.processes for child in self.children(name)]
        super().stop()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, 10)

    def metric(self, name: str) -> list[float]:
        """Return a metric of the evaluation, round after round."""
        return [line["evaluate"][name] for line in self.history()]  # type: ignore[index]


@contextlib.contextmanager
def federation(directory: Path, **settings: object) -> Iterator[Federation]:
    """A federation that leaves nothing running; the repository can be imported from, as ``examples`` and ``tests``."""
    for name in ("examples", "tests"):
        (directory / name).symlink_to(ROOT / name)
    found = Federation(directory, **settings)  # type: ignore[arg-type]
    try:
        yield found
    finally:
        found.stop()


def run_to_the_end(found: Federation, timeout_s: float = BOUND_S) -> None:
    """Start all programs and see that all end well."""
    found.start_all()
    end_well(found, timeout_s)


def end_well(found: Federation, timeout_s: float = BOUND_S) -> None:
    """See that all programs end, and end well."""
    codes = found.wait(timeout_s)
    assert codes == dict.fromkeys(codes, 0), f"{codes}\n{found.tails()}"


class Client(HandOff):
    """The client of `tests.test_trainer`, with patience: several processes have to start before the first answer."""

    def wait(self, version: int) -> ResultRecord:
        wait_until(lambda: self.client.result(version) is not None)
        found = self.client.result(version)
        assert found is not None
        return found


def kill_a_process(found: Federation, name: str, process: int) -> None:
    """Kill one of the processes that torchrun has started, as the kernel does when memory runs out."""
    for child in found.children(name):
        if child.environ().get("RANK") == str(process):
            child.send_signal(signal.SIGKILL)
            return
    raise AssertionError(f"{name} has no process {process}\n{found.tails()}")


def wait_until(condition: object, timeout_s: float = BOUND_S) -> None:
    """Wait for a condition, a function without arguments."""
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s")
        time.sleep(0.005)
