"""What waiting costs: processor time over a minute in which rank 1 trains and everybody else waits.

Client 1 waits for its trainer's answer and looks whether that lives, trainer 2 waits for its next task, client 2 for
the server, and the server for client 1; client 3 waits for a server that is not there. The trainer of rank 1 sleeps.
Beside them Flower's own client is connected to a server that asks it for nothing: what gRPC's threads alone take.
"""

from __future__ import annotations

import time

from benchmarks.common import Federation, Figure, Options, Programs, free_port, scratch_directory

TOPIC = "idle"
WAITING = {
    "client-1": "client that waits for its trainer",
    "client-2": "client that waits for the server's next question",
    "client-3": "client that waits for a server to come",
    "model-2": "trainer that waits for its next task",
    "server": "server that waits for one of two ranks",
}
CONNECTED = ("client-1", "client-2")


def run(options: Options) -> list[Figure]:
    """Measure."""
    seconds = options.pick(60, 60, 2)
    with scratch_directory() as directory, Programs(directory) as programs:
        federation = Federation(directory=directory, rounds=1, model_bytes=100_000, sleep_s=2.0 * seconds + 30.0)
        federation.start(programs)
        programs.start("client-3", "client_main.py", "--rank", "3", "--server-address", f"127.0.0.1:{free_port()}",
                       "--exchange-dir", str(directory / "nobody"))  # fmt: skip
        port = str(free_port())
        programs.start("stock-server", "-m", "benchmarks.stock", "server", "--port", port)
        programs.start("stock", "-m", "benchmarks.stock", "client", "--port", port, "--stamps", str(directory))
        while not all((directory / f"stamps-{rank}").exists() for rank in (1, 2)):
            programs.check()
            time.sleep(0.1)
        # What follows a training is over by then, and a client without a server has come to its longest pauses.
        time.sleep(min(10.0, seconds))
        before = {name: programs.all[name].run_s() for name in (*WAITING, "stock")}
        began = time.monotonic()
        time.sleep(seconds)
        lasted = time.monotonic() - began
        shares = {name: 100 * (programs.all[name].run_s() - before[name]) / lasted for name in before}
        programs.check()
    return [
        Figure(topic=TOPIC, name=what, unit="% of a core", samples=[shares[name]],
               target=None if name == "server" else 0.1, note=f"over {lasted:.0f} s",
               **({"peer": "Flower's client", "peer_samples": [shares["stock"]]} if name in CONNECTED else {}))
        for name, what in WAITING.items()
    ]  # fmt: skip
