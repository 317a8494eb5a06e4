"""What every benchmark needs: processes that are watched and ended, samples and their summary, the machine's name.

Figures are noisy on a shared machine. So a comparison always runs both sides in turns within the same minute, a figure
is the median of its samples with the spread beside it, and what is judged is the ratio, not the time.
"""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedsplit.engines.forked import Forked
from fedsplit.engines.processes import free_port as free_port
from fedsplit.run.history import read_history

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Peaks and processor time only grow: looking often would only take time from what is measured.
_WATCH_S = 0.1
# Flower calls home unless it is told not to; the interpreter finds this package from anywhere, and keeps bytecode, as
# it does on its own and some images forbid: without it an import of torch takes twice as long.
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "", "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}  # fmt: skip


class BenchmarkError(Exception):
    """A program that is measured did not do what it should; says which, and how its log ends."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How thorough a run is."""

    quick: bool = False
    tiny: bool = False
    large: bool = False

    def pick(self, usual: int, quick: int, tiny: int) -> int:
        """Choose a number by how thorough the run is."""
        return tiny if self.tiny else quick if self.quick else usual


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table.

    Attributes
    ----------
    samples
        What was measured, in `unit`.
    peer, peer_samples
        What it is compared with, measured in the same minute.
    target
        What is to be reached: `judged` is at most this, of a ``speedup`` and with `at_least` at least.
    judged_by
        ``ratio`` (median / the peer's median), ``speedup`` (the other way round), ``difference`` (in `unit`), or
        ``median``.
    missing
        Why there is no figure.
    """

    topic: str
    name: str
    unit: str
    samples: Sequence[float] = ()
    peer: str = ""
    peer_samples: Sequence[float] = ()
    judged_by: str = "median"
    target: float | None = None
    at_least: bool = False
    note: str = ""
    missing: str = ""

    @property
    def median(self) -> float | None:
        """The median of the samples."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def peer_median(self) -> float | None:
        """The median of the peer's samples."""
        return statistics.median(self.peer_samples) if self.peer_samples else None

    @property
    def judged(self) -> float | None:
        """The number that is compared with the target."""
        ours, theirs = self.median, self.peer_median
        if ours is None or self.judged_by == "median":
            return ours
        if theirs is None:
            return None
        if self.judged_by == "difference":
            return ours - theirs
        return ours / theirs if self.judged_by == "ratio" else theirs / ours

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None if there is none or nothing to compare."""
        if self.judged is None or self.target is None:
            return None
        return self.judged >= self.target if self.wants_more else self.judged <= self.target

    @property
    def wants_more(self) -> bool:
        """Whether the target is the least that is to be reached."""
        return self.at_least or self.judged_by == "speedup"

    def to_json(self) -> dict[str, Any]:
        """Return the figure with what follows from it."""
        derived = {name: getattr(self, name) for name in ("median", "peer_median", "judged", "reached")}
        spreads = {"spread": spread(self.samples), "peer_spread": spread(self.peer_samples)}
        return asdict(self) | derived | spreads


def spread(samples: Sequence[float]) -> tuple[float, float] | None:
    """Return the first and third quartile; with fewer than four samples the least and the largest."""
    if not samples:
        return None
    if len(samples) < 4:
        return min(samples), max(samples)
    first, _, third = statistics.quantiles(samples, n=4)
    return first, third


def machine() -> dict[str, Any]:
    """Name the machine and the versions that were measured."""
    packages = {}
    for name in ("fedsplit", "flwr", "torch", "numpy", "grpcio", "safetensors", "filelock"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "system": platform.platform(), "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)), "memory_gb": round(_memory_bytes() / 1e9, 1),
        "python": platform.python_version(), "packages": packages, "load_average": load,
        "commit": _commit(),
    }  # fmt: skip


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@contextmanager
def scratch_directory(base: Path | None = None) -> Iterator[Path]:
    """Make a directory on the RAM disk, or elsewhere, and remove it; a disk's fsync is not what is measured here."""
    base = base or Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="fedsplit-bench-", dir=base if base.is_dir() else None))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def wait_for_port(port: int, timeout_s: float = 60.0) -> None:
    """Wait until something listens at a port of loopback."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@dataclass
class Program:
    """A process under watch: its log, its peak of memory, the processor time it took."""

    name: str
    process: subprocess.Popen[bytes] | Forked
    log_path: Path
    peak_bytes: int = 0
    cpu_s: float = 0.0

    def look(self) -> None:
        """Read the peak of memory and the processor time; both only grow."""
        status = Path(f"/proc/{self.process.pid}")
        try:
            text = (status / "status").read_text()
            fields = (status / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            return
        for line in text.splitlines():
            if line.startswith("VmHWM:"):
                self.peak_bytes = max(self.peak_bytes, int(line.split()[1]) * 1024)
        self.cpu_s = max(self.cpu_s, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))

    def log(self) -> str:
        """Return what it has printed."""
        return self.log_path.read_text(errors="replace")

    def run_s(self) -> float:
        """Return the processor time of its threads so far, to the microsecond; of those that have ended nothing."""
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9

    def now_bytes(self) -> int:
        """Return the memory it has now."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        return 0


