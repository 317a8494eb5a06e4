"""How a round grows with the number of clients: 2, 10, 30, 100 of 0.1 MB.

    python -m benchmarks.scaling relays --first 1 --last 10 --address 127.0.0.1:8080 --directory DIR

The server is a process of its own. Ten relays are threads of one process, and ten trainers threads of another, as a
hundred pairs of processes would measure the machine's memory and not the server; they wait for each other's
interpreter lock, which makes the figures too large rather than too small. All of them share the machine's cores: beside
the round's time stands the processor time that the server itself takes for a client.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
from pathlib import Path

from benchmarks.common import BenchmarkError, Figure, Options, Programs, free_port, periods, scratch_directory, stamp

TOPIC = "scaling"
SIZE = 100_000
_RANKS_A_PROCESS = 10


def run(options: Options) -> list[Figure]:
    """Measure."""
    numbers = (2, 3) if options.tiny else (2, 10, 30) if options.quick else (2, 10, 30, 100)
    rounds = options.pick(12, 8, 4)
    samples, server_ms = {}, {}
    for number in numbers:
        samples[number], server_ms[number] = _measure(number, rounds)
    figures = [
        Figure(topic=TOPIC, name=f"round of {number} clients, 0.1 MB", unit="ms", samples=samples[number],
               note=f"the server's own processor time: {server_ms[number]:.1f} ms for each client")
        for number in numbers
    ]  # fmt: skip
    first, last = (10, numbers[-1]) if 10 in numbers else (numbers[0], numbers[-1])
    growth = statistics.median(samples[last]) / statistics.median(samples[first])
    figures.append(
        Figure(topic=TOPIC, name=f"round at {last} clients / round at {first}", unit="x", samples=[growth],
               target=0.8 * last / first)
    )  # fmt: skip
    return figures


def _measure(ranks: int, rounds: int) -> tuple[list[float], float]:
    """Return the milliseconds of each round, and those of processor time that a client costs the server in one."""
    with scratch_directory() as directory, Programs(directory) as programs:
        address = f"127.0.0.1:{free_port()}"
        programs.start("server", "server_main.py", "--address", address, "--rounds", str(rounds), "--min-clients",
                       str(ranks), "--checkpoint-dir", str(directory / "checkpoints"))  # fmt: skip
        for first in range(1, ranks + 1, _RANKS_A_PROCESS):
            last = min(ranks, first + _RANKS_A_PROCESS - 1)
            for role in ("relays", "trainers"):
                programs.start(f"{role}-{first}", "-m", "benchmarks.scaling", role, "--first", str(first), "--last",
                               str(last), "--address", address, "--directory", str(directory))  # fmt: skip
        # From here to the end it does nothing but rounds.
        programs.wait_for("server", "round 2/", timeout_s=300.0)
        server = programs.all["server"]
        server.look()
        before = server.cpu_s
        programs.wait_for("server", f"round {rounds}/", timeout_s=300.0)
        server.look()
        per_client = 1000 * (server.cpu_s - before) / (rounds - 2) / ranks
        programs.wait(timeout_s=600.0)
        return [1000 * seconds for seconds in periods(directory / "stamps-1")], per_client


def relay(rank: int, address: str, directory: Path) -> None:
    """Be the client of a rank."""
    from fedsplit.client.relay import Relay
    from fedsplit.engines import embedded
    from fedsplit.exchange.directory import Exchange

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
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--last", type=int, required=True)
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

    ranks = range(arguments.first, arguments.last + 1)
    threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise BenchmarkError(f"{len(failures)} of {len(ranks)} ended early") from failures[0]
    return 0


if __name__ == "__main__":
    sys.exit(main())
