"""What a Flower strategy remembers between rounds: its attributes, as a checkpoint can hold them.

Kept are None, bool, int, float, str, numpy arrays and numbers, torch tensors, Flower's `Parameters`, and lists, tuples
and dicts of these. Anything else (a function, a generator of random numbers, a model) cannot be kept. Only attributes
that differ from those of a strategy made anew are saved, so that parameters changed on resuming take effect.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from flwr.common import Parameters, ndarrays_to_parameters, parameters_to_ndarrays


class NotKeepableError(TypeError):
    """A value that no checkpoint can hold; internal."""


class Attributes:
    """Watches the attributes of a strategy that was just made."""

    def __init__(self, strategy: object) -> None:
        self._strategy = strategy
        self._made = dict(vars(strategy))
        # Copies, since a list or a dict may be changed in place. Nobody does that to Flower's Parameters.
        self._encoded = {
            name: encoded
            for name, value in self._made.items()
            if not isinstance(value, Parameters) and (encoded := _encoded_or_none(value))
        }

    def changed(self) -> dict[str, Any]:
        """Return the encoded attributes that a strategy made anew would not have; without those of `not_keepable`."""
        found = {}
        for name, value in vars(self._strategy).items():
            if name in self._made and value is self._made[name] and name not in self._encoded:
                continue
            encoded = _encoded_or_none(value)
            if encoded and not (name in self._encoded and _is_same(encoded, self._encoded[name])):
                found[name] = encoded[0]
        return found

    def not_keepable(self) -> dict[str, str]:
        """Return the type of each attribute that cannot be kept; functions, classes and modules do not count."""
        return {
            name: type(value).__name__
            for name, value in vars(self._strategy).items()
            if not (inspect.isroutine(value) or inspect.isclass(value) or inspect.ismodule(value))
            and not _encoded_or_none(value)
        }


def encode(value: Any) -> Any:
    """Return a value as `torch.save` writes and ``weights_only`` reads it; arrays are copied.

    Raises
    ------
    NotKeepableError
        If it is, or holds, what cannot be kept.
    """
    if isinstance(value, np.generic):  # before float, which numpy's float64 is too
        return {"scalar": _tensor(value)}
    if isinstance(value, None | bool | int | float | str):
        return value
    if isinstance(value, np.ndarray):
        return _tensor(value)
    if isinstance(value, torch.Tensor):
        return {"tensor": value.detach().clone()}
    if isinstance(value, Parameters) and value.tensor_type == "numpy.ndarray":
        return {"parameters": [_tensor(array) for array in parameters_to_ndarrays(value)]}
    if type(value) is list:
        return [encode(item) for item in value]
    if type(value) is tuple:
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"items": [[encode(key), encode(item)] for key, item in value.items()]}
    raise NotKeepableError(f"a {type(value).__name__}")


def decode(value: Any) -> Any:
    """Return what `encode` was given."""
    match value:
        case torch.Tensor():
            return value.numpy()
        case list():
            return [decode(item) for item in value]
        case {"scalar": tensor}:
            return tensor.numpy()[()]
        case {"tensor": tensor}:
            return tensor
        case {"parameters": tensors}:
            return ndarrays_to_parameters([tensor.numpy() for tensor in tensors])
        case {"tuple": items}:
            return tuple(decode(item) for item in items)
        case {"items": items}:
            return {decode(key): decode(item) for key, item in items}
        case _:
            return value


def _tensor(array: Any) -> torch.Tensor:
    try:
        return torch.from_numpy(np.array(array))
    except TypeError as exc:
        raise NotKeepableError(f"an array of {array.dtype}") from exc


def _encoded_or_none(value: object) -> tuple[Any] | None:
    """Return a value encoded, in a tuple since None is a value, or None if it cannot be."""
    try:
        return (encode(value),)
    except (NotKeepableError, RecursionError):
        return None


def _is_same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(_is_same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_is_same(left[key], right[key]) for key in left)
    return bool(left == right)
