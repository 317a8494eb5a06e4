"""The cut, as a rank's script sees it: activations go out, and their gradient comes back with ``backward()``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fedsplit.exchange.records import Scalar
from fedsplit.states.state_dict import StateDict

if TYPE_CHECKING:
    from fedsplit.trainer.trainer import Task


class Given(NamedTuple):
    """What the other half of the model gave: tensors over a mapped file, and numbers."""

    tensors: StateDict
    numbers: Mapping[str, Scalar]


def remote(
    task: Task, activations: torch.Tensor, targets: torch.Tensor | None = None, *, generator: bool = False
) -> torch.Tensor:
    """Return the loss, or without `targets` the output, of the half that lies beyond; see `Task.remote`."""
    # Without a gradient of its own, as where every weight below is frozen, the half beyond must train all the same.
    needs_gradient = torch.is_grad_enabled() and not activations.requires_grad
    activations = activations.detach().requires_grad_() if needs_gradient else activations
    if targets is None:
        output: torch.Tensor = _Output.apply(activations, task, generator)  # type: ignore[no-untyped-call]
        return output
    given = _ask(task, "loss", {"activations": activations, "targets": targets}, generator)
    loss: torch.Tensor = torch.tensor(given.numbers["loss"], dtype=torch.float32, device=activations.device)
    if torch.is_grad_enabled():
        loss = _Loss.apply(activations, given.tensors["gradient"].to(loss.device), loss)  # type: ignore[no-untyped-call]
    return loss


class _Loss(torch.autograd.Function):
    """A loss whose gradient with respect to the activations is there already."""

    @staticmethod
    def forward(ctx: Any, activations: torch.Tensor, gradient: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None


class _Output(torch.autograd.Function):
    """The output of the half beyond; its gradient is sent there, and that of the activations comes back."""

    @staticmethod
    def forward(ctx: Any, activations: torch.Tensor, task: Task, generator: bool) -> torch.Tensor:
        ctx.task, ctx.device = task, activations.device
        given = _ask(task, "forward", {"activations": activations}, generator)
        return given.tensors["output"].to(ctx.device)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        given = _ask(ctx.task, "backward", {"gradient": outer[0]}, generator=False)
        return given.tensors["gradient"].to(ctx.device), None, None


def _ask(task: Task, what: str, tensors: StateDict, generator: bool) -> Given:
    """Hand over tensors; with `generator`, torch's default generator goes along, and comes back as it is then."""
    own = {"generator": torch.get_rng_state()} if generator else {}
    given = task.hand_over({**tensors, **own}, {"what": what})
    if generator:
        torch.set_rng_state(given.tensors["generator"].clone())
    task.numbers = given.numbers
    return given
