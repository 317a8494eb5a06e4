"""Starts the five programs as a user would, on loopback, and ends only what it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from fedsplit.engines.forked import FORKS, PRELOADED, Forked
from fedsplit.run.history import read_history
from tests import held
from tests.bounds import BOUND_S
from tests.ports import free_port

ROOT = Path(__file__).resolve().parent.parent
# Before the first test forks: what the digits need, and the plot at the end.
FORKS.set_forkserver_preload(
    [*PRELOADED, "torch.distributed", "sklearn.datasets", "fedsplit.workloads.image", "fedsplit.trainer.process_group",
     "matplotlib.figure", "matplotlib.ticker", "matplotlib.backends.backend_agg"]
)  # fmt: skip


@dataclass
class Programs:
    """One federation in a directory: its flags, its processes, their logs."""

    directory: Path
    ranks: int = 2
    server_flags: Sequence[str] = ("--rounds", "2")
    client_flags: Sequence[str] = ()
    model_flags: Sequence[str] = ("--threads", "1")
    exchange_dir: Path | None = None
    port: int = field(default_factory=free_port)
    # Whether scripts are forked from a process that has imported what they import; see `Forked`.
    forked: bool = True
    processes: dict[str, subprocess.Popen[bytes] | Forked] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Every program's name."""
        ranks = range(1, self.ranks + 1)
        return ["server", *(f"client-{rank}" for rank in ranks), *(f"model-{rank}" for rank in ranks)]

    @property
    def exchange(self) -> Path:
        return self.exchange_dir or self.directory / "exchange"

    def place(self, name: str) -> str:
        """Return in which place of the exchange a program takes part; none for the server."""
        rank = name.partition("-")[2]
        return f"rank-{rank}" if rank else ""

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def command(self, name: str) -> list[str]:
        """Return the command that a user types for a program."""
        address = f"127.0.0.1:{self.port}"
        kind, _, rank = name.partition("-")
        if kind == "server":
            flags = ["--address", address, "--checkpoint-dir", str(self.checkpoints), *self.server_flags]
        elif kind == "client":
            flags = [
                "--rank",
                rank,
                "--server-address",
                address,
                "--exchange-dir",
                str(self.exchange),
                *self.client_flags,
            ]
        else:
            flags = ["--rank", rank, "--exchange-dir", str(self.exchange), "--checkpoint-dir", str(self.checkpoints),
                     "--num-partitions", str(self.ranks), *self.model_flags]  # fmt: skip
        return [sys.executable, str(ROOT / f"{kind}_main.py"), *flags]

    def start(self, name: str, *extra: str) -> subprocess.Popen[bytes] | Forked:
        """Start a program, or start it again; its output is appended to its log."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        command, log = [*self.command(name), *extra], self.log_path(name)
        if self.forked and Forked.can_run(command):
            process = Forked(command, environment, log, self.directory)
        else:
            with log.open("ab") as output:
                process = subprocess.Popen(
                    command, cwd=self.directory, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                    env=environment, start_new_session=True,
                )  # fmt: skip
        self.processes[name] = process
        self.starts[name] = self.starts.get(name, 0) + 1
        return process

    def start_all(self, order: Sequence[str] | None = None) -> None:
        """Start every program, in the order given."""
        for name in order or self.names:
            self.start(name)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to a program that was started here."""
        process = self.processes[name]
        if process.poll() is None:
            process.send_signal(number)
        if number == signal.SIGKILL:
            process.wait(BOUND_S)

    def wait(self, timeout_s: float = BOUND_S, names: Sequence[str] | None = None) -> dict[str, int]:
        """Wait until programs have ended; returns their exit codes."""
        deadline = time.monotonic() + timeout_s
        codes = {}
        for name in names or self.names:
            try:
                codes[name] = self.processes[name].wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{name} is still running after {timeout_s} s\n{self.tails()}") from None
        return codes

    def wait_for(self, name: str, text: str, timeout_s: float = BOUND_S) -> None:
        """Wait until a program's log has a text."""
        deadline = time.monotonic() + timeout_s
        while text not in self.log(name):
            if time.monotonic() > deadline:
                raise AssertionError(f"{text!r} did not appear in the log of {name}\n{self.tails()}")
            time.sleep(0.02)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = BOUND_S) -> None:
        """Wait for a condition."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.tails()
            time.sleep(0.01)

    def allow(self, rounds: int) -> None:
        """Let trainings that are held end, in all rounds up to this one; see `tests.held`."""
        held.allow(self.directory, rounds)

    def log_path(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def log(self, name: str) -> str:
        """Return what a program has printed so far."""
        path = self.log_path(name)
        return path.read_text(errors="replace") if path.exists() else ""

    def tails(self) -> str:
        """Return the end of every log, for a failing test's message."""
        return "\n".join(f"--- {name}\n{self.log(name)[-1500:]}" for name in self.names)

    def history(self) -> list[dict[str, object]]:
        """Return the lines of history.jsonl."""
        return read_history(self.checkpoints / "server" / "history.jsonl")

    def rounds_finished(self) -> int:
        """Return how many lines the history has, without reading them."""
        history = self.checkpoints / "server" / "history.jsonl"
        return history.read_bytes().count(b"\n") if history.exists() else 0

    def final_state(self) -> Path:
        """Return the payload of the newest checkpoint of the server."""
        return max((self.checkpoints / "server").glob("round-*/state.safetensors"))

    def stop(self) -> None:
        """Kill what still runs; what a killed trainer has forked ends by itself, see `tests.unchanged.Counting`."""
        (self.directory / "over").touch()
        for process in self.processes.values():
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                process.wait(BOUND_S)


@contextlib.contextmanager
def programs(directory: Path, kind: type[Programs] = Programs, **settings: object) -> Iterator[Programs]:
    """A federation that leaves nothing running."""
    federation = kind(directory, **settings)  # type: ignore[arg-type]
    try:
        yield federation
    finally:
        federation.stop()


def programs_of(process: int) -> list[psutil.Process]:
    """Return the programs that `run` has started, which have a session each; not what it forks them from."""
    found = []
    for child in psutil.Process(process).children(recursive=True):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(child.pid) == child.pid:
                found.append(child)
    return found


def still_runs(process: psutil.Process) -> bool:
    """Tell whether a process has not ended; between two looks at it, it may."""
    try:
        # psutil compares start times: an id that was given to another process since is not taken for it.
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