class Programs:
    """Processes of one measurement: started here, watched, and ended here, each by its own handle.

    `forked` ones start as those of ``fedsplit run`` do, which is quick: for what is not about starting.
    """

    def __init__(
        self, directory: Path, environment: Mapping[str, str] | None = None, *, forked: bool = False
    ) -> None:  # fmt: skip
        self.directory = directory
        self._forked = forked
        self.all: dict[str, Program] = {}
        self._environment = os.environ | ENVIRONMENT | dict(environment or {})
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Programs:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()
        for program in self.all.values():
            if program.process.poll() is None:
                program.process.kill()
            program.process.wait(30)

    def start(self, name: str, *arguments: str) -> Program:
        """Start a Python program: a file's name or ``-m module``, and its flags."""
        log_path, command = self.directory / f"{name}.log", [sys.executable, *arguments]
        process: subprocess.Popen[bytes] | Forked
        if self._forked and Forked.can_run(command):
            process = Forked(command, self._environment, log_path, ROOT)
        else:
            with log_path.open("wb") as log:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
        program = self.all[name] = Program(name, process, log_path)
        return program

    def wait(self, names: Sequence[str] | None = None, timeout_s: float = 600.0) -> None:
        """Wait until programs have ended; one that fails ends the measurement."""
        deadline = time.monotonic() + timeout_s
        waiting = [self.all[name] for name in names or self.all]
        while waiting:
            for program in waiting:
                code = program.process.poll()
                if code:
                    raise BenchmarkError(f"{program.name} ended with exit code {code}\n{self.tails()}")
            waiting = [program for program in waiting if program.process.poll() is None]
            self._check_time(deadline, timeout_s)
            time.sleep(0.02)

    def check(self) -> None:
        """Raise if a program has failed."""
        for program in self.all.values():
            if code := program.process.poll():
                raise BenchmarkError(f"{program.name} ended with exit code {code}\n{self.tails()}")

    def wait_for(self, name: str, text: str, timeout_s: float = 120.0) -> None:
        """Wait until a program has printed a text."""
        deadline = time.monotonic() + timeout_s
        while text not in self.all[name].log():
            if self.all[name].process.poll() is not None:
                raise BenchmarkError(f"{name} ended before it printed {text!r}\n{self.tails()}")
            self._check_time(deadline, timeout_s)
            time.sleep(0.01)

    def interrupt(self, name: str) -> None:
        """Ask a program to end."""
        process = self.all[name].process
        if process.poll() is None:
            process.send_signal(signal.SIGINT)

    def tails(self) -> str:
        """Return the end of every log."""
        return "\n".join(f"--- {program.name}\n{program.log()[-1500:]}" for program in self.all.values())

    def _check_time(self, deadline: float, timeout_s: float) -> None:
        if time.monotonic() > deadline:
            raise BenchmarkError(f"not done within {timeout_s:g} s\n{self.tails()}")

    def _watch(self) -> None:
        while not self._done.wait(_WATCH_S):
            for program in list(self.all.values()):
                program.look()


def history_of_run(*flags: str, timeout_s: float = 1200.0) -> tuple[list[dict[str, Any]], int]:
    """Do ``fedsplit run`` with flags in a fresh directory; returns the lines of its history, and the state's bytes."""
    with scratch_directory() as directory, Programs(directory) as programs:
        places = ("--exchange-dir", str(directory / "exchange"), "--checkpoint-dir", str(directory / "checkpoints"))
        try:
            programs.start("run", "-m", "fedsplit", "run", *flags, *places)
            programs.wait(timeout_s=timeout_s)
        finally:
            programs.interrupt("run")  # it ends what it has started
            programs.all["run"].process.wait(60)
        server = directory / "checkpoints" / "server"
        return read_history(server / "history.jsonl"), max(server.glob("round-*/state.safetensors")).stat().st_size


