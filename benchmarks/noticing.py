"""How soon a client knows that its trainer was killed: 50 trainers, each killed with SIGKILL in the middle of a task.

The real relay waits for an answer; the trainer is a process that holds the trainer's role and has forked a child that
lives on, as a DataLoader's worker does. The clock runs from just before the kill until the relay has noted the death.
"""

from __future__ import annotations

import logging
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.common import ROOT, Figure, Options, scratch_directory

TOPIC = "noticing"

_TRAINER = """
import os, sys, time
from fedsplit.exchange.directory import Exchange
with Exchange(sys.argv[1], 1).hold("trainer"):
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)
    print("here", flush=True)
    time.sleep(60)
"""


def run(options: Options) -> list[Figure]:
    """Measure."""
    logging.getLogger("fedsplit").setLevel(logging.ERROR)  # each death is a warning
    samples = []
    with scratch_directory() as directory:
        for _ in range(options.pick(50, 50, 2)):
            samples.append(_one(directory / "exchange"))
    note = f"worst of {len(samples)}: {max(samples):.0f} ms"
    return [
        Figure(topic=TOPIC, name="a killed trainer is noticed", unit="ms", samples=samples, target=100.0, note=note)
    ]


def _one(exchange_dir: Path) -> float:
    from flwr.common import EvaluateIns, Parameters

    from fedsplit.client.relay import Relay
    from fedsplit.exchange.directory import Exchange
    from fedsplit.exchange.records import Request
    from fedsplit.wire.protocol import TENSOR_TYPE, ask_record, pack

    exchange = Exchange(exchange_dir, 1)
    command = [sys.executable, "-c", _TRAINER, str(exchange_dir)]
    with exchange.hold("client"), subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as trainer:
        assert trainer.stdout is not None
        trainer.stdout.readline()
        relay = Relay(exchange, trainer_wait_s=60.0, use_store=False)
        request = Request(run_id="bench", kind="evaluate", server_round=1, total_rounds=1)
        record = pack(ask_record(request, digest=None, payload_bytes=0, hold_s=2.0, cancel=False))
        asking = threading.Thread(target=lambda: relay.evaluate(EvaluateIns(Parameters([], TENSOR_TYPE), record)))
        asking.start()
        time.sleep(0.1 + random.uniform(0.0, 0.1))
        began = time.monotonic()
        trainer.send_signal(signal.SIGKILL)
        while relay.long_poll.missing_since is None:
            time.sleep(0.0005)
        seconds = time.monotonic() - began
        trainer.stdout.close()
        asking.join()
    return 1000 * seconds
