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
# What each of the five cannot do without: the server PyTorch and Flower, clients Flower's client, trainers PyTorch.
_NEEDED = ("import torch, flwr.server", *2 * ["import fedsplit.engines.flower_client"], *2 * ["import torch"])
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
    rounds = [(*_first_round(), *_imports()) for _ in range(0 if options.tiny else repeats)]
    seconds, cpu_s, least_s, least_cpu_s = zip(*rounds, strict=True) if rounds else ((),) * 4
    missing = "left out of a tiny run" if options.tiny else ""
    five = "five commands to the end of round 1 of the digits"
    limit = "five processes that only import what these need"
    return [
        *(Figure(topic=TOPIC, name=f"python {text}, processor time", unit="s", samples=commands[text],
                 peer="an interpreter that does nothing", peer_samples=bare, target=most,
                 judged_by="difference" if text.startswith("-c") else "median")
          for text, most in _SHORT.items()),
        Figure(topic=TOPIC, name="client_main.py until it waits, processor time", unit="s", samples=cpu, target=1.0,
               note="Flower's own client adds its imports when it connects"),
        Figure(topic=TOPIC, name="client_main.py while it waits, peak memory", unit="MB", samples=memory, target=150.0),
        Figure(topic=TOPIC, name=five, unit="s", samples=seconds, target=5.0, missing=missing),
        Figure(topic=TOPIC, name=f"{five}, to the machine's limit", unit="s", samples=seconds, peer=limit,
               peer_samples=least_s, judged_by="ratio", missing=missing),
        Figure(topic=TOPIC, name=f"{five}, processor time", unit="s", samples=cpu_s, peer=limit,
               peer_samples=least_cpu_s, judged_by="ratio", missing=missing),
    ]  # fmt: skip


def _cpu_s(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL, check=True
    )
    return _cpu_since(before)


def _cpu_since(before: resource.struct_rusage) -> float:
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


def _first_round() -> tuple[float, float]:
    """Return the seconds until the first line of the history is there, and all processor time until then."""
    with scratch_directory() as directory, Programs(directory) as programs:
        began = time.monotonic()
        Federation(directory=directory, rounds=1, model_bytes=0, workload=DIGITS).start(programs)
        history = directory / "checkpoints" / "server" / "history.jsonl"
        while not (history.exists() and history.read_text().endswith("\n")):
            if programs.all["server"].process.poll():
                programs.wait(["server"])
            time.sleep(0.01)
        seconds = time.monotonic() - began
        for program in programs.all.values():
            program.look()
        cpu_s = sum(program.cpu_s for program in programs.all.values())
        programs.wait(timeout_s=60.0)
        return seconds, cpu_s


def _imports() -> tuple[float, float]:
    """Return the seconds and the processor time of the imports alone, of all five started at once as well."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with scratch_directory() as directory, Programs(directory) as programs:
        for number, statement in enumerate(_NEEDED):
            # What a process clears away at its end, a tenth of the whole, is not part of starting.
            programs.start(str(number), "-c", f"import os; {statement}; os._exit(0)")
        programs.wait()
        seconds = time.monotonic() - began
    return seconds, _cpu_since(before)
