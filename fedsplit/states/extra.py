"""Extra tensors beside a model's state: control variates, Fisher information, whatever an algorithm sends besides.

They travel in the state's payload under names that begin with `PREFIX`, so they are digested, sent, kept and resumed
with it. Everywhere else they are a mapping of their own: no rule merges them unless it asks for them.
"""

from collections.abc import Mapping

import torch

from fedsplit.errors import UsageError
from fedsplit.states.header import PREFIX

# Of those that are read beside a state: at most so much, and so many times the state.
MOST_BYTES, MOST_STATES = 64_000_000, 4
_Tensors = dict[str, torch.Tensor]


def join(state: Mapping[str, torch.Tensor], extra: Mapping[str, torch.Tensor]) -> _Tensors:
    """Put a state and extra tensors into one mapping, as it travels; raises UsageError for what cannot travel so."""
    for name in state:
        if name.startswith(PREFIX):
            raise UsageError(
                f"the state_dict has {name!r}: names that begin with {PREFIX!r} are those of extra tensors"
            )
    for name, tensor in extra.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UsageError(f"extra has {name!r}: {type(tensor).__name__}; expected names and tensors")
    return {**state, **{f"{PREFIX}{name}": tensor for name, tensor in extra.items()}}


def separate(entries: Mapping[str, torch.Tensor]) -> tuple[_Tensors, _Tensors]:
    """Return the state and the extra tensors of a payload."""
    state, extra = _Tensors(), _Tensors()
    for name, tensor in entries.items():
        if name.startswith(PREFIX):
            extra[name.removeprefix(PREFIX)] = tensor
        else:
            state[name] = tensor
    return state, extra
