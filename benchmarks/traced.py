"""Runs one of the programs and notes how long each call of a few functions took, to see where a step's time goes.

    python -m benchmarks.traced FILE.json server --rounds 1 ...

The flags are those of ``python -m fedsplit``. What the calls took is there in seconds, in the order of their ends;
``processor`` has the processor time of the whole program from one end of a call of the first function to the next.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

# By program: what to watch.
WATCHED = {
    "server": ("fedsplit.server.peer:Peer.ask", "fedsplit.split_learning.beyond:Beyond.step"),
    "client": ("fedsplit.client.relay:Relay.fit", "fedsplit.exchange.client_side:ClientSide.offer",
               "fedsplit.client.long_poll:LongPoll.wait"),
    "trainer": ("fedsplit.trainer.trainer:Task.hand_over",),
}  # fmt: skip


def main() -> int:
    """Watch, and run the program."""
    path, program = Path(sys.argv[1]), sys.argv[2]
    took: dict[str, list[float]] = {}
    ends: dict[str, list[float]] = {}
    for place in WATCHED[program]:
        _watch(place, took, ends)

    def write() -> None:
        first = next(iter(took))
        processor = [after - before for before, after in itertools.pairwise(ends[first])]
        path.write_text(json.dumps(took | {"processor": processor}))

    atexit.register(write)
    from fedsplit.__main__ import main as run

    return run(sys.argv[2:])


def _watch(place: str, took: dict[str, list[float]], ends: dict[str, list[float]]) -> None:
    module, _, name = place.partition(":")
    owner, _, attribute = name.partition(".")
    kind = getattr(importlib.import_module(module), owner)
    function = getattr(kind, attribute)
    took[name], ends[name] = [], []

    @functools.wraps(function)
    def watched(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            took[name].append(time.perf_counter() - began)
            ends[name].append(time.process_time())

    setattr(kind, attribute, watched)


if __name__ == "__main__":
    sys.exit(main())
