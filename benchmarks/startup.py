"""How long until something happens: help printed, the client waiting, round 1 of the digits with all five started."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time

from benchmarks.common import (
    ENVIRONMENT,
    ROOT,
    Federation,
    Figure,
    Options,
    Programs,
    free_port,
    scratch_directory,
)  # fmt: skip

TOPIC = "start-up"
DIGITS = ("--workload", "digits", "--num-partitions", "2")
# Seconds that a command may take; an import may add so many to the interpreter's own start.
_SHORT = {"-c import fedsplit": 0.05, "client_main.py --help": 0.3, "server_main.py --help": 0.5,
          "model_main.py --help": 0.5}  # fmt: skip


def run(options: Options) -> list[Figure]:
    """Measure."""
    repeats = options.pick(5, 3, 1)
    cpu, memory = [], []
    for _ in range(repeats):
        cpu_s, peak_bytes = _client()
        cpu.append(cpu_s)
        memory.append(peak_bytes / 1e6)
    commands = {text: [_cpu_s(*text.split(" ", 1)) for _ in range(repeats)] for text in _SHORT}
    bare = [_cpu_s("-c", "pass") for _ in range(repeats)]
    rounds = [] if options.tiny else [_first_round() for _ in range(repeats)]
    return [
        *(Figure(topic=TOPIC, name=f"python {text}, processor time", unit="s", samples=commands[text],
                 peer="an interpreter that does nothing", peer_samples=bare, target=most,
                 judged_by="difference" if text.startswith("-c") else "median")
          for text, most in _SHORT.items()),
        Figure(topic=TOPIC, name="client_main.py until it waits, processor time", unit="s", samples=cpu, target=1.0,
               note="Flower's own client adds 0.9 s of imports when it connects"),
        Figure(topic=TOPIC, name="client_main.py while it waits, peak memory", unit="MB", samples=memory, target=150.0),
        Figure(topic=TOPIC, name="five commands to the end of round 1 of the digits", unit="s", samples=rounds,
               target=5.0, missing="left out of a tiny run" if options.tiny else ""),
    ]  # fmt: skip


def _cpu_s(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


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
