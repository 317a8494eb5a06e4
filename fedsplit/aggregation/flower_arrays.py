"""What Flower's strategies see, and back: states as numpy arrays, updates as results, and what a strategy remembers.

Floating entries are float32 at least on the strategy's side, as numpy has no bfloat16 and would average float16 in
float16; complex entries are pairs of numbers. All come back in their own dtype.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import NoneType
from typing import Any

import flwr.common as flower
import numpy as np
import torch
from torch import Tensor

from fedsplit.aggregation.base import StateDict, Update
from fedsplit.aggregation.numeric import is_floating, real_view, widened


def to_arrays(state: Mapping[str, Tensor]) -> flower.Parameters:
    """Return a state as arrays in the order of its keys."""
    wide = (real_view(widened(each)) if is_floating(each) else each for each in state.values())
    return flower.ndarrays_to_parameters([each.numpy(force=True) for each in wide])


def from_arrays(arrays: Sequence[Any], like: Mapping[str, Tensor]) -> StateDict:
    """Return arrays as a state with the names and dtypes of ``like``; raises ValueError if the number is another."""
    return {key: _from_array(array, tensor) for (key, tensor), array in zip(like.items(), arrays, strict=True)}


def _from_array(array: Any, like: Tensor) -> Tensor:
    tensor = torch.from_numpy(np.array(array))
    if like.is_complex():
        tensor = torch.view_as_complex(tensor)
    elif not is_floating(like) and is_floating(tensor):
        # The mean of counters: without this 4.9999 would become 4.
        tensor = tensor.round()
    return tensor.to(like.dtype)


def fit_result(update: Update, state: Mapping[str, Tensor]) -> flower.FitRes:
    """Return an update as the strategies see it, with these entries."""
    status = flower.Status(flower.Code.OK, "")
    return flower.FitRes(status, to_arrays(state), update.num_examples, dict(update.metrics))


class Attributes:
    """What a strategy that was just made comes to remember: its attributes, as a checkpoint can hold them.

    Only those that differ from the ones of a strategy made anew are saved, so that parameters changed on resuming take
    effect.
    """

    def __init__(self, strategy: object) -> None:
        self._strategy = strategy
        self._made: dict[str, Any] = {}
        for name, value in vars(strategy).items():
            with suppress(TypeError, RecursionError):
                # Copies, since a list or a dict may be changed in place. Nobody does that to Flower's Parameters.
                self._made[name] = value if isinstance(value, flower.Parameters) else encode(value)

    def changed(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the encoded attributes that a strategy made anew would not have, and the types of what is lost.

        Functions, classes and modules do not count as lost.
        """
        found, lost = {}, {}
        for name, value in vars(self._strategy).items():
            if isinstance(value, flower.Parameters) and value is self._made.get(name):
                continue
            try:
                encoded = encode(value)
            except (TypeError, RecursionError):
                if not (inspect.isroutine(value) or inspect.isclass(value) or inspect.ismodule(value)):
                    lost[name] = type(value).__name__
                continue
            if name not in self._made or not _is_same(encoded, self._made[name]):
                found[name] = encoded
        return found, lost


def encode(value: Any) -> Any:
    """Return a copy of a value as `torch.save` writes and ``weights_only`` reads it; raises TypeError if there is none.

    There is one for None, bool, int, float, str, numpy arrays and numbers, torch tensors, Flower's `Parameters`, and
    for lists, tuples and dicts of these.
    """
    if type(value) in (NoneType, bool, int, float, str):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value))
    if isinstance(value, np.generic):
        return {"number": encode(np.array(value))}
    if isinstance(value, Tensor):
        return {"tensor": value.detach().clone()}
    if isinstance(value, flower.Parameters) and value.tensor_type == "numpy.ndarray":
        return {"parameters": encode(flower.parameters_to_ndarrays(value))}
    if type(value) is list:
        return [encode(item) for item in value]
    if type(value) is tuple:
        return {"tuple": encode([*value])}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    raise TypeError(f"no checkpoint can hold a {type(value).__name__}")


def decode(value: Any) -> Any:
    """Return what `encode` was given."""
    match value:
        case Tensor():
            return value.numpy()
        case list():
            return [decode(item) for item in value]
        case {"number": tensor}:
            return tensor.numpy()[()]
        case {"tensor": tensor}:
            return tensor
        case {"parameters": tensors}:
            return flower.ndarrays_to_parameters(decode(tensors))
        case {"tuple": items}:
            return tuple(decode(items))
        case {"dict": items}:
            return {decode(key): decode(item) for key, item in items}
    return value


def _is_same(left: Any, right: Any) -> bool:
    """Tell whether two encoded values are the same; 1, 1.0 and True are not."""
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(_is_same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_is_same(left[key], right[key]) for key in left)
    return bool(left == right)
