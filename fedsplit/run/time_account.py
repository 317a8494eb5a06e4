"""Where a round's seconds went: every second of a line of the history belongs to exactly one stage.

The server measures its own stages (``line["stages"]``) and those of every rank (``line["clients"][rank]["stages"]``).
While ranks train at the same time, a second is accounted to what the rank that took longest did in it.
"""

import time
from collections.abc import Mapping
from typing import Any

from fedsplit.run.events import format_bytes
from fedsplit.run.history import is_number

STAGES = {
    "training": "the trainer of the slowest rank at work",
    "hand-off": "the rest of its way: request and answer through client and exchange directory",
    "transfer": "fetching updates",
    "merging": "checking and merging updates",
    "evaluation": "all ranks evaluating the new state",
    "waiting": "for clients, trainers, answers that were not counted, or the disk",
}

# Where a step of split learning goes, as a rank sees it.
STEP_STAGES = {
    "lower": "the rank's trainer: its part forward and back, and the optimizer",
    "rank hand-off": "between the rank's trainer and its client: the exchange directory",
    "relay": "client and server themselves, between the hand-offs",
    "network": "Flower's message there and back, its engine and the network, and payloads that are fetched",
    "turn": "waiting for the other ranks: where the mode has an order, and while the upper part does their steps",
    "upper hand-off": "between the server and the upper part's trainer: the exchange directory",
    "upper": "the upper part's trainer",
}


class Stages:
    """Measures where the seconds of a round, or of one rank in it, go: every second belongs to exactly one stage."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def end(self, stage: str, **parts: float) -> None:
        """Give the seconds since the last call to a stage, but for those known to belong to other stages: ``parts``."""
        now = time.monotonic()
        left = now - self._last
        for name, seconds in parts.items():
            self.seconds[name] = round(min(seconds, left), 6)
            left -= self.seconds[name]
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + max(0.0, left), 6)
        self._last = now

    def total(self) -> float:
        """Return the seconds from the beginning to the last call of `end`."""
        return round(self._last - self._began, 6)


def account(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of each of `STAGES`, in that order; their sum is the line's ``seconds``."""
    total, stages = _numbers(line).get("seconds", 0.0), _numbers(line.get("stages"))
    ranks = [_numbers(row.get("stages")) for row in line.get("clients", {}).values()]
    seconds = dict.fromkeys(STAGES, 0.0)
    train, ahead, merge, evaluate = (stages.get(key, 0.0) for key in ("train", "train ahead", "merge", "evaluate"))
    _account_training(seconds, train, [stages for stages in ranks if stages])
    seconds["training"] += ahead
    seconds["merging"] += merge
    seconds["evaluation"] = evaluate
    # What the server waited for by name, and whatever stage a later version adds.
    seconds["waiting"] += max(0.0, total - (train + ahead + merge + evaluate))
    return seconds


def account_step(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the mean seconds of a step of split learning for each of `STEP_STAGES`; empty for a whole model."""
    split = line.get("split") or {}
    seconds, steps = _numbers(split.get("seconds")), _numbers(split).get("steps", 0.0)
    return {stage: seconds.get(stage, 0.0) / steps for stage in STEP_STAGES} if steps else {}


def _account_training(seconds: dict[str, float], left: float, ranks: list[dict[str, float]]) -> None:
    ranks = [{**stages, "merging": stages.get("merging", 0.0) + stages.get("checking", 0.0)} for stages in ranks]
    # The slowest is the one that was longest at work: the last to be merged may have only waited for its turn.
    slowest = max(ranks, key=_at_work, default={})
    taken = [(name, slowest.get(name, 0.0)) for name in ("training", "hand-off", "transfer", "merging", "waiting")]
    for name in ("merging", "transfer"):
        taken.append((name, sum(stages.get(name, 0.0) for stages in ranks if stages is not slowest)))
    for name, number in taken:
        seconds[name] += min(left, number)
        left -= min(left, number)
    seconds["waiting"] += left


def _at_work(stages: Mapping[str, float]) -> float:
    return sum(seconds for name, seconds in stages.items() if name not in ("turn", "checking"))


def _numbers(row: Mapping[str, Any] | None) -> dict[str, float]:
    return {name: float(value) for name, value in (row or {}).items() if is_number(value)}


def describe_round(line: Mapping[str, Any], total_rounds: int) -> str:
    """Return a round's line for people."""
    parts = [f"round {line['round']}/{total_rounds}", f"{line['accepted']}/{line['asked']} updates"]
    for phase, name in (("train", "train"), ("test", "evaluate"), ("test on the server", "central")):
        metrics = line.get(name, {}).items()
        if shown := ", ".join(f"{metric} {value:.4f}" for metric, value in metrics if value is not None):
            parts.append(f"{phase} {shown}")
    parts += [spent] if (spent := describe_privacy(line)) else []
    if split := line.get("split"):
        up, down = format_bytes(split["bytes_up"]), format_bytes(split["bytes_down"])
        parts.append(f"{split['steps']} steps, {split['steps_per_second']:.1f} a second, {up} up, {down} down")
    if stale := [f"{rank} by {row['staleness']}" for rank, row in line["clients"].items() if row.get("staleness")]:
        parts.append("stale: rank " + ", ".join(stale))
    if line["refused"]:
        parts.append("not counted: rank " + ", ".join(line["refused"]))
    return " | ".join([*parts, f"{line['seconds']:.2f} s", f"updates {format_bytes(update_bytes(line))}"])


def describe_privacy(line: Mapping[str, Any]) -> str:
    """Return what a round's line says of the privacy spent so far; empty where no rule is private."""
    if not (privacy := line.get("privacy")):
        return ""
    epsilon = "unbounded" if privacy["epsilon"] is None else f"{privacy['epsilon']:.3g}"
    return f"privacy spent: epsilon {epsilon} at delta {privacy['delta']:g}"


def update_bytes(line: Mapping[str, Any]) -> int:
    """Return the size of all updates that a round took in."""
    sizes = (row.get("bytes") for row in line.get("clients", {}).values())
    return int(sum(size for size in sizes if is_number(size)))
