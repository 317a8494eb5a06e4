"""Central differential privacy around any rule: `dp(rule, clip=…, noise=…)`.

Each update is clipped to an L2 distance of `clip` from the state it started from. The rule inside merges the clipped
updates, and Gaussian noise of the standard deviation ``noise * clip / n`` is added to its result, n being the number of
updates. The server is trusted; what is protected is a client, with all it contributes to a round. The section
"Differential privacy" of docs/aggregation.md lists the assumptions on which the reported epsilon rests.

Not promised: resistance to attacks on floating-point noise. The noise comes from torch's generator, which is not a
cryptographic one, seeded by the operating system.
"""

import math
import secrets
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedsplit.aggregation.base import AggregationContext, Rule, StateDict, Update
from fedsplit.aggregation.numeric import floating_keys, is_floating, moved, squared_distance, widened
from fedsplit.aggregation.validation import check_output
from fedsplit.errors import MissingPackageError


def private_rule(name: str, inner: Rule, *, averages: bool, clip: float, noise: float, delta: float = 1e-5) -> Rule:
    """Return a rule with differential privacy around it; raises UsageError if it needs an accountant and has none.

    `clip` is the largest L2 norm of an update, over all floating entries of the part. `noise` is the standard deviation
    as a multiple of ``clip / n``; 0 only clips, which protects nothing. `delta` is where epsilon is reported, and
    `averages` tells whether `inner` is `fedavg`, whose result moves by at most ``clip / n`` with one client.
    """
    if noise:
        _accountant()
    begin = partial(_PrivateAccumulator, inner=inner, averages=averages, clip=clip, noise=noise, delta=delta)
    return Rule(name=name, accumulator=begin, one_pass=inner.one_pass, min_updates=inner.min_updates)


class _PrivateAccumulator:
    """Clips the updates for the rule inside, and adds noise to what that makes of them."""

    def __init__(
        self, context: AggregationContext, *, inner: Rule, averages: bool, clip: float, noise: float, delta: float
    ) -> None:
        self._averages, self._clip, self._noise, self._delta = averages, clip, noise, delta
        self._context = context
        self._start = {key: widened(t) for key, t in context.previous.items() if is_floating(t)}
        memory = context.memory.setdefault("inner", {})
        # Extra tensors are neither clipped nor noisy: the rule inside is given none, and can send none.
        self._inner = inner.accumulator(replace(context, previous=self._start, memory=memory, extra={}, rank_extra={}))
        self._count = 0

    def add(self, update: Update) -> None:
        self._count += 1
        state = {key: widened(update.state_dict[key]) for key in self._start}
        clipped = _clip(state, self._start, self._clip)
        self._inner.add(replace(update, state_dict=clipped, num_examples=1, extra={}))

    def result(self) -> StateDict:
        merged = self._inner.result()
        check_output(merged, self._start)
        if not self._averages:  # such a rule may follow a single client all the way
            merged = _clip(merged, self._start, self._clip)
        if deviation := self._noise * self._clip / self._count:
            # Not the context's generator: anyone who knows the run's seed could subtract that noise.
            generator = torch.Generator().manual_seed(secrets.randbits(63))
            merged = {key: _noisy(tensor, deviation, generator) for key, tensor in merged.items()}
        self._spend()
        previous = self._context.previous
        return {key: merged[key].to(t.dtype) if key in merged else t for key, t in previous.items()}

    def _spend(self) -> None:
        """Note in the memory what this round spent."""
        # The standard deviation of the noise divided by how far one client can move the result: clip / n with fedavg,
        # twice the clip with any other rule. As text, as a checkpoint's keys are; a float comes back from it exactly.
        multiplier = repr(self._noise if self._averages else self._noise / (2 * self._count))
        privacy = self._context.memory.setdefault("privacy", {"steps": 0, "multipliers": {}})
        privacy["delta"] = self._delta
        privacy["steps"] += 1
        privacy["multipliers"][multiplier] = privacy["multipliers"].get(multiplier, 0) + 1
        privacy |= privacy_spent({"": self._context.memory}) or {}


def privacy_spent(memory: Mapping[str, Mapping[str, Any]]) -> dict[str, float | int | None] | None:
    """Return what all private parts together have spent, composed over parts and rounds; None if there is none.

    `memory` is the rules' as the server keeps it. The result has ``epsilon`` (None if a part has no noise, as there is
    no bound then), ``delta`` (the smallest of the parts') and ``steps`` (the number of merges with `dp`).
    """
    # A rule of the user's may remember something of its own under the same name.
    found = [part.get("privacy") for part in memory.values()]
    parts = [privacy for privacy in found if isinstance(privacy, Mapping) and "multipliers" in privacy]
    if not parts:
        return None
    counts = [(float(multiplier), count) for part in parts for multiplier, count in part["multipliers"].items()]
    delta, epsilon = min(float(part["delta"]) for part in parts), None
    if all(multiplier > 0 for multiplier, _ in counts):
        accounting, rdp = _accountant()
        accountant = rdp.RdpAccountant()
        for multiplier, count in counts:
            accountant.compose(accounting.GaussianDpEvent(multiplier), count)
        epsilon = float(accountant.get_epsilon(delta))
    return {"epsilon": epsilon, "delta": delta, "steps": sum(int(part["steps"]) for part in parts)}


def _accountant() -> tuple[Any, Any]:
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError as exc:
        raise MissingPackageError("dp", "dp-accounting", "privacy") from exc
    return dp_accounting, rdp


def _clip(state: Mapping[str, Tensor], start: StateDict, clip: float) -> StateDict:
    """Move `state` towards `start` until it is at most `clip` away; bit for bit the same if it already is."""
    norm = math.sqrt(squared_distance(state, start, floating_keys(start)))
    if norm <= clip:
        return dict(state)
    return {key: moved(start[key], start[key], tensor, clip / norm) for key, tensor in state.items()}


def _noisy(tensor: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    if tensor.is_complex():
        # torch would give each of the two coordinates half of the variance; each must have all of it.
        return torch.view_as_complex(_noisy(torch.view_as_real(tensor.resolve_conj()), deviation, generator))
    return tensor + deviation * torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)
