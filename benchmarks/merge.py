"""How fast ten updates of 100 MB become one, and in how much memory: ours against both of Flower's aggregations.

    python -m benchmarks.merge ours --bytes 100000000 --updates 10

Each side is a process of its own that has its updates ready and merges when told to; they take turns. Each has its
updates in memory as gRPC delivers them, and what is timed ends with the payload of the new state. Ours also validates
each update (keys, shapes, dtypes, NaN), as the server does. ``files`` is ours again with updates that lie in files on
the RAM disk, as they do by reference: mapping a gigabyte takes longer than merging it.

Every other merge is timed, as a server finds its memory after the round before; the one before it is measured, from
memory that was given back. Extra memory is the peak during the merge above what there was before it, without mapped
files: their pages are the RAM disk's and stay where they are. ``median``, ``trimmed`` and ``numpy`` are the rules that
must see all updates at once, on forty files, beside `numpy.median` over stretches of the same length.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import ENVIRONMENT, ROOT, BenchmarkError, Figure, Options, scratch_directory

TOPIC = "merge"
LAYERS = 10
SIDES = ("ours", "files", "classic", "message")
ROBUST = ("median", "trimmed", "numpy")


def run(options: Options) -> list[Figure]:
    """Measure."""
    size = options.pick(100_000_000, 100_000_000, 2_000_000)
    updates, repeats, few = 10, options.pick(7, 3, 1), options.pick(3, 1, 1)
    with scratch_directory() as directory:
        samples = in_turns(directory, size, updates, repeats, SIDES)
        many = in_turns(directory, size // 4, 4 * updates, few, ("files",))
        robust = in_turns(directory, size // 4, 4 * updates, few, ROBUST)
    label = f"merge of {updates} x {size / 1e6:g} MB"
    seconds = {side: [1000 * sample["seconds"] for sample in taken] for side, taken in samples.items()}
    models = {side: [sample["extra_bytes"] / size for sample in taken] for side, taken in samples.items()}
    fresh = [sample["extra_bytes"] / (size // 4) for sample in many["files"]]
    return [
        Figure(topic=TOPIC, name=label, unit="ms", samples=seconds["ours"], peer="Flower classic FedAvg",
               peer_samples=seconds["classic"], judged_by="speedup", target=6.0),
        Figure(topic=TOPIC, name=label, unit="ms", samples=seconds["ours"], peer="Flower Message API FedAvg",
               peer_samples=seconds["message"], judged_by="speedup", target=3.0),
        Figure(topic=TOPIC, name=f"{label}, mapped from files", unit="ms", samples=seconds["files"]),
        Figure(topic=TOPIC, name=f"{label}, extra memory", unit="models", samples=models["files"],
               peer="Flower classic FedAvg", peer_samples=models["classic"], target=2.5),
        Figure(topic=TOPIC, name=f"merge of {4 * updates} updates, extra memory", unit="models", samples=fresh,
               target=2.5),
        *(Figure(topic=TOPIC, name=f"{rule} of {4 * updates} x {size / 4e6:g} MB", unit="ms",
                 samples=[1000 * sample["seconds"] for sample in robust[rule]], peer="numpy.median",
                 peer_samples=[1000 * sample["seconds"] for sample in robust["numpy"]], judged_by="ratio")
          for rule in ROBUST[:2]),
        *(Figure(topic=TOPIC, name=f"{rule} of {4 * updates} updates, extra memory", unit="models",
                 samples=[sample["extra_bytes"] / (size // 4) for sample in robust[rule]], target=2.5)
          for rule in ROBUST[:2]),
    ]  # fmt: skip


def in_turns(
    directory: Path, size: int, updates: int, repeats: int, sides: tuple[str, ...]
) -> dict[str, list[dict[str, float]]]:
    """Let each side merge as often, in turns; returns seconds and extra bytes of each time."""
    children = {side: _start(side, directory, size, updates) for side in sides}
    try:
        for child in children.values():
            _say(child, "")  # ready
        samples: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(repeats):
            for side, child in children.items():
                samples[side].append(json.loads(_say(child, "go\n")))
        return samples
    finally:
        for child in children.values():
            child.kill()
            child.wait()


def _start(side: str, directory: Path, size: int, updates: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.merge", side, "--bytes", str(size), "--updates", str(updates),
         "--directory", str(directory)],
        cwd=ROOT, env=os.environ | ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def _say(child: subprocess.Popen[str], text: str) -> str:
    assert child.stdin and child.stdout
    child.stdin.write(text)
    child.stdin.flush()
    line = child.stdout.readline()
    if not line:
        raise BenchmarkError(f"a merging process ended with exit code {child.wait()}")
    return line


# -- in the child ------------------------------------------------------------------------------------------------------


def ours(size: int, updates: int, directory: Path) -> Callable[[], Any]:
    """Our merge, as the server does it, of updates that came in messages."""
    return _ours(size, updates, directory, lambda path: path.read_bytes())


def files(size: int, updates: int, directory: Path) -> Callable[[], Any]:
    """Our merge of updates that came by reference."""
    return _ours(size, updates, directory, lambda path: path)


def median(size: int, updates: int, directory: Path) -> Callable[[], Any]:
    """Our coordinate-wise median, of updates that came by reference."""
    return _ours(size, updates, directory, lambda path: path, "median")


def trimmed(size: int, updates: int, directory: Path) -> Callable[[], Any]:
    """Our trimmed mean, of updates that came by reference."""
    return _ours(size, updates, directory, lambda path: path, "trimmed-mean(fraction=0.1)")


def _ours(
    size: int, updates: int, directory: Path, keep: Callable[[Path], Any], rule: str = "fedavg"
) -> Callable[[], Any]:
    from fedsplit.engines.allocator import keep_freed_memory
    from fedsplit.server.strategy import Strategy, read_update
    from fedsplit.states.state_dict import decode, encode

    # As the server does when it begins.
    keep_freed_memory()
    contents = [keep(path) for path in _files(size, updates, directory)]
    strategy = Strategy(rule)
    reference = decode(_content(contents[0]))
    strategy.begin_run(reference, {})

    def merge() -> object:
        round_, waiting = strategy.start_fit(1), []
        for rank, content in enumerate(contents, start=1):
            numbers = round_.at_once == 1
            update = read_update(rank, _content(content), rank, {}, reference, numbers=numbers)
            if isinstance(update, str):
                raise BenchmarkError(update)
            waiting.append(update)
            if numbers:
                round_.add(update)
            elif len(waiting) == round_.at_once or rank == len(contents):
                assert not round_.add_all(waiting)
            else:
                continue
            # As in the server, updates are let go of before the next one is mapped.
            waiting.clear()
            del update
        state, _ = strategy.end_fit(1, round_, [])
        return encode(state or {})

    return merge


def _files(size: int, updates: int, directory: Path) -> list[Path]:
    """Write updates where nobody of this size has yet."""
    import torch

    from fedsplit.disk.files import write_chunks
    from fedsplit.states.state_dict import encode

    paths = [directory / f"update-{size}-{index}.safetensors" for index in range(updates)]
    for path in paths:
        if not path.exists():
            state = {f"layer{layer}": torch.rand(max(1, size // (4 * LAYERS))) for layer in range(LAYERS)}
            write_chunks(path, encode(state))
    return paths


def numpy(size: int, updates: int, directory: Path) -> Callable[[], Any]:
    """The median of numpy, over stretches: over whole entries it would take forty models of memory."""
    import numpy as np

    from fedsplit.states.state_dict import decode

    states = [decode(_content(path)) for path in _files(size, updates, directory)]

    def merge() -> object:
        return {
            key: np.concatenate([np.median(np.stack([part.numpy() for part in parts]), axis=0)
                                 for parts in zip(*(state[key].split(1 << 14) for state in states), strict=True)])
            for key in states[0]
        }  # fmt: skip

    return merge


def _content(content: bytes | Path) -> Any:
    import mmap

    if isinstance(content, bytes):
        return content
    with content.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def classic(size: int, updates: int, directory: Path) -> Callable[[], Any]:
    """Flower's `flwr.server.strategy.FedAvg`, what the stock server of the embedded engine runs."""
    import numpy as np
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
    from flwr.server.strategy import FedAvg

    logging.getLogger("flwr").setLevel(logging.ERROR)
    random = np.random.default_rng(0)
    results = []
    for index in range(updates):
        arrays = [random.random(max(1, size // (4 * LAYERS)), dtype=np.float32) for _ in range(LAYERS)]
        status = Status(code=Code.OK, message="")
        result = FitRes(status=status, parameters=ndarrays_to_parameters(arrays), num_examples=index + 1, metrics={})
        results.append((None, result))
    strategy = FedAvg()
    return lambda: strategy.aggregate_fit(1, results, [])  # type: ignore[arg-type]


def message(size: int, updates: int, directory: Path) -> Callable[[], Any]:
    """Flower's `flwr.serverapp.strategy.FedAvg`, what its newer Message API runs."""
    import numpy as np
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg
    from flwr.supercore.task_identity import TaskIdentity

    logging.getLogger("flwr").setLevel(logging.ERROR)
    # A message may only be made by a task; here there is none.
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    random = np.random.default_rng(0)
    replies = []
    for index in range(updates):
        arrays = {
            f"layer{layer}": Array(random.random(max(1, size // (4 * LAYERS)), dtype=np.float32))
            for layer in range(LAYERS)
        }
        content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": index + 1})})
        question = Message(RecordDict({"config": ConfigRecord()}), dst_node_id=index + 1, message_type="train")
        replies.append(Message(content, reply_to=question))
    strategy = FedAvg()

    def merge() -> object:
        arrays, _ = strategy.aggregate_train(1, replies)
        if arrays is None:
            raise BenchmarkError("Flower's strategy merged nothing")
        return arrays

    return merge


def _trim() -> None:
    """Give back what was freed: else the peak hides in memory that the process kept from the merge before."""
    import ctypes

    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise BenchmarkError("this system does not tell RssAnon")


def _extra_bytes(merge: Callable[[], Any]) -> int:
    """Return the peak of memory during a merge, looked at every millisecond, above what there was before."""
    before, found, done = _anonymous_bytes(), [0], threading.Event()

    def look() -> None:
        while not done.wait(0.001):
            found.append(_anonymous_bytes())

    looking = threading.Thread(target=look)
    looking.start()
    result = merge()
    found.append(_anonymous_bytes())
    done.set()
    looking.join()
    del result
    return max(found) - before


def main() -> int:
    """Be one side: get ready, then merge whenever told to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sides = {"ours": ours, "files": files, "classic": classic, "message": message, "median": median,
             "trimmed": trimmed, "numpy": numpy}  # fmt: skip
    parser.add_argument("side", choices=sides)
    parser.add_argument("--bytes", type=int, default=100_000_000)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"))
    arguments = parser.parse_args()
    merge = sides[arguments.side](arguments.bytes, arguments.updates, arguments.directory)
    merge()
    print("ready", flush=True)
    for _ in sys.stdin:
        _trim()
        extra = _extra_bytes(merge)
        began, cpu = time.perf_counter(), time.process_time()
        result = merge()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        del result
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "extra_bytes": extra}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
