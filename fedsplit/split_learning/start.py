"""Makes a part of a cut model from what the trainer's flags say: at a rank, or beside the server."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch

from fedsplit.errors import UsageError
from fedsplit.split_learning.lower import LowerPart
from fedsplit.split_learning.noise import CutNoise
from fedsplit.split_learning.upper import run_upper
from fedsplit.split_learning.workload import create_split_workload
from fedsplit.workloads import WorkloadContext
from fedsplit.workloads.runner import run_workload


def make_part(
    name: str,
    context: WorkloadContext,
    part: Literal["lower", "upper"] | None,
    cut: str | None,
    tail: str | None,
    dtype: str | None,
    noise: CutNoise | None,
    window: int,
) -> tuple[torch.nn.Module, Callable[..., None]]:
    """Return the model of a part, and what answers the tasks of a run with it, given the trainer and its progress."""
    if part == "upper" and dtype is not None:
        raise UsageError("--cut-dtype is for the ranks: the upper part answers in what it is given")
    if part == "upper" and noise is not None:
        raise UsageError("--cut-noise is for the ranks: it is added to activations before they leave")
    if part == "upper" and window > 1:
        raise UsageError("--window is for the ranks: the upper part takes as many batches as come at once")
    workload, parts = create_split_workload(name, context, cut=cut, tail=tail)
    if part == "upper":
        return parts.beyond(), partial(run_upper, workload=workload, parts=parts)
    if parts.tail is not None and window > 1:
        raise UsageError(
            "--window cannot go with --tail: the loss is the rank's own, and the upper part could not go on without it"
        )
    lower = LowerPart(workload, parts, context, None if dtype is None else getattr(torch, dtype), noise, window)
    return lower.model, partial(run_workload, workload=lower)
