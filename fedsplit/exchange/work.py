"""How much of its usual work a trainer is to do in a task: ``work_share`` in `task.config`, from ``--balance``."""

import math
from collections.abc import Mapping
from typing import Any

WORK_SHARE = "work_share"


def work_share(config: Mapping[str, Any]) -> float:
    """Return the share that a task's configuration asks for, above 0 and at most 1; 1 where it asks for none."""
    share = config.get(WORK_SHARE, 1.0)
    return float(share) if isinstance(share, int | float) and 0 < share <= 1 else 1.0


def steps_to_do(config: Mapping[str, Any], steps: int) -> int:
    """Return how many of a task's usual steps to do: at least one, if there are any."""
    return math.ceil(steps * work_share(config))
