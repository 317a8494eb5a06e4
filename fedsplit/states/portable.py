"""States as files that others read and write: ``.safetensors`` and ``.pt``."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch

from fedsplit.disk.files import Buffer
from fedsplit.errors import CheckpointError, FedSplitError, RecordError, UsageError
from fedsplit.states.state_dict import decode, encode


def read_initial_checkpoint(path: Path) -> list[Buffer]:
    """Read a state to start from: ``.safetensors``, or a state_dict in a ``.pt`` (weights only, no pickled code).

    Raises
    ------
    UsageError
        If the file is not there, or is neither.
    """
    try:
        if path.suffix == ".safetensors":
            return encode(decode(bytearray(path.read_bytes()), str(path)))
        state = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as exc:
        raise UsageError(f"--initial-checkpoint {path} does not exist") from exc
    except FedSplitError as exc:
        raise UsageError(f"--initial-checkpoint: {exc}") from exc
    except Exception as exc:  # torch raises a dozen types for what is not a checkpoint
        raise UsageError(
            f"--initial-checkpoint {path} holds no plain state_dict ({type(exc).__name__}: {str(exc).splitlines()[0]});"
            " save model.state_dict() with torch.save, or as .safetensors"
        ) from exc
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        kind = type(state).__name__
        raise UsageError(f"--initial-checkpoint {path} holds a {kind}, expected a state_dict of tensors")
    return encode(state)


def export_state(payload: Path, output: Path) -> list[Buffer]:
    """Return a state as the bytes of a ``.safetensors`` or ``.pt`` file, by the output's ending."""
    if output.suffix == ".safetensors":
        return [payload.read_bytes()]
    if output.suffix != ".pt":
        raise UsageError(f"--output {output}: expected a name ending in .safetensors or .pt")
    try:
        state = decode(bytearray(payload.read_bytes()), str(payload))
    except RecordError as exc:
        raise CheckpointError(str(exc)) from exc
    buffer = io.BytesIO()
    # Copies: torch refuses views of one buffer under several dtypes.
    torch.save({name: tensor.clone() for name, tensor in state.items()}, buffer)
    return [buffer.getvalue()]
