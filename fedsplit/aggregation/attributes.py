"""What a Flower strategy remembers between rounds: its attributes, as a checkpoint can hold them.

Kept are None, bool, int, float, str, numpy arrays and numbers, torch tensors, Flower's `Parameters`, and lists, tuples
and dicts of these. Anything else (a function, a generator of random numbers, a model) cannot be kept. Only attributes
that differ from those of a strategy made anew are saved, so that parameters changed on resuming take effect.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch


class NotKeepableError(TypeError):
    """A value that no checkpoint can hold; internal."""


class Attributes:
    """Watches the attributes of one strategy from the moment it was made.

    Parameters
    ----------
    strategy
        Just made.
    """

    def __init__(self, strategy: object) -> None:
        self._strategy = strategy
        self._made = dict(vars(strategy))
        # Copies, since a list or a dict may be changed in place. Nobody does that to Flower's Parameters.
        self._encoded = {
            name: encoded
            for name, value in self._made.items()
            if not _is_parameters(value) and (encoded := _encoded_or_none(value))
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
            if not (
                _encoded_or_none(value) or inspect.isroutine(value) or inspect.isclass(value) or inspect.ismodule(value)
            )
        }


def encode(value: Any) -> Any:
    """Return a value as `torch.save` writes and ``weights_only`` reads it; arrays are copied.

    Raises
    ------
    NotKeepableError
        If it is, or holds, what cannot be kept.
    """
    from flwr.common import Parameters, parameters_to_ndarrays

    if isinstance(value, np.generic):
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
    from flwr.common import ndarrays_to_parameters

    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "scalar":
            return content.numpy()[()]
        case "tensor":
            return content
        case "parameters":
            return ndarrays_to_parameters([tensor.numpy() for tensor in content])
        case "tuple":
            return tuple(decode(item) for item in content)
        case _:
            return {decode(key): decode(item) for key, item in content}


def _tensor(array: Any) -> torch.Tensor:
    try:
        return torch.from_numpy(np.array(array))
    except TypeError as exc:
        raise NotKeepableError(f"an array of {array.dtype}") from exc


def _encoded_or_none(value: object) -> tuple[Any] | None:
    try:
        return (encode(value),)
    except (NotKeepableError, RecursionError):
        return None


def _is_parameters(value: object) -> bool:
    from flwr.common import Parameters

    return isinstance(value, Parameters)


def _is_same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and _all_same(zip(left, right, strict=True))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and _all_same((left[key], right[key]) for key in left)
    return type(left) is type(right) and bool(left == right)


def _all_same(pairs: Iterable[tuple[Any, Any]]) -> bool:
    return all(_is_same(left, right) for left, right in pairs)
