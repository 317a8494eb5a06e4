"""Central differential privacy around any rule: `dp(rule, clip=…, noise=…)`.

Each update is clipped to an L2 distance of `clip` from the state it started from. The rule inside merges the clipped
updates, and Gaussian noise is added to its result. The server is trusted; what is protected is a client, with all it
contributes to a round.

The epsilon that is reported rests on these assumptions:

- Two runs are neighbours if one of them has, in place of one client's updates, the states these started from. The
  number n of updates in a round is public.
- In every round, the noise on each coordinate has the standard deviation ``noise * clip / n``.
- With `fedavg` inside, all clients count alike (`num_examples` is taken as 1). Between neighbours, the mean of n
  clipped updates then differs by at most ``clip / n`` in L2 norm. The noise multiplier, which is the standard deviation
  of the noise divided by this bound, is `noise`.
- Any other rule inside may follow a single client all the way. Its result is clipped as well, so that between
  neighbours it differs by at most ``2 * clip``. The noise multiplier is ``noise / (2 * n)``.
- Every client may take part in every round: no amplification by sampling is counted.
- Integer and boolean entries keep the server's value, since no noise would protect them. `num_examples`, metrics and
  losses that clients report are not protected.

Not promised: resistance to attacks on floating-point noise. The noise comes from torch's generator, which is not a
cryptographic one, seeded by the operating system.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedsplit.aggregation.base import Accumulator, AggregationContext, Rule, StateDict, Update, merge
from fedsplit.aggregation.guard import check_output
from fedsplit.aggregation.numeric import floating_keys, is_floating, squared_distance, surely_finite, widened
from fedsplit.errors import UsageError

_MISSING = "dp needs an accountant that is not installed: pip install 'fedsplit[privacy]'"


def private_rule(name: str, inner: Rule, *, averages: bool, clip: float, noise: float, delta: float = 1e-5) -> Rule:
    """Return a rule with differential privacy around it.

    Parameters
    ----------
    name : str
        How messages call it.
    inner : Rule
        The rule that merges the clipped updates.
    averages : bool
        Whether `inner` is `fedavg`, the result of which differs by at most ``clip / n`` between neighbouring runs.
    clip : float
        Largest L2 norm of an update, over all floating entries of the part.
    noise : float
        Standard deviation of the noise as a multiple of ``clip / n``; 0 only clips, which protects nothing.
    delta : float
        The delta at which epsilon is reported.

    Raises
    ------
    UsageError
        If there is noise to account for and `dp_accounting` is not installed.
    """
    if noise:
        _accountant()
    return PrivateRule(name=name, inner=inner, averages=averages, clip=clip, noise=noise, delta=delta)


@dataclass(frozen=True, kw_only=True)
class PrivateRule:
    """A `Rule` around another; see `private_rule`."""

    name: str
    inner: Rule
    averages: bool
    clip: float
    noise: float
    delta: float = 1e-5

    @property
    def one_pass(self) -> bool:
        """As the rule inside."""
        return self.inner.one_pass

    @property
    def min_updates(self) -> int:
        """As the rule inside."""
        return self.inner.min_updates

    def aggregate(self, updates: Sequence[Update], context: AggregationContext) -> StateDict:
        """Merge all updates at once."""
        return merge(self.accumulator(context), updates)

    def accumulator(self, context: AggregationContext) -> Accumulator:
        """Begin a merge of updates that come one by one."""
        return _PrivateAccumulator(self, context)


class _PrivateAccumulator:
    def __init__(self, rule: PrivateRule, context: AggregationContext) -> None:
        self._rule = rule
        self._context = context
        self._start = {key: widened(t) for key, t in context.previous.items() if is_floating(t)}
        inner = replace(context, previous=self._start, memory=context.memory.setdefault("inner", {}))
        self._inner = rule.inner.accumulator(inner)
        self._count = 0

    def add(self, update: Update) -> None:
        """Clip the update and give it to the rule inside."""
        self._count += 1
        state = {key: widened(update.state_dict[key]) for key in self._start}
        clipped = _clip(state, self._start, self._rule.clip)
        self._inner.add(replace(update, state_dict=clipped, num_examples=1))

    def result(self) -> StateDict:
        """Return the merged state with noise; what this round spent is noted in the memory."""
        merged = self._inner.result()
        check_output(merged, self._start)
        if not self._rule.averages:
            merged = _clip(merged, self._start, self._rule.clip)
        deviation = self._rule.noise * self._rule.clip / self._count
        noisy = _add_noise(merged, deviation) if deviation else merged
        self._spend()
        previous = self._context.previous
        return {key: noisy[key].to(t.dtype) if key in noisy else t for key, t in previous.items()}

    def _spend(self) -> None:
        multiplier = self._rule.noise if self._rule.averages else self._rule.noise / (2 * self._count)
        privacy = self._context.memory.setdefault("privacy", {"steps": 0, "multipliers": {}})
        privacy["delta"] = self._rule.delta
        privacy["steps"] += 1
        # A float as text and back is exact, and a checkpoint's keys are text.
        privacy["multipliers"][repr(multiplier)] = privacy["multipliers"].get(repr(multiplier), 0) + 1
        privacy["epsilon"] = _epsilon([privacy["multipliers"]], self._rule.delta)


def privacy_spent(memory: Mapping[str, Mapping[str, Any]]) -> dict[str, float | int | None] | None:
    """Return what all parts together have spent, composed over parts and rounds.

    Parameters
    ----------
    memory : mapping
        The rules' memory by part, as the server keeps it.

    Returns
    -------
    dict or None
        ``epsilon`` (None if a part has no noise, as there is no bound then), ``delta`` (the smallest of the parts')
        and ``steps`` (the number of merges with `dp`, over all parts); None if no part is private. A part without
        `dp` is not covered: what it releases has no guarantee.
    """
    # A rule of the user's may remember something of its own under the same name.
    found = [part.get("privacy") for part in memory.values()]
    parts = [privacy for privacy in found if isinstance(privacy, Mapping) and "multipliers" in privacy]
    if not parts:
        return None
    delta = min(float(part["delta"]) for part in parts)
    epsilon = _epsilon([part["multipliers"] for part in parts], delta)
    return {"epsilon": epsilon, "delta": delta, "steps": sum(int(part["steps"]) for part in parts)}


def _epsilon(spent: Iterable[Mapping[str, int]], delta: float) -> float | None:
    counts = [(float(multiplier), count) for part in spent for multiplier, count in part.items()]
    if any(multiplier == 0 for multiplier, _ in counts):
        return None
    accounting, rdp = _accountant()
    accountant = rdp.RdpAccountant()
    for multiplier, count in counts:
        accountant.compose(accounting.GaussianDpEvent(multiplier), count)
    return float(accountant.get_epsilon(delta))


def _accountant() -> tuple[Any, Any]:
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError as exc:
        raise UsageError(_MISSING) from exc
    return dp_accounting, rdp


def _clip(state: Mapping[str, Tensor], start: StateDict, clip: float) -> StateDict:
    """Move `state` towards `start` until it is at most `clip` away; bit for bit the same if it already is."""
    norm = math.sqrt(squared_distance(state, start, floating_keys(start)))
    if norm <= clip:
        return dict(state)
    return {key: _between(start[key], tensor.to(start[key].dtype), clip / norm) for key, tensor in state.items()}


def _between(start: Tensor, end: Tensor, share: float) -> Tensor:
    result = torch.lerp(start, end, share)
    if not surely_finite(result):
        # lerp makes NaN of two equal infinities.
        return torch.where(start == end, start, result)
    return result


def _add_noise(state: StateDict, deviation: float) -> StateDict:
    # Not the context's generator: anyone who knows the run's seed could subtract that noise.
    generator = torch.Generator().manual_seed(secrets.randbits(63))
    return {key: _noisy(tensor, deviation, generator) for key, tensor in state.items()}


def _noisy(tensor: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    if tensor.is_complex():
        # torch would give each of the two coordinates half of the variance; each must have all of it.
        return torch.view_as_complex(_noisy(torch.view_as_real(tensor.resolve_conj()), deviation, generator))
    return tensor + deviation * torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)
