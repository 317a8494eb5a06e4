"""A rule of aggregation of one's own: long updates are shortened, then averaged, with server momentum.

A client whose update is longer than the median of all updates is scaled back to that length, so that no
single client outweighs the others by going far. What the server moved by is remembered, as momentum.

Use it for the whole model, or for a part of it::

    python server_main.py --aggregate "examples.custom_aggregation:bounded(momentum=0.5)"
    python server_main.py --aggregate "body.*=examples.custom_aggregation:bounded" --aggregate fedavg

The module is looked for beside `server_main.py` and on PYTHONPATH; only the server needs it.
docs/aggregation.md says what a rule may rely on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from fedsplit.aggregation import AggregationContext, StateDict, Update, fedavg


def bounded(updates: Sequence[Update], context: AggregationContext, *, momentum: float = 0.0) -> StateDict:
    """Average the clients, none of them further away than the median distance."""
    lengths = [length(update.state_dict, context.previous) for update in updates]
    bound = median(lengths)
    shortened = [
        replace(update, state_dict=towards(context.previous, update.state_dict, min(1.0, bound / size)))
        if size > 0
        else update
        for update, size in zip(updates, lengths, strict=True)
    ]
    # A built-in rule is a function like this one: the weighted mean, and integers by maximum.
    result = fedavg(shortened, context)

    velocity = context.memory.setdefault("velocity", {})  # lives in the checkpoints
    for key, tensor in result.items():
        if tensor.is_floating_point():
            step = tensor - context.previous[key]
            velocity[key] = step + momentum * velocity[key] if key in velocity else step
            result[key] = context.previous[key] + velocity[key]
    return result


def length(state: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """How far a client went, over all floating entries of the part."""
    norms = [
        torch.linalg.vector_norm(tensor.double() - start[key].double()).item()
        for key, tensor in state.items()
        if tensor.is_floating_point()
    ]
    return math.hypot(*norms)


def towards(start: Mapping[str, Tensor], state: Mapping[str, Tensor], share: float) -> StateDict:
    """The state after only a share of the way. New tensors: a rule must not change what it is given."""
    return {
        key: torch.lerp(start[key], tensor, share) if tensor.is_floating_point() else tensor
        for key, tensor in state.items()
    }
