"""A workload for ``model_main.py`` that trains nothing: what a round costs then is the federation's own cost.

    python model_main.py --workload benchmarks.noop:noop --workload-option bytes=100000000

Training changes one number, as otherwise every state would have the digest of the one before and never travel.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from benchmarks.common import stamp
from fedsplit import EvaluateResult, TrainResult, WorkloadContext

LAYERS = 10


class Noop:
    """A model of equal layers and a counter, of a given size."""

    def __init__(self, context: WorkloadContext) -> None:
        size = int(context.options["bytes"])
        self.model = torch.nn.Module()
        for index in range(LAYERS):
            self.model.register_parameter(
                f"layer{index}", torch.nn.Parameter(torch.full((max(1, size // (4 * LAYERS)),), 0.5))
            )
        self.model.register_buffer("num_batches_tracked", torch.tensor(0))
        self._rank = context.rank
        self._stamps = context.options.get("stamps")
        self._sleep_s = float(context.options.get("sleep", 0)) if context.rank == 1 else 0.0

    def train(self, task: object) -> TrainResult:
        """Change one number."""
        if self._stamps:
            stamp(Path(self._stamps), self._rank)
        time.sleep(self._sleep_s)
        with torch.no_grad():
            self.model.get_parameter("layer0")[0] += 1
        return TrainResult(1)

    def evaluate(self, task: object) -> EvaluateResult:
        """Look at nothing."""
        return EvaluateResult(0.0, 1)


def noop(context: WorkloadContext) -> Noop:
    """Make the workload; options: ``bytes`` of the model, ``stamps`` the directory where calls are noted.

    Rank 1 sleeps for ``sleep`` seconds in each training.
    """
    return Noop(context)
