"""Cutting a model: the parts of a chain of modules, each under the names that its modules have in the whole.

A chain is an `nn.Sequential`, of modules or of further chains. ``Chain`` keeps the names, so the entries of the parts'
state_dicts, put together, are those of the whole model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from fedsplit.errors import UsageError, WorkloadError

Link = tuple[str, nn.Module]


class Chain(nn.Module):
    """Modules one after the other, each under a dotted name; `forward` passes what the first one gets through all."""

    def __init__(self, links: Sequence[Link]) -> None:
        super().__init__()
        for name, module in links:
            parent: nn.Module = self
            *above, last = name.split(".")
            for each in above:
                if each not in parent._modules:
                    parent.add_module(each, nn.Module())
                parent = parent.get_submodule(each)
            parent.add_module(last, module)
        # A tuple, which is not registered: each module is there under its name already.
        self._links = tuple(module for _, module in links)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        for module in self._links:
            given = module(given)
        return given


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a model. With a `tail` it is U-shaped: the last layers are with the rank again, and the labels."""

    lower: nn.Module
    upper: nn.Module
    tail: nn.Module | None = None

    def at_rank(self) -> nn.Module:
        """Return what a rank trains, its entries called ``lower.*``, and ``tail.*`` where there is a tail."""
        return nn.ModuleDict({"lower": self.lower} | ({"tail": self.tail} if self.tail is not None else {}))

    def beyond(self) -> nn.Module:
        """Return what is trained beside the server, its entries called ``upper.*``."""
        return nn.ModuleDict({"upper": self.upper})

    @property
    def draws(self) -> bool:
        """Whether a module of them draws random numbers in training, by what torch's own modules show of it."""
        modules = [*self.at_rank().modules(), *self.beyond().modules()]
        return any("Dropout" in type(module).__name__ or getattr(module, "dropout", 0) for module in modules)


def parts_of(workload: Any, cut: str | None, tail: str | None) -> Parts:
    """Return a workload's own `lower`, `upper` and `tail`, or its `model` cut after the module `cut`.

    With `tail` the model is cut a second time, after the module of that name. Raises UsageError for a cut that is not
    there, naming those that are, and for parts that share weights or have none; WorkloadError if there is nothing to
    cut.
    """
    own = [getattr(workload, name, None) for name in ("lower", "upper", "tail")]
    if cut is None and isinstance(own[0], nn.Module) and isinstance(own[1], nn.Module):
        if tail is not None:
            raise UsageError(f"--tail {tail} needs --cut: this workload gives its parts itself")
        parts = Parts(lower=own[0], upper=own[1], tail=own[2])
    else:
        parts = _cut(getattr(workload, "model", None), cut, tail)
    _check(parts)
    return parts


def _cut(model: Any, cut: str | None, tail: str | None) -> Parts:
    if type(model) is not nn.Sequential:
        raise WorkloadError(
            f"the workload's model is a {type(model).__name__}, and only an nn.Sequential can be cut by name; give the "
            "workload the attributes lower and upper instead, two modules"
        )
    links = list(_links(model))
    ends = _ends(links)
    if cut is None:
        raise UsageError(f"--cut NAME says after which module the model is cut; there are {_named(ends)}")
    first = _end(ends, "--cut", cut)
    if tail is None:
        return Parts(lower=Chain(links[:first]), upper=Chain(links[first:]))
    second = _end({name: end for name, end in ends.items() if end > first}, "--tail", tail)
    return Parts(lower=Chain(links[:first]), upper=Chain(links[first:second]), tail=Chain(links[second:]))


def _links(chain: nn.Sequential, prefix: str = "") -> Iterator[Link]:
    """Yield the modules of a chain, and of the chains in it, in the order of the forward pass."""
    # Not named_children(), which leaves out a module that comes a second time.
    for name, module in chain._modules.items():
        # Not of a subclass: it may do something else in its forward pass.
        if type(module) is nn.Sequential:
            yield from _links(module, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", module


def _ends(links: Sequence[Link]) -> dict[str, int]:
    """Return after which names, of modules and chains, the model can be cut, and how many modules are before that."""
    ends: dict[str, int] = {}
    for index, ((name, _), (following, _)) in enumerate(pairwise(links), start=1):
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            each = ".".join(parts[:depth])
            if not following.startswith(f"{each}."):
                ends[each] = index
    return ends


def _end(ends: dict[str, int], flag: str, name: str) -> int:
    if name not in ends:
        raise UsageError(f"{flag} {name}: the model cannot be cut there; it can be after {_named(ends)}")
    return ends[name]


def _named(ends: dict[str, int]) -> str:
    return ", ".join(ends) or "none of its modules"


def _check(parts: Parts) -> None:
    rank, beyond = parts.at_rank(), parts.beyond()
    for module, which in ((rank, "with the rank"), (beyond, "beside the server")):
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise UsageError(f"the part of the model {which} has no weights to train; cut the model elsewhere")
    names = {id(each): name for name, each in [*rank.named_parameters(), *rank.named_buffers()]}
    for name, each in [*beyond.named_parameters(), *beyond.named_buffers()]:
        if id(each) in names:
            raise UsageError(f"{names[id(each)]!r} and {name!r} are one tensor: what is tied cannot be cut apart")
