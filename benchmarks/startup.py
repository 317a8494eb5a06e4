"""How long until something happens: the client's start, and round 1 of the digits with all five started at once."""

from __future__ import annotations

import time

from benchmarks.common import Federation, Figure, Options, Programs, free_port, scratch_directory

TOPIC = "start-up"
DIGITS = ("--workload", "digits", "--num-partitions", "2")


def run(options: Options) -> list[Figure]:
    """Measure."""
    repeats = options.pick(5, 3, 1)
    cpu, memory = [], []
    for _ in range(repeats):
        cpu_s, peak_bytes = _client()
        cpu.append(cpu_s)
        memory.append(peak_bytes / 1e6)
    rounds = [] if options.tiny else [_first_round() for _ in range(repeats)]
    return [
        Figure(topic=TOPIC, name="client_main.py until it waits, processor time", unit="s", samples=cpu, target=1.0,
               note="Flower's own client adds 0.9 s of imports when it connects"),
        Figure(topic=TOPIC, name="client_main.py while it waits, peak memory", unit="MB", samples=memory, target=150.0),
        Figure(topic=TOPIC, name="five commands to the end of round 1 of the digits", unit="s", samples=rounds,
               target=15.0, missing="left out of a tiny run" if options.tiny else ""),
    ]  # fmt: skip


def _client() -> tuple[float, int]:
    with scratch_directory() as directory, Programs(directory) as programs:
        address = f"127.0.0.1:{free_port()}"
        client = programs.start("client", "client_main.py", "--server-address", address,
                                "--exchange-dir", str(directory / "exchange"))  # fmt: skip
        programs.wait_for("client", "waiting for the server")
        client.look()
        return client.cpu_s, client.peak_bytes


def _first_round() -> float:
    with scratch_directory() as directory, Programs(directory) as programs:
        began = time.monotonic()
        Federation(directory=directory, rounds=1, model_bytes=0, workload=DIGITS).start(programs)
        history = directory / "checkpoints" / "server" / "history.jsonl"
        while not (history.exists() and history.read_text().endswith("\n")):
            if programs.all["server"].process.poll():
                programs.wait(["server"])
            time.sleep(0.01)
        seconds = time.monotonic() - began
        programs.wait(timeout_s=60.0)
        return seconds
