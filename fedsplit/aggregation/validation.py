"""The checks before and after a rule: each update, what the rule was given, what it returned, and what it remembers.

Not checked: values that are finite and wrong. Against those there are the robust rules.
"""

from collections.abc import Mapping

from torch import Tensor

from fedsplit.aggregation.base import Update
from fedsplit.aggregation.numeric import real_view, same, surely_finite, widened
from fedsplit.errors import AggregationError
from fedsplit.states.local_keys import named
from fedsplit.states.state_dict import describe_difference
from fedsplit.states.ties import broken_tie, find_ties


def check_update(update: Update, reference: Mapping[str, Tensor], *, numbers: bool = True) -> str | None:
    """Return in one line why an update must be refused, or None if it may be merged.

    `reference` is the global state the round started from, without the parts that stay with the clients. A NaN or
    infinity is a reason unless the reference has the same in the same place, as an attention mask of -inf; without
    ``numbers`` they are not looked at.
    """
    state, examples = update.state_dict, update.num_examples
    if not isinstance(examples, int) or isinstance(examples, bool):
        return f"num_examples is {examples!r}, expected a whole number"
    if examples < 1:
        return f"num_examples is {examples}, expected at least 1"
    return (
        describe_difference(reference, state, expected="the global state", found="it")
        or broken_tie(find_ties(reference), state, expected="the global state", found="it")
        or (check_numbers(state, reference) if numbers else None)
        or extra_reason(update.extra)
    )


def check_numbers(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> str | None:
    """Return in one line where a state has a NaN or infinity that the reference has not in the same place, or None."""
    bad = [key for key, tensor in state.items() if _new_non_finite(tensor, reference[key])]
    return f"NaN or Inf in {named(bad)}" if bad else None


def extra_reason(extra: Mapping[str, Tensor]) -> str | None:
    """Return in one line why extra tensors cannot be taken, or None."""
    for name, tensor in extra.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.device.type != "cpu":
            found = f"a tensor on {tensor.device}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            return f"the extra tensor {name!r}: expected a name and a tensor on the CPU, found {found}"
        if not (surely_finite(tensor) or bool(real_view(widened(tensor)).isfinite().all())):
            return f"NaN or Inf in the extra tensor {name!r}"
    return None


def check_output(result: object, previous: Mapping[str, Tensor]) -> None:
    """Refuse a result that cannot be the next global state of its part: raises AggregationError, naming the key.

    Its keys, shapes, dtypes and devices must be those of the previous state, and so any NaN or infinity in it.
    """
    if not isinstance(result, Mapping):
        raise AggregationError(f"it returned a {type(result).__name__}, expected a dict of tensors")
    for key, tensor in result.items():
        if not isinstance(tensor, Tensor):
            raise AggregationError(f"it returned a {type(tensor).__name__} for {key!r}, expected a tensor")
    if difference := describe_difference(previous, result, expected="the state before", found="its result"):
        raise AggregationError(difference)
    for key, expected in previous.items():
        tensor = result[key]
        if tensor.device != expected.device:
            raise AggregationError(f"it returned {key!r} on {tensor.device}, expected {expected.device}")
        if tensor is not expected and _new_non_finite(tensor, expected):
            raise AggregationError(
                f"it made a NaN or Inf in {key!r}; if that entry is meant to hold one, keep it with {key}=frozen"
            )


def check_memory(memory: object, where: str = "memory") -> None:
    """Refuse what a checkpoint cannot hold: raises AggregationError, naming the place in the memory and the type."""
    if isinstance(memory, dict):
        for key, value in memory.items():
            if not isinstance(key, str):
                raise AggregationError(f"{where} has the key {key!r}: expected str keys, found {type(key).__name__}")
            check_memory(value, f"{where}[{key!r}]")
    elif isinstance(memory, list):
        for index, value in enumerate(memory):
            check_memory(value, f"{where}[{index}]")
    elif not isinstance(memory, None | bool | int | float | str | Tensor):
        raise AggregationError(
            f"{where} holds a {type(memory).__name__}, which no checkpoint can hold: expected None, bool, "
            "int, float, str, list, dict or Tensor"
        )


class Watched:
    """Tells whether a rule changed a mapping of tensors that it was given.

    Writes that go around torch, as through `tensor.numpy()` or `tensor.data`, are not seen: that would take a checksum
    of every input, as slow as the merge itself.
    """

    def __init__(self, what: str, state: Mapping[str, Tensor]) -> None:
        self._what = what
        self._state = state
        self._before = {key: (tensor, _version(tensor)) for key, tensor in state.items()}

    def check(self) -> None:
        """Raise an AggregationError that names the first key that changed."""
        did = [f"added {key!r} to" for key in self._state if key not in self._before]
        for key, (tensor, version) in self._before.items():
            if key not in self._state:
                did.append(f"removed {key!r} from")
            elif self._state[key] is not tensor or _version(tensor) != version:
                did.append(f"changed {key!r} in")
        if did:
            raise AggregationError(f"it {did[0]} {self._what}; a rule must not change what it is given")


def _new_non_finite(found: Tensor, reference: Tensor) -> bool:
    """Return whether there is a NaN or infinity that `reference` does not have in the same place."""
    if surely_finite(found):
        return False
    found, reference = real_view(widened(found)), real_view(widened(reference))
    return not bool((found.isfinite() | same(found, reference)).all())


def _version(tensor: Tensor) -> int:
    # torch raises this counter with every write in place; tensors made under inference_mode have none.
    return 0 if tensor.is_inference() else tensor._version
