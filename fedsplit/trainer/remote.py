"""The cut, as a rank's script sees it: activations go out, and their gradient comes back with ``backward()``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from fedsplit.exchange.records import Scalar
from fedsplit.states.state_dict import StateDict

if TYPE_CHECKING:
    from fedsplit.trainer.task import Task

Value = TypeVar("Value")


class Given(NamedTuple):
    """What the other half of the model gave: tensors over a mapped file, and numbers."""

    tensors: StateDict
    numbers: Mapping[str, Scalar]


def remote(
    task: Task, activations: torch.Tensor, targets: torch.Tensor | None = None, *, generator: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return the loss, or without `targets` the output, of the half that lies beyond; see `Task.remote`."""
    # Without a gradient of its own, as where every weight below is frozen, the half beyond must train all the same.
    needs_gradient = torch.is_grad_enabled() and not activations.requires_grad
    activations = activations.detach().requires_grad_() if needs_gradient else activations
    if targets is None:
        output: torch.Tensor = _Output.apply(activations, task, generator, dtype)  # type: ignore[no-untyped-call]
        return output
    tensors = {**narrow("activations", activations, dtype), "targets": targets}
    given = _ask(task, "loss", tensors, generator)
    loss: torch.Tensor = torch.tensor(given.numbers["loss"], dtype=torch.float32, device=activations.device)
    if torch.is_grad_enabled():
        loss = _Loss.apply(activations, widen("gradient", given.tensors, activations), loss)  # type: ignore[no-untyped-call]
    return loss


def remote_window(
    task: Task, batches: Sequence[tuple[torch.Tensor, torch.Tensor]], *, generator: bool = False,
    dtype: torch.dtype | None = None,
) -> list[tuple[torch.Tensor, Mapping[str, Scalar]]]:  # fmt: skip
    """Let the half beyond do a step with each batch's activations and targets, one after the other, by one hand-over.

    Returns for each the gradient of its activations, and the numbers that were found, the loss among them.
    """
    tensors = pack([{**narrow("activations", given, dtype), "targets": targets} for given, targets in batches])
    found = _ask(task, "loss", tensors, generator, window=len(batches))
    gradients, numbers = unpack(found.tensors, len(batches)), unpack(found.numbers, len(batches))
    return [
        (widen("gradient", tensors, given), said)
        for (given, _), tensors, said in zip(batches, gradients, numbers, strict=True)
    ]


def pack(batches: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    """Return the values of several batches as those of one message: the first one's names are as they are."""
    return {
        f"{index}/{name}" if index else name: value
        for index, batch in enumerate(batches) for name, value in batch.items()
    }  # fmt: skip


def unpack(values: Mapping[str, Value], count: int) -> list[dict[str, Value]]:
    """Return the values of each batch of a message; raises ValueError for one that belongs to none."""
    found: list[dict[str, Value]] = [{} for _ in range(count)]
    for name, value in values.items():
        index, slash, own_name = name.partition("/")
        if slash and not (index.isdecimal() and 0 < int(index) < count):
            raise ValueError(f"{name!r} belongs to none of {count} batches")
        found[int(index) if slash else 0][own_name if slash else name] = value
    return found


def narrow(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> StateDict:
    """Return the entries in which a tensor travels: as it is, or in another dtype; int8 has one scale for all of it.

    Raises ValueError for a tensor with NaN or infinity, which int8 has no number for.
    """
    tensor = tensor.detach()
    if dtype is None or not tensor.is_floating_point():
        return {name: tensor}
    if dtype != torch.int8:
        return {name: tensor.to(dtype)}
    if not tensor.isfinite().all():
        raise ValueError(f"the {name} at the cut have NaN or infinity, which cannot travel as int8")
    scale = tensor.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny) / 127
    return {name: (tensor.float() / scale).round().to(torch.int8), f"{name}.scale": scale}


def widen(name: str, tensors: StateDict, like: torch.Tensor) -> torch.Tensor:
    """Return a tensor that travelled, in the dtype of another one and on its device."""
    tensor, scale = tensors[name].to(like.device), tensors.get(f"{name}.scale")
    if scale is not None:
        tensor = tensor.float() * scale.to(like.device)
    return tensor.to(like.dtype) if tensor.is_floating_point() else tensor


class _Loss(torch.autograd.Function):
    """A loss whose gradient with respect to the activations is there already."""

    @staticmethod
    def forward(ctx: Any, activations: torch.Tensor, gradient: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # Mostly the loss itself is what is derived; its gradient is large.
        return gradient if outer[0] == 1 else gradient * outer[0], None, None


class _Output(torch.autograd.Function):
    """The output of the half beyond; its gradient is sent there, and that of the activations comes back."""

    @staticmethod
    def forward(
        ctx: Any, activations: torch.Tensor, task: Task, generator: bool, dtype: torch.dtype | None
    ) -> torch.Tensor:
        ctx.task, ctx.dtype = task, dtype
        ctx.save_for_backward(activations)
        given = _ask(task, "forward", narrow("activations", activations, dtype), generator)
        # A copy: a module that works in place could not change what lies over a file.
        return widen("output", given.tensors, activations).clone()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (activations,) = ctx.saved_tensors
        given = _ask(ctx.task, "backward", narrow("gradient", outer[0], ctx.dtype), generator=False)
        return widen("gradient", given.tensors, activations), None, None, None


def _ask(task: Task, what: str, tensors: StateDict, generator: bool, window: int = 1) -> Given:
    """Hand over tensors; with `generator`, torch's default generator goes along, and comes back as it is then."""
    own = {"generator": torch.get_rng_state()} if generator else {}
    given = task.hand_over({**tensors, **own}, {"what": what, **({"window": window} if window > 1 else {})})
    if generator:
        torch.set_rng_state(given.tensors["generator"].clone())
    task.numbers = given.numbers
    return given
