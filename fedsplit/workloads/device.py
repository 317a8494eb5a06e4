"""Where, with how many threads and in how many processes a trainer computes."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from fedsplit.errors import UsageError

if TYPE_CHECKING:
    from torch.optim import Optimizer


class Launch(NamedTuple):
    """Which of how many processes this is, counted from 0: in all, and on this machine."""

    process: int = 0
    processes: int = 1
    local_process: int = 0
    local_processes: int = 1
    restarts: int = 0

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Launch:
        """Read what torchrun puts into the environment; without it, a single process."""
        if "TORCHELASTIC_RUN_ID" not in environment:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
        return cls(*(int(environment[name]) for name in names))


def leave_compiler_out() -> None:
    """Let optimizers be made without torch's compiler, whose import takes as long as the rest of torch.

    They import it only to tell it to leave four of their methods alone, which nobody compiles here. An attribute of
    torch's own says that this was done; where another release has none, the compiler is imported as before.
    """
    import torch

    if "torch._dynamo" not in sys.modules:
        for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
            method = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
            if method is not None:
                vars(method).setdefault("__dynamo_disable", method)


def step(optimizer: Optimizer) -> None:
    """Do an optimizer's step without what torch puts around it: hooks, of which none is set, and again the compiler."""
    import torch

    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(optimizer)


def set_up_torch(device: str, threads: int | None, num_partitions: int, launch: Launch) -> str:
    """Choose the device and set the number of threads; raises UsageError if torch cannot compute there.

    The device ``auto`` is a GPU if there is one; of several processes on a machine each takes a GPU of its own. Without
    `threads` this machine's cores are shared among ``num_partitions`` trainers and their processes: with more threads
    than cores all would be slower.
    """
    import torch

    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // (num_partitions * launch.local_processes)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and launch.processes > 1:
        device = f"cuda:{launch.local_process}"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as exc:
        raise UsageError(f"--device {device} cannot be used: {str(exc).splitlines()[0]}") from exc
    return device


@contextmanager
def process_group(device: str, launch: Launch) -> Iterator[None]:
    """Be in torchrun's process group for the length of the block; without torchrun there is none.

    After an exception the group is left as it is: the others may be stuck in it, and notice the end of this process
    when its connections close.
    """
    if launch.processes == 1:
        yield
        return
    import torch
    from torch import distributed

    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    store, process, count = next(distributed.rendezvous("env://"))  # type: ignore[attr-defined]
    # The store outlives the processes: under the plain names, those that are started again may find the dead ones'
    # addresses there and fail to connect to them (seen with torch 2.14 and gloo).
    store = distributed.PrefixStore(f"restart-{launch.restarts}", store)  # type: ignore[attr-defined]
    backend = "nccl" if device.startswith("cuda") else "gloo"
    distributed.init_process_group(backend, store=store, rank=process, world_size=count)
    yield
    distributed.destroy_process_group()
