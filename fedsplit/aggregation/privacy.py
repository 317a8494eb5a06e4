"""Central differential privacy around any rule: `dp(rule, clip=…, noise=…)`.

Each update is clipped against the state it started from, the rule inside merges the clipped ones, and
Gaussian noise is added to what it returns. The trusted party is the server; a client is what is protected.

What the reported epsilon assumes, and no more than this:

- Two runs are neighbours if in one of them one client's update is replaced by the state it started from. The
number
  of clients in a round is public.
- The mean of n clipped updates then moves by at most ``clip / n``, and the noise is ``noise * clip / n`` on
each
  coordinate: with `fedavg` inside, the noise multiplier is `noise`. For this `num_examples` is taken as 1 for
  all.
- Any other rule may follow a single client all the way. Its result is clipped once more, so that it moves by
at most
  ``2 * clip``; the noise is the same ``noise * clip / n``, so the multiplier that is accounted for is only
  ``noise / (2 * n)``.
- Every client may take part in every round: nothing is gained by sampling clients.
- Integer and boolean entries keep the server's value, as nothing protects them. `num_examples`, metrics and
losses
  that clients report are not protected.

Not promised: resistance to attacks on floating-point noise. The generator is torch's, seeded from the
operating system's; it is not a cryptographic one.
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
from fedsplit.aggregation.numeric import floating_keys, is_floating, squared_distance, widened
from fedsplit.errors import UsageError

_MISSING = "dp needs an accountant that is not installed: pip install 'fedsplit[privacy]'"


def private_rule(name: str, inner: Rule, *, averages: bool, clip: float, noise: float, delta: float = 1e-5) -> Rule:
    """Wrap a rule.

    Parameters
    ----------
    name : str
        How messages call it.
    inner : Rule
        The rule that merges the clipped updates.
    averages : bool
        Whether `inner` is `fedavg`, whose result moves by only ``clip / n``.
    clip : float
        Largest L2 norm of an update, over all floating entries of the part.
    noise : float
        Noise multiplier; 0 clips only, and protects nothing.
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
        """Clip the update and hand it on."""
        self._count += 1
        state = {key: widened(update.state_dict[key]) for key in self._start}
        clipped = _clip(state, self._start, self._rule.clip)
        self._inner.add(replace(update, state_dict=clipped, num_examples=1))

    def result(self) -> StateDict:
        """The merged state with noise, and the spending of this round in the memory."""
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
    """What all parts together have spent, by composition over parts and rounds.

    Parameters
    ----------
    memory : mapping
        The rules' memory by part, as the server keeps it.

    Returns
    -------
    dict or None
        ``epsilon`` (None: without bound, as noise is 0 somewhere), ``delta`` (the smallest any part asked
        for) and ``steps`` (noisy merges, over all parts); None if no part is private. A part without `dp` is
        not covered: whatever it releases has no guarantee.
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
    return {key: torch.lerp(start[key], tensor.to(start[key].dtype), clip / norm) for key, tensor in state.items()}


def _add_noise(state: StateDict, deviation: float) -> StateDict:
    # Not the context's generator: who knows the run's seed could subtract the noise.
    generator = torch.Generator().manual_seed(secrets.randbits(63))
    return {key: _noisy(tensor, deviation, generator) for key, tensor in state.items()}


def _noisy(tensor: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    if tensor.is_complex():
        # torch would share the variance between the two coordinates; each must get all of it.
        return torch.view_as_complex(_noisy(torch.view_as_real(tensor.resolve_conj()), deviation, generator))
    return tensor + deviation * torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)
