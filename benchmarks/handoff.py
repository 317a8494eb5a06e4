"""How long a hand-off takes: from the moment a question is published to the moment the other side is awake, and back.

    python -m benchmarks.handoff DIR

The real relay and the real trainer in two processes, a task without a payload. Downwards the clock starts when the
relay begins to publish (so writing the record is included) and stops in the trainer's loop; upwards it starts when the
trainer begins to reply and stops when the relay has its answer.

Where there is no inotify, looks are at most 20 ms apart after half a second in vain; so what was waiting for three
seconds wakes as what was waiting for an hour does; the hour is not sat out.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from benchmarks.common import Figure, Options, Programs, scratch_directory

TOPIC = "hand-off"
LONG_S = 3.0


def run(options: Options) -> list[Figure]:
    """Measure."""
    down, up = _measure(options.pick(300, 150, 20), pause_s=0.02, work_s=0.0)
    late_down, _ = _measure(options.pick(40, 15, 2), pause_s=0.5 if options.tiny else LONG_S, work_s=0.0)
    _, late_up = _measure(options.pick(20, 8, 2), pause_s=0.0, work_s=0.5 if options.tiny else LONG_S)
    return [
        Figure(topic=TOPIC, name="client to trainer, idle", unit="ms", samples=down, target=2.0),
        Figure(topic=TOPIC, name="trainer to client, idle", unit="ms", samples=up, target=2.0),
        Figure(topic=TOPIC, name="client to trainer, after long waiting", unit="ms", samples=late_down, target=25.0),
        Figure(topic=TOPIC, name="trainer to client, after long training", unit="ms", samples=late_up, target=25.0),
    ]


def _measure(number: int, *, pause_s: float, work_s: float) -> tuple[list[float], list[float]]:
    import random

    from flwr.common import EvaluateIns, Parameters

    from fedsplit.client.relay import Relay
    from fedsplit.exchange.directory import Exchange
    from fedsplit.exchange.records import Request
    from fedsplit.wire.protocol import TENSOR_TYPE, ask_record, pack, unpack

    logging.getLogger("fedsplit").setLevel(logging.ERROR)  # the first task finds no trainer yet
    down, up = [], []
    with scratch_directory() as directory, Programs(directory) as programs:
        exchange = Exchange(directory / "exchange", 1)
        with exchange.hold("client"):
            relay = Relay(exchange, trainer_wait_s=60.0, use_store=False)
            programs.start("trainer", "-m", "benchmarks.handoff", str(directory), str(work_s))
            for index in range(number + 1):
                # Spread over the poll interval, as what is published is not in step with who waits.
                time.sleep(pause_s + random.uniform(0.0, 0.02))
                request = Request(run_id="bench", kind="evaluate", server_round=index + 1, total_rounds=number + 1)
                record = ask_record(request, digest=None, payload_bytes=0, hold_s=60.0, cancel=False)
                began = time.monotonic()
                answer = relay.evaluate(EvaluateIns(Parameters([], TENSOR_TYPE), pack(record)))
                ended = time.monotonic()
                reply = unpack(answer.metrics, "the relay")
                if index:  # the first waits for the trainer to start
                    down.append(1000 * (reply["metrics"]["awake"] - began))
                    up.append(1000 * (ended - reply["metrics"]["replying"]))
    return down, up


def main() -> int:
    """Be the trainer: answer with the moments at which it was awake and began to reply."""
    from fedsplit import Trainer

    directory, work_s = Path(sys.argv[1]), float(sys.argv[2])
    with Trainer(1, exchange_dir=directory / "exchange", checkpoint_dir=directory / "checkpoints") as trainer:
        for task in trainer:
            awake = time.monotonic()
            time.sleep(work_s)
            task.reply(loss=0.0, num_examples=1, metrics={"awake": awake, "replying": time.monotonic()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
