"""What an update weighs that started from an older state: `--staleness`.

The staleness of an update is the number of merges since the state that it started from.

================================  ==================================================================================
``constant``                      1
``polynomial:A``                  ``(1 + staleness) ** -A``. Xie et al., "Asynchronous Federated Optimization", 2019,
                                  https://arxiv.org/abs/1903.03934; with A = 0.5 also in Nguyen et al., "Federated
                                  Learning with Buffered Asynchronous Aggregation", AISTATS 2022,
                                  https://arxiv.org/abs/2106.06639
``package.module:function``       ``function(staleness)``, a number of 0 or more
================================  ==================================================================================

This module does not import torch.
"""

import math
from collections.abc import Callable

from fedsplit.errors import AggregationError, UsageError

StalenessWeight = Callable[[int], float]


def parse_staleness(text: str) -> StalenessWeight:
    """Return the function that the flag names; raises UsageError. A function of the user's is imported on first use."""
    name, _, rest = text.partition(":")
    if text == "constant":
        return lambda staleness: 1.0
    if name == "polynomial":
        try:
            exponent = float(rest)
        except ValueError:
            exponent = -1.0
        if not 0 <= exponent < math.inf:
            raise UsageError(f"--staleness {text}: expected a number of 0 or more after polynomial:, as polynomial:0.5")
        return lambda staleness: float((1 + staleness) ** -exponent)
    if not (name and rest):
        raise UsageError(f"--staleness {text}: expected constant, polynomial:A or package.module:function")
    return _Own(text)


def check_staleness(text: str) -> None:
    """Import a function of the user's once, before the server waits for anybody; raises UsageError."""
    if isinstance(weight := parse_staleness(text), _Own):
        weight.load()


class _Own:
    """A function of the user's."""

    def __init__(self, text: str) -> None:
        self._text = text

    def load(self) -> StalenessWeight:
        """Import it; raises UsageError."""
        from fedsplit.aggregation.split import find_object

        found = find_object(self._text, f"--staleness {self._text}")
        if not callable(found):
            module, _, name = self._text.partition(":")
            raise UsageError(f"--staleness {self._text}: the module {module!r} has no function {name!r}")
        return found  # type: ignore[no-any-return]

    def __call__(self, staleness: int) -> float:
        weight = self.load()(staleness)
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise AggregationError(f"--staleness {self._text} gave {weight!r} for {staleness}, expected 0 or more")
        return float(weight)