@dataclass(kw_only=True)
class Federation:
    """The real programs with a workload that trains nothing, on a directory of the RAM disk.

    Attributes
    ----------
    model_bytes
        Size of the model.
    store
        ``auto`` or ``none``: by reference, or with the bytes in messages.
    sleep_s
        For so long rank 1 sleeps in each training.
    """

    directory: Path
    rounds: int
    model_bytes: int
    ranks: int = 2
    store: str = "auto"
    engine: str = "embedded"
    workload: Sequence[str] = field(default_factory=tuple)
    rules: Sequence[str] = ()
    client_flags: Sequence[str] = ()
    sleep_s: float = 0.0

    def run(self, timeout_s: float = 600.0) -> tuple[list[float], Programs]:
        """Run to the end; returns the seconds of each full round but the first, and the programs."""
        with Programs(self.directory) as programs:
            self.start(programs)
            programs.wait(timeout_s=timeout_s)
        return periods(self.directory / "stamps-1"), programs

    def start(self, programs: Programs) -> None:
        """Start all programs at once."""
        port = free_port()
        address = f"127.0.0.1:{port}"
        exchange, checkpoints = self.directory / "exchange", self.directory / "checkpoints"
        ranks = [str(rank) for rank in range(1, self.ranks + 1)]
        workload = self.workload or (
            "--workload", "benchmarks.noop:noop", "--workload-option", f"bytes={self.model_bytes}",
            "--workload-option", f"stamps={self.directory}", "--workload-option", f"sleep={self.sleep_s}",
            "--threads", "1",
        )  # fmt: skip
        programs.start(
            "server", "server_main.py", "--address", address, "--rounds", str(self.rounds),
            "--min-clients", str(self.ranks), "--checkpoint-dir", str(checkpoints), "--payload-store", self.store,
            "--engine", self.engine, *(text for rule in self.rules for text in ("--aggregate", rule)),
        )  # fmt: skip
        for rank in ranks:
            programs.start(
                f"client-{rank}", "client_main.py", "--rank", rank, "--server-address", address,
                "--exchange-dir", str(exchange), "--payload-store", self.store, "--engine", self.engine,
                *self.client_flags,
            )  # fmt: skip
        for rank in ranks:
            programs.start(
                f"model-{rank}", "model_main.py", "--rank", rank, "--exchange-dir", str(exchange),
                "--checkpoint-dir", str(checkpoints), "--num-partitions", str(self.ranks), *workload,
            )  # fmt: skip


@dataclass(kw_only=True)
class StockFederation:
    """Flower as its quickstart has it: training inside a NumPyClient, the same engine, the same number of bytes."""

    directory: Path
    rounds: int
    model_bytes: int
    ranks: int = 2

    def run(self, timeout_s: float = 600.0) -> tuple[list[float], Programs]:
        """Run to the end; returns the seconds of each full round but the first, and the programs."""
        with Programs(self.directory) as programs:
            port = str(free_port())
            shape = ["--bytes", str(self.model_bytes), "--stamps", str(self.directory)]
            programs.start(
                "server", "-m", "benchmarks.stock", "server", "--port", port, "--rounds", str(self.rounds),
                "--ranks", str(self.ranks),
            )  # fmt: skip
            for rank in range(1, self.ranks + 1):
                programs.start(
                    f"client-{rank}", "-m", "benchmarks.stock", "client", "--port", port, "--rank", str(rank), *shape
                )
            programs.wait(timeout_s=timeout_s)
        return periods(self.directory / "stamps-1"), programs


def stamp(directory: Path | str, rank: int) -> None:
    """Note that the user's training code of a rank was called just now, with the round's state in its hands."""
    with (Path(directory) / f"stamps-{rank}").open("a") as file:
        file.write(f"{time.monotonic()!r}\n")


def stamps(path: Path) -> list[float]:
    """Return the moments that `stamp` noted, in seconds of the machine's monotonic clock."""
    return [float(line) for line in path.read_text().split()]


def periods(path: Path) -> list[float]:
    """Return the seconds from each call of the training code to the next, without the first, which warms up."""
    return [after - before for before, after in itertools.pairwise(stamps(path)[1:])]


def interleaved(repeats: int, sides: Mapping[str, Callable[[Path], Sequence[float]]]) -> dict[str, list[float]]:
    """Run each side in turns, each time in a fresh directory; returns all samples by side."""
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, measure in sides.items():
            with scratch_directory() as directory:
                samples[name] += measure(directory)
    return samples
