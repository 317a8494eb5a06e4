"""How many cases the tests try: few by default, more of them with ``FEDSPLIT_TESTS=all``.

``FEDSPLIT_DEPTH=N`` tries N times as many as that, and of Hypothesis's others each time.
"""

from __future__ import annotations

import os

EVERYTHING = os.environ.get("FEDSPLIT_TESTS") == "all"
IS_ASKED_FOR = "FEDSPLIT_DEPTH" in os.environ
DEPTH = int(os.environ.get("FEDSPLIT_DEPTH", "1" if EVERYTHING else "0"))


def scaled(quick: int, deep: int) -> int:
    """Return how many cases to try: ``quick`` by default, ``deep`` times the depth if one was asked for."""
    return deep * DEPTH if DEPTH > 0 else quick
