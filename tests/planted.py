"""Runs one of the three scripts with an exception planted in it, which nobody thought of.

    python tests/planted.py server_main fedsplit.server.round:Rounds.round 2 --rounds 3

The function raises from its second call on; what comes after are the script's flags.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path
from typing import Any


class PlantedError(Exception):
    """No error of ours, nor of a library."""


def plant(place: str, call: int) -> None:
    """Let ``module:function`` or ``module:Class.method`` raise from a call on, counted from 1."""
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for each in classes:
        owner = getattr(owner, each)
    function, calls = getattr(owner, name), itertools.count(1)

    def planted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= call:
            raise PlantedError(f"nobody thought of this in {path}")
        return function(*args, **kwargs)

    setattr(owner, name, planted)


def main(script: str, place: str, call: str, *flags: str) -> int:
    """Plant and run; returns the script's exit code."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    plant(place, int(call))
    sys.argv = [f"{script}.py", *flags]
    code: int = importlib.import_module(script).main()
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
