"""The digits with a pause in every training: long enough for somebody to look on."""

from __future__ import annotations

import time
from typing import Any

from fedsplit.workloads import WorkloadContext, create_workload

PAUSE_S = 2.0


class Slow:
    """Trains as the digits do, after a pause."""

    def __init__(self, workload: Any) -> None:
        self._workload = workload
        self.model = workload.model
        self.evaluate = workload.evaluate
        self.local_state = workload.local_state
        self.load_local_state = workload.load_local_state

    def train(self, task: Any) -> Any:
        time.sleep(PAUSE_S)
        return self._workload.train(task)


def slow_digits(context: WorkloadContext) -> Slow:
    return Slow(create_workload("digits", context))
