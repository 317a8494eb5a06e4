"""The federation without processes, files or Flower: what the five programs must come to, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

State = dict[str, torch.Tensor]


def federated_averaging(
    make_workload: Callable[[int], Any], *, ranks: int, rounds: int, config: dict[str, Any] | None = None
) -> State:
    """Train sequentially: every rank from the same state, then the weighted mean; returns the last global state.

    ``make_workload(rank)`` makes what ``model_main.py`` would.
    """
    workloads = {rank: make_workload(rank) for rank in range(1, ranks + 1)}
    state = {name: tensor.clone() for name, tensor in workloads[1].model.state_dict().items()}
    for server_round in range(1, rounds + 1):
        updates = []
        for workload in workloads.values():
            workload.model.load_state_dict(state)
            task = SimpleNamespace(
                kind="train", server_round=server_round, total_rounds=rounds, config=config or {},
                should_stop=lambda: False, state_dict=state,
            )  # fmt: skip
            result = workload.train(task)
            updates.append((result.num_examples, {k: v.clone() for k, v in workload.model.state_dict().items()}))
        state = {name: mean([(n, update[name]) for n, update in updates]) for name in state}
    return state


def mean(weighted: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """Weighted mean in at least float32, one after the other; the maximum of what is not a floating point number."""
    if not weighted[0][1].is_floating_point():
        return torch.stack([tensor for _, tensor in weighted]).amax(dim=0)
    dtype = weighted[0][1].dtype
    total, accumulated = 0, None
    for number, tensor in weighted:
        total += number
        wide = tensor.to(torch.promote_types(dtype, torch.float32))
        if accumulated is None:
            accumulated = wide.clone()
        elif number / total < 0.5:
            accumulated = torch.lerp(wide, accumulated, 1 - number / total)
        else:
            accumulated = torch.lerp(accumulated, wide, number / total)
    assert accumulated is not None
    return accumulated.to(dtype)
