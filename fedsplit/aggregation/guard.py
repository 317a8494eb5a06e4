"""The watch over rules: did it change what it was given, and can what it returned be the next global state?

Not caught: writes that go around torch, such as through `tensor.numpy()` or `tensor.data`, which do not count
as a change of the tensor. Catching those would take a checksum of every input, as slow as the merge itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedsplit.aggregation.numeric import is_floating
from fedsplit.aggregation.validation import difference, named, new_non_finite
from fedsplit.errors import AggregationError


class InputGuard:
    """Remembers mappings of tensors as they were, at the price of a number for each tensor."""

    def __init__(self) -> None:
        self._watched: list[tuple[str, Mapping[str, Tensor], dict[str, tuple[Tensor, int]]]] = []

    def watch(self, what: str, state: Mapping[str, Tensor]) -> None:
        """Remember a mapping, its tensors and their versions."""
        self._watched.append((what, state, {key: (t, _version(t)) for key, t in state.items()}))

    def check(self) -> None:
        """Compare with what was remembered.

        Raises
        ------
        AggregationError
            Naming the first mapping and key that changed.
        """
        for what, state, before in self._watched:
            for key in state:
                if key not in before:
                    raise AggregationError(f"it added {key!r} to {what}; a rule must not change what it is given")
            for key, (tensor, version) in before.items():
                if key not in state:
                    raise AggregationError(f"it removed {key!r} from {what}; a rule must not change what it is given")
                if state[key] is not tensor or _version(tensor) != version:
                    raise AggregationError(f"it changed {key!r} in {what}; a rule must not change what it is given")


def _version(tensor: Tensor) -> int:
    # torch raises this counter with every write in place; tensors made under inference_mode have none.
    return 0 if tensor.is_inference() else tensor._version


def check_output(result: object, previous: Mapping[str, Tensor]) -> None:
    """Refuse a result that cannot be the next global state of its part.

    Raises
    ------
    AggregationError
        Naming the first key that is missing, unexpected, or has the wrong type, shape, dtype or device; or
        that holds a NaN or infinity that the previous state does not have there.
    """
    if not isinstance(result, Mapping):
        raise AggregationError(f"it returned a {type(result).__name__}, expected a dict of tensors")
    missing = [key for key in previous if key not in result]
    unexpected = [key for key in result if key not in previous]
    if missing or unexpected:
        found = [f"without {named(missing)}"] if missing else []
        found += [f"with unexpected {named(unexpected)}"] if unexpected else []
        raise AggregationError(f"it returned a state {' and '.join(found)}")
    for key, expected in previous.items():
        _check_entry(key, result[key], expected)


def _check_entry(key: str, found: object, expected: Tensor) -> None:
    if not isinstance(found, Tensor):
        raise AggregationError(f"it returned a {type(found).__name__} for {key!r}, expected a tensor")
    reason = difference(found, expected)
    if reason is not None:
        raise AggregationError(f"it returned {key!r}, which {reason}")
    if found is not expected and is_floating(found) and new_non_finite(found, expected):
        raise AggregationError(
            f"it made a NaN or Inf in {key!r}; if that entry is meant to hold one, keep it with {key}=frozen"
        )
