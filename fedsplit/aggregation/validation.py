"""The check of each update before any rule sees it: keys, shapes, dtypes, number of examples, NaN and infinities.

Not checked: values that are finite and wrong. Against those there are the robust rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from fedsplit.aggregation.base import Update
from fedsplit.aggregation.numeric import is_floating, real_view, same, surely_finite, widened

_NAMED = 3


def check_update(update: Update, reference: Mapping[str, Tensor]) -> str | None:
    """Return why an update must be refused, or None if it may be merged.

    Parameters
    ----------
    update : Update
        As it came from a client.
    reference : mapping of str to Tensor
        The global state the round started from, without the parts that stay with the clients.

    Returns
    -------
    str or None
        The reason in one line. A NaN or infinity is one unless the reference has the same in the same place, as an
        attention mask of -inf does.
    """
    return (
        _check_examples(update.num_examples)
        or _check_keys(update.state_dict, reference)
        or _check_forms(update.state_dict, reference)
        or _check_values(update.state_dict, reference)
    )


def named(keys: Iterable[str]) -> str:
    """Return the first few of the keys, and how many more there are."""
    known = list(keys)
    more = f" and {len(known) - _NAMED} more" if len(known) > _NAMED else ""
    return ", ".join(map(repr, known[:_NAMED])) + more


def difference(found: Tensor, expected: Tensor) -> str | None:
    """Return in words how shape, dtype or device differ, or None."""
    if found.shape != expected.shape:
        return f"has shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if found.dtype != expected.dtype:
        return f"has dtype {found.dtype}, expected {expected.dtype}"
    if found.device != expected.device:
        return f"is on {found.device}, expected {expected.device}"
    return None


def new_non_finite(found: Tensor, reference: Tensor) -> bool:
    """Return whether there is a NaN or infinity that `reference` does not have in the same place."""
    if surely_finite(found):
        return False
    found, reference = real_view(widened(found)), real_view(widened(reference))
    return not bool((found.isfinite() | same(found, reference)).all())


def _check_examples(num_examples: object) -> str | None:
    if not isinstance(num_examples, int) or isinstance(num_examples, bool):
        return f"num_examples is {num_examples!r}, expected a whole number"
    return f"num_examples is {num_examples}, expected at least 1" if num_examples < 1 else None


def _check_keys(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> str | None:
    missing = [key for key in reference if key not in state]
    unexpected = [key for key in state if key not in reference]
    reasons = [f"missing {named(missing)}"] if missing else []
    reasons += [f"unexpected {named(unexpected)}"] if unexpected else []
    return "; ".join(reasons) or None


def _check_forms(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> str | None:
    for key, expected in reference.items():
        reason = difference(state[key], expected)
        if reason is not None:
            return f"{key!r} {reason}"
    return None


def _check_values(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> str | None:
    bad = [key for key, tensor in state.items() if is_floating(tensor) and new_non_finite(tensor, reference[key])]
    return f"NaN or Inf in {named(bad)}" if bad else None
