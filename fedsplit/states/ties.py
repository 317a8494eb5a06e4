"""Tied weights: one tensor under several names of a state_dict, such as a language model's embedding and head.

They are one entry to the rules, one copy on the wire and on disk, and tied again where they arrive.
"""

from collections.abc import Callable, Mapping

import torch

from fedsplit.errors import UsageError


def find_ties(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Map each entry that is the same memory as an earlier one to that one."""
    first: dict[object, str] = {}
    ties = {}
    for name, tensor in state.items():
        if begin := _address(tensor):
            kind = (tensor.dtype, tensor.is_conj(), tensor.is_neg())
            kept = first.setdefault((tensor.device, begin, tensor.shape, tensor.stride(), kind), name)
            if kept != name:
                ties[name] = kept
    return ties


def broken_tie(ties: Mapping[str, str], state: Mapping[str, torch.Tensor], *, expected: str, found: str) -> str | None:
    """Say in one line which tie of another state does not hold in this one, or return None."""
    own = find_ties(state) if ties else {}
    for name, kept in ties.items():
        is_tied = own.get(name, name) == own.get(kept, kept)
        if not is_tied and not torch.equal(_bits(state[name]), _bits(state[kept])):
            return f"{expected} ties {name!r} to {kept!r}, {found} has different values for them"
    return None


def check_shared(state: Mapping[str, torch.Tensor], is_local: Callable[[str], bool]) -> None:
    """Refuse rules under which memory that stays at home would travel under another name; raises UsageError."""
    spans = sorted((str(tensor.device), *span, name) for name, tensor in state.items() if (span := _span(tensor)))
    for index, (device, _, end, name) in enumerate(spans):
        for other_device, other_begin, _, other in spans[index + 1 :]:
            if other_device != device or other_begin >= end:
                break
            if is_local(name) != is_local(other):
                local, away = (name, other) if is_local(name) else (other, name)
                raise UsageError(
                    f"{local!r} and {away!r} share their memory (tied weights), but under the server's rules {local!r} "
                    f"stays local and {away!r} does not; give both the same rule, for example --aggregate "
                    f"'{away}=local'"
                )


def _span(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Return where a tensor's elements begin and end in memory."""
    if not (begin := _address(tensor)):
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.itemsize


def _address(tensor: torch.Tensor) -> int:
    """Return where a tensor's elements begin in memory; 0 if it has none, or memory of another kind."""
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    return tensor.data_ptr() if is_plain and not tensor.is_meta and tensor.numel() else 0


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)
