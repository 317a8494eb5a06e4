"""Where a round's seconds went: every second of a line of the history belongs to exactly one stage.

The server measures its own stages (``line["stages"]``) and those of every rank (``line["clients"][rank]["stages"]``).
While ranks train at the same time, a second is accounted to what the rank that took longest did in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STAGES = {
    "training": "the trainer of the slowest rank at work",
    "hand-off": "the rest of its way: request and answer through client and exchange directory",
    "transfer": "fetching updates",
    "merging": "checking and merging updates",
    "evaluation": "all ranks evaluating the new state",
    "waiting": "for clients, trainers, answers that were not counted, or the disk",
}


def account(line: Mapping[str, Any]) -> dict[str, float]:
    """Divide a round's seconds.

    Returns
    -------
    seconds : dict of str to float
        For each of `STAGES`, in that order; their sum is the line's ``seconds``. A line without stages is divided by
        what the trainers reported.
    """
    server = _numbers(line.get("stages"))
    ranks = [_numbers(row.get("stages")) for row in line.get("clients", {}).values()]
    if not server:
        return _account_reported(line)
    seconds = dict.fromkeys(STAGES, 0.0)
    _account_training(seconds, server.get("train", 0.0), [stages for stages in ranks if stages])
    seconds["training"] += server.get("train ahead", 0.0)
    seconds["merging"] += server.get("merge", 0.0)
    seconds["evaluation"] = server.get("evaluate", 0.0)
    # What the server waited for by name, and whatever stage a later version adds.
    known = sum(server.get(name, 0.0) for name in ("train", "train ahead", "merge", "evaluate"))
    seconds["waiting"] += max(0.0, _number(line, "seconds") - known)
    return seconds


def update_bytes(line: Mapping[str, Any]) -> int:
    """Return the size of all updates that a round took in."""
    return int(sum(_number(row, "bytes") for row in line.get("clients", {}).values()))


def _account_training(seconds: dict[str, float], total: float, ranks: list[dict[str, float]]) -> None:
    left = total
    ranks = [{**stages, "merging": stages.get("merging", 0.0) + stages.get("checking", 0.0)} for stages in ranks]
    # The slowest is the one that was longest at work: the last to be merged may have only waited for its turn.
    slowest = max(ranks, key=_at_work, default={})
    for name in ("training", "hand-off", "transfer", "merging", "waiting"):
        left -= (taken := min(left, slowest.get(name, 0.0)))
        seconds[name] += taken
    for name in ("merging", "transfer"):
        others = sum(stages.get(name, 0.0) for stages in ranks if stages is not slowest)
        left -= (taken := min(left, others))
        seconds[name] += taken
    seconds["waiting"] += left


def _account_reported(line: Mapping[str, Any]) -> dict[str, float]:
    answers = list(line.get("clients", {}).values())
    total = _number(line, "seconds")
    training = min(total, max((_number(row, "seconds") for row in answers), default=0.0))
    evaluation = max((_number(row.get("evaluate", {}), "seconds") for row in answers), default=0.0)
    evaluation = min(total - training, evaluation)
    return dict.fromkeys(STAGES, 0.0) | {
        "training": training, "evaluation": evaluation, "hand-off": total - training - evaluation,
    }  # fmt: skip


def _at_work(stages: Mapping[str, float]) -> float:
    return sum(seconds for name, seconds in stages.items() if name not in ("turn", "checking"))


def _numbers(row: Any) -> dict[str, float]:
    if not isinstance(row, dict):
        return {}
    return {name: float(value) for name, value in row.items() if isinstance(value, int | float)}


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def describe_privacy(line: Mapping[str, Any]) -> str:
    """Return what a round's line says of the privacy spent so far; empty where no rule is private."""
    privacy = line.get("privacy")
    if not privacy:
        return ""
    epsilon = "unbounded" if privacy["epsilon"] is None else f"{privacy['epsilon']:.3g}"
    return f"privacy spent: epsilon {epsilon} at delta {privacy['delta']:g}"
