"""How a round grows with the number of clients: 2, 10, 30, 100 of 0.1 MB.

    python -m benchmarks.scaling relays --ranks 10 --address 127.0.0.1:8080 --directory DIR

The server is a process of its own. The relays are threads of one process and the trainers threads of another, as a
hundred pairs of processes would measure the machine and not the server; so both wait for each other's interpreter lock,
which makes the figures too large rather than too small.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
from pathlib import Path

from benchmarks.common import BenchmarkError, Figure, Options, Programs, free_port, periods, ram_directory, stamp

TOPIC = "scaling"
SIZE = 100_000


def run(options: Options) -> list[Figure]:
    """Measure."""
    numbers = (2, 3) if options.tiny else (2, 10, 30) if options.quick else (2, 10, 30, 100)
    samples = {number: _measure(number, options.pick(8, 6, 4)) for number in numbers}
    figures = [
        Figure(topic=TOPIC, name=f"round of {number} clients, 0.1 MB", unit="ms", samples=samples[number],
               note="clients and trainers are threads")
        for number in numbers
    ]  # fmt: skip
    first, last = (10, numbers[-1]) if 10 in numbers else (numbers[0], numbers[-1])
    growth = statistics.median(samples[last]) / statistics.median(samples[first])
    figures.append(
        Figure(topic=TOPIC, name=f"round at {last} clients / round at {first}", unit="x", samples=[growth],
               target=last / first)
    )  # fmt: skip
    return figures


def _measure(ranks: int, rounds: int) -> list[float]:
    with ram_directory() as directory, Programs(directory) as programs:
        address = f"127.0.0.1:{free_port()}"
        programs.start("server", "server_main.py", "--address", address, "--rounds", str(rounds), "--min-clients",
                       str(ranks), "--checkpoint-dir", str(directory / "checkpoints"))  # fmt: skip
        for role in ("relays", "trainers"):
            programs.start(role, "-m", "benchmarks.scaling", role, "--ranks", str(ranks), "--address", address,
                           "--directory", str(directory))  # fmt: skip
        programs.wait(timeout_s=600.0)
        return [1000 * seconds for seconds in periods(directory / "stamps-1")]


def relay(rank: int, address: str, directory: Path) -> None:
    """Be the client of a rank."""
    from fedsplit import embedded
    from fedsplit.client import Relay
    from fedsplit.exchange import Exchange

    exchange = Exchange(directory / "exchange", rank)
    with exchange.hold("client"):
        embedded.connect(Relay(exchange, trainer_wait_s=300.0), address)


def trainer(rank: int, address: str, directory: Path) -> None:
    """Be the trainer of a rank: change one number."""
    import torch

    from fedsplit import Trainer

    state = {f"layer{index}": torch.full((SIZE // 40,), 0.5) for index in range(10)}
    with Trainer(rank, state, exchange_dir=directory / "exchange", checkpoint_dir=directory / "checkpoints") as tasks:
        for task in tasks:
            if task.kind == "evaluate":
                task.reply(loss=0.0, num_examples=1)
                continue
            if rank == 1:
                stamp(directory, rank)
            for name, tensor in task.state_dict.items():
                state[name].copy_(tensor)
            state["layer0"][0] += 1
            task.reply(state, num_examples=1)


def main() -> int:
    """Run all relays, or all trainers, as threads of this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=("relays", "trainers"))
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--directory", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.role == "relays":
        # Flower sets handlers for signals, which only the main thread may.
        import signal

        signal.signal = lambda *_: signal.SIG_DFL  # type: ignore[assignment]
    else:
        import torch

        torch.set_num_threads(1)
    job = relay if arguments.role == "relays" else trainer
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            job(rank, arguments.address, arguments.directory)
        except BaseException as exc:  # noqa: BLE001  (raised again below)
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(1, arguments.ranks + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise BenchmarkError(f"{len(failures)} of {arguments.ranks} ended early") from failures[0]
    return 0


if __name__ == "__main__":
    sys.exit(main())
