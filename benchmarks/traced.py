"""Runs one of the programs and notes the processor time that it takes from one step of split learning to the next.

    python -m benchmarks.traced FILE.json server --rounds 1 ...

The flags are those of ``python -m fedsplit``. The file is a list of seconds, of all threads together: from each end
of a function that the program calls once in a step to the next.
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

# By program: what it calls once in a step.
ONCE = {
    "server": "fedsplit.split_learning.beyond:Beyond.step",
    "client": "fedsplit.client.relay:Relay.fit",
    "trainer": "fedsplit.trainer.task:Task.hand_over",
}


def main() -> int:
    """Watch, and run the program."""
    path, program = Path(sys.argv[1]), sys.argv[2]
    ends: list[float] = []
    _watch(ONCE[program], ends)

    def write() -> None:
        path.write_text(json.dumps([after - before for before, after in itertools.pairwise(ends)]))

    atexit.register(write)
    from fedsplit.__main__ import main as run

    return run(sys.argv[2:])


def _watch(place: str, ends: list[float]) -> None:
    module, _, name = place.partition(":")
    owner, _, attribute = name.partition(".")
    kind = getattr(importlib.import_module(module), owner)
    function = getattr(kind, attribute)

    @functools.wraps(function)
    def watched(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        finally:
            ends.append(time.process_time())

    setattr(kind, attribute, watched)


if __name__ == "__main__":
    sys.exit(main())
