"""How far a round is from what the machine can do: its processor time, and that of the work that cannot be left out.

By reference, a round of two clients writes the state three times (two results, the new state), digests it as often,
while it is written, copies it into a model four times (two trainers, for training and for evaluation), and merges two
updates, each of which it looks through for NaN and averages. With a few cores and more processes than that, a round
cannot be shorter than its processor time divided by the cores.

In messages, what cannot be left out besides is gRPC's: the same bytes in the same pieces between a server and two
clients (`benchmarks.bare`). And of a small round, two questions to each client and their answers.

Why the exchange belongs on a RAM disk: the same round with everything on the disk of the system's temporary directory.
And a merge, against the two passes over the updates that it cannot do without.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import bare
from benchmarks.common import Federation, Figure, Options, StockFederation, scratch_directory
from benchmarks.merge import in_turns
from benchmarks.rounds import LARGE, SMALL

TOPIC = "limits"
_CORES = len(os.sched_getaffinity(0))


def run(options: Options) -> list[Figure]:
    """Measure."""
    size = LARGE if not options.tiny else 5_000_000
    few, many = options.pick(6, 6, 3), options.pick(26, 16, 5)
    over, new = _written_ms(size)
    floor = [_floor_ms(size) for _ in range(options.pick(7, 5, 2))]
    large = _processor_ms(lambda directory, rounds: _detached(directory, rounds, size), few, many)
    messages = _processor_ms(lambda directory, rounds: _detached(directory, rounds, size, "none"), few, many)
    bytes_alone = _processor_ms(lambda directory, rounds: bare.run(directory, rounds, size), few, 4 * many)
    small_many = options.pick(410, 210, 12)
    small = _processor_ms(lambda directory, rounds: _detached(directory, rounds, SMALL), 10, small_many)
    stock = _processor_ms(_stock, 10, small_many)
    questions_alone = _processor_ms(lambda directory, rounds: bare.run(directory, rounds, 0), 10, 10 * small_many)
    note = f"processor time of all programs in a round / {_CORES} cores"
    disk, ram = _round_ms(size, few, Path(tempfile.gettempdir())), _round_ms(size, few, None)
    with scratch_directory() as directory:
        merged = in_turns(directory, size, 10, options.pick(5, 3, 1), ("ours",))["ours"]
    return [
        Figure(topic=TOPIC, name="100 MB by reference", unit="ms", samples=[large], note=note,
               peer="its writing, digesting, copying and merging alone", peer_samples=floor, judged_by="ratio",
               target=1.3),
        Figure(topic=TOPIC, name="100 MB written over a file that is there", unit="ms", samples=over,
               peer="into a new one", peer_samples=new, judged_by="ratio"),
        Figure(topic=TOPIC, name="100 MB in messages", unit="ms", samples=[messages], note=note,
               peer="gRPC alone with the same bytes", peer_samples=[bytes_alone], judged_by="ratio"),
        Figure(topic=TOPIC, name="0.1 MB by reference, beside gRPC", unit="ms", samples=[small], note=note,
               peer="gRPC alone with as many messages", peer_samples=[questions_alone], judged_by="difference"),
        Figure(topic=TOPIC, name="0.1 MB by reference", unit="ms", samples=[small], note=note,
               peer="Flower in-process NumPyClient", peer_samples=[stock], judged_by="difference"),
        Figure(topic=TOPIC, name="round of 100 MB by reference, on the disk", unit="ms", samples=disk,
               peer="on the RAM disk", peer_samples=ram, judged_by="ratio"),
        Figure(topic=TOPIC, name="merge of 10 x 100 MB", unit="ms", samples=[1000 * each["seconds"] for each in merged],
               peer="its looking for NaN and averaging alone", peer_samples=[_merge_floor_ms(size)], judged_by="ratio"),
    ]  # fmt: skip


def _processor_ms(run: Callable[[Path, int], float], few: int, many: int) -> float:
    """Return the processor time of one more round, in ms and divided by the cores: starting up cancels out."""
    seconds = []
    for rounds in (few, many):
        with scratch_directory() as directory:
            seconds.append(run(directory, rounds))
    return 1000 * (seconds[1] - seconds[0]) / (many - few) / _CORES


def _round_ms(size: int, rounds: int, base: Path | None) -> list[float]:
    with scratch_directory(base) as directory:
        return [1000 * seconds for seconds in Federation(directory=directory, rounds=rounds, model_bytes=size).run()[0]]


def _detached(directory: Path, rounds: int, size: int, store: str = "auto") -> float:
    _, programs = Federation(directory=directory, rounds=rounds, model_bytes=size, store=store).run()
    return sum(program.cpu_s for program in programs.all.values())


def _stock(directory: Path, rounds: int) -> float:
    _, programs = StockFederation(directory=directory, rounds=rounds, model_bytes=SMALL).run()
    return sum(program.cpu_s for program in programs.all.values())


def _floor_ms(size: int) -> float:
    """Return what a round's writing, digesting, copying and merging take, one after the other, divided by the cores."""
    import torch

    written, hashed, copied = passes_ms(size)
    model = torch.empty(size // 4)
    merged = _milliseconds(model.sum) + _milliseconds(lambda: model.lerp_(model, 0.5))
    return (3 * written + 3 * hashed + 4 * copied + 2 * merged) / _CORES


def passes_ms(size: int) -> tuple[float, float, float]:
    """Return the ms to write so many bytes to the RAM disk, to digest them, and to copy them into a tensor."""
    import torch

    torch.set_num_threads(1)
    content, model = bytearray(os.urandom(size)), torch.empty(size // 4)
    with scratch_directory() as directory:
        path = directory / "state"

        def write() -> None:
            # Over what is there: most payloads are written over one that nobody needs any more.
            with path.open("r+b" if path.exists() else "wb", buffering=0) as file:
                file.write(content)

        def copy() -> None:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            model.copy_(torch.frombuffer(mapped, dtype=torch.float32))

        return (
            _milliseconds(write), _milliseconds(lambda: hashlib.sha256(content).digest()), _milliseconds(copy)
        )  # fmt: skip


def _written_ms(size: int) -> tuple[list[float], list[float]]:
    """Return the ms to write so many bytes over a file of the RAM disk, and into a new one after removing it."""
    content, over, new = bytearray(os.urandom(size)), list[float](), list[float]()
    with scratch_directory() as directory:
        path = directory / "state"

        def write() -> None:
            with path.open("r+b" if path.exists() else "wb", buffering=0) as file:
                file.write(content)

        def write_new() -> None:
            path.unlink(missing_ok=True)
            write()

        for _ in range(5):
            new.append(_milliseconds(write_new))
            over.append(_milliseconds(write))
    return over, new


def _merge_floor_ms(size: int) -> float:
    """Return what it takes to add up ten updates once each, and to average them into memory that is there."""
    import torch

    mean, update = torch.rand(size // 4), torch.rand(size // 4)
    torch.set_num_threads(_CORES)
    return 10 * (_milliseconds(update.sum) + _milliseconds(lambda: mean.lerp_(update, 0.5)))


def _milliseconds(work: Callable[[], object]) -> float:
    samples = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        samples.append(1000 * (time.perf_counter() - began))
    return statistics.median(samples)
