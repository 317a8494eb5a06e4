"""The same experiment on both of Flower's engines: seconds a round, processes, memory; and a state of over 2 GB.

    python -m benchmarks.engines                     # the digits, five rounds, two clients: as in docs/deployment.md
    python -m benchmarks.engines --bytes 2200000000  # one client, a state of this size in messages, on a SuperLink

Memory is the proportional set size summed over all processes that stand in the experiment's directory, so that what
several processes share counts once; the figure is the highest of a sample every half second. Seconds a round leave out
the first, in which trainers warm up.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from tests.programs import Programs, programs

_LEAST_SAMPLES_S = 0.5


class Filled:
    """A workload that adds one to every number of a state of some size, and evaluates nothing but that."""

    def __init__(self, size: int) -> None:
        import torch

        rows = max(1, size // 400_000_000)
        self.model = torch.nn.Module()
        for index in range(rows):
            self.model.register_buffer(f"part_{index}", torch.zeros(size // rows // 4))

    def train(self, task: Any) -> Any:
        from fedsplit import TrainResult

        for tensor in self.model.buffers():
            tensor.add_(1.0)
        return TrainResult(1, {})

    def evaluate(self, task: Any) -> Any:
        from fedsplit import EvaluateResult

        first = next(self.model.buffers())
        return EvaluateResult(0.0, 1, {"first": float(first[0]), "last": float(first[-1])})


def filled(context: Any) -> Filled:
    """Make the workload: ``--workload-option bytes=N``."""
    return Filled(int(context.options["bytes"]))


def measure(
    engine: str, *, ranks: int, rounds: int, models: tuple[str, ...], server: tuple[str, ...]
) -> dict[str, Any]:
    """Run the five programs once on an engine."""
    with tempfile.TemporaryDirectory(prefix="fedsplit-engines-") as name:
        directory = Path(name)
        flags = ("--engine", engine)
        with programs(
            directory, ranks=ranks, model_flags=models, client_flags=flags,
            server_flags=("--rounds", str(rounds), "--min-clients", str(ranks), *flags, *server),
        ) as federation:  # fmt: skip
            (directory / "benchmarks").symlink_to(Path(__file__).parent)
            federation.start_all()
            processes, memory = watch(federation)
            codes = set(federation.wait(60).values())
            if codes != {0}:
                raise SystemExit(federation.tails())
            lines = federation.history()
            evaluated = lines[-1]["evaluate"]
            if "first" in evaluated and {evaluated["first"], evaluated["last"]} != {float(rounds)}:
                raise SystemExit(f"the state came back with other numbers: {evaluated}, expected {rounds}")
            seconds = [float(str(line["seconds"])) for line in lines][1 if rounds > 1 else 0 :]
            return {
                "engine": engine, "seconds a round": statistics.median(seconds), "most processes": processes,
                "most memory, MB": memory / 1e6, "evaluate": evaluated,
            }  # fmt: skip


def watch(federation: Programs) -> tuple[int, int]:
    """Sample until every program has ended; returns the most processes and the most memory seen."""
    processes = memory = 0
    while any(process.poll() is None for process in federation.processes.values()):
        began = time.monotonic()
        found = [process for process in psutil.process_iter() if _stands_in(process, federation.directory)]
        processes = max(processes, len(found))
        memory = max(memory, sum(map(_memory, found)))
        time.sleep(max(0.0, _LEAST_SAMPLES_S - (time.monotonic() - began)))
    return processes, memory


def _stands_in(process: psutil.Process, directory: Path) -> bool:
    try:
        return process.pid != os.getpid() and process.cwd() == str(directory)
    except psutil.Error:
        return False


def _memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, metavar="N", help="size of a state that travels in messages")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    arguments = parser.parse_args()
    if arguments.bytes:
        models = (
            "--threads",
            "1",
            "--workload",
            "benchmarks.engines:filled",
            "--workload-option",
            f"bytes={arguments.bytes}",
        )
        flags = ("--payload-store", "none", "--keep-checkpoints", "2")
        print(measure("superlink", ranks=1, rounds=2, models=models, server=flags))
        return 0
    for engine in ("embedded", "superlink"):
        print(measure(engine, ranks=2, rounds=arguments.rounds, models=("--threads", "1"), server=()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
