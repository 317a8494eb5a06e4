"""The server's settings, checked; free of torch, so that a wrong flag is told of at once."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedsplit.aggregation.spec import RuleSpec
from fedsplit.disk.files import Buffer
from fedsplit.errors import UsageError
from fedsplit.exchange.records import Scalar


@dataclass(frozen=True, kw_only=True)
class StrategySettings:
    """How rounds are shaped; the fields are the server's flags."""

    rules: tuple[RuleSpec, ...]
    min_clients: int = 2
    min_results: int = 1
    fraction_train: float = 1.0
    evaluate_every: int = 1
    train_config: Mapping[str, Scalar] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("min_clients", "min_results"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if not 0.0 < self.fraction_train <= 1.0:
            raise UsageError(f"--fraction-train must be above 0 and at most 1, not {self.fraction_train}")
        if self.evaluate_every < 0:
            raise UsageError(f"--evaluate-every must be 0 (never) or more, not {self.evaluate_every}")

    @property
    def local_patterns(self) -> tuple[tuple[str, bool], ...]:
        """``(pattern, local)`` for every rule in order: what a trainer needs to know of the split."""
        return tuple((spec.pattern or "*", spec.name == "local") for spec in self.rules)

    def is_evaluated(self, server_round: int) -> bool:
        """Tell whether a round ends with an evaluation."""
        return self.evaluate_every > 0 and server_round % self.evaluate_every == 0

    def sample(self, server_round: int, ranks: Sequence[int]) -> list[int]:
        """Draw the ranks that train in a round: the same ones whenever the same ranks are there."""
        number = max(1, math.ceil(self.fraction_train * len(ranks)), min(self.min_results, len(ranks)))
        return sorted(random.Random(f"{self.seed}/{server_round}").sample(sorted(ranks), number))


def initial_from(path: Path | None) -> Callable[[], list[Buffer]] | None:
    """Return what reads a state to start from, once torch may be imported; None without a file."""
    if path is None:
        return None

    def read() -> list[Buffer]:
        from fedsplit.states.portable import read_initial_checkpoint

        return read_initial_checkpoint(path)

    return read
