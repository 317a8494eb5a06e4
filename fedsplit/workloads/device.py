"""Where and with how many threads a trainer computes."""

from __future__ import annotations

import os

from fedsplit.errors import UsageError


def set_up_torch(device: str, threads: int | None, num_partitions: int) -> str:
    """Choose the device and set the number of threads.

    Parameters
    ----------
    device
        ``auto`` takes a GPU if there is one; else a name that torch knows.
    threads
        None shares this machine's cores among ``num_partitions`` trainers: more threads than cores make every one of
        them slower.

    Raises
    ------
    UsageError
        If torch cannot compute there.
    """
    import torch

    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // num_partitions))
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as exc:
        raise UsageError(f"--device {device} cannot be used: {str(exc).splitlines()[0]}") from exc
    return device
