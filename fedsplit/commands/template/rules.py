"""How the server merges a part of the model: a rule is a plain function, see docs/aggregation.md of fedsplit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedsplit import AggregationContext, Update


def by_loss(
    updates: Sequence[Update], context: AggregationContext, *, sharpness: float = 1.0
) -> dict[str, torch.Tensor]:
    """Average the updates, those with a lower training loss more.

    Parameters
    ----------
    updates
        One for each rank, in rank order; not to be changed.
    context
        `previous` is the state of this part before the round.
    sharpness
        0 is a plain mean; the larger, the more the best update counts.
    """
    losses = torch.tensor([float(update.metrics["loss"]) for update in updates])
    weights = torch.softmax(-sharpness * losses, dim=0)
    merged = {}
    for key, before in context.previous.items():
        stack = torch.stack([update.state_dict[key].float() for update in updates])
        shape = (-1, *[1] * before.dim())
        merged[key] = (weights.view(shape) * stack).sum(dim=0).to(before.dtype)
    return merged
