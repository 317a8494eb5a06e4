"""state_dict to payload and back, without pickle and without a needless copy.

Names, dtypes (bfloat16, 0-d integer counters, bool), shapes, bits and tied weights survive. Tensors that are not
contiguous or not on the CPU are copied. What cannot travel (a sparse or quantised tensor, an entry that is not a
tensor) is refused by name.
"""

import io
import mmap
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fedsplit.disk.files import Buffer, map_regular
from fedsplit.errors import CheckpointError, FedSplitError, RecordError, StateMismatchError, UsageError
from fedsplit.states.extra import separate
from fedsplit.states.header import Entry, build_header, parse_header
from fedsplit.states.local_keys import named
from fedsplit.states.ties import broken_tie, find_ties

StateDict = dict[str, torch.Tensor]
ModelSource = (
    torch.nn.Module | Mapping[str, torch.Tensor] | Callable[[], "torch.nn.Module | Mapping[str, torch.Tensor]"]
)

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64,
    "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Only a whole component of the name: a submodule may be called my_orig_mod.
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")

# torch warns of each view over bytes that cannot be written; nobody writes to these.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


def encode(state_dict: Mapping[str, torch.Tensor]) -> list[Buffer]:
    """Return the payload as buffers to be written one after the other: the header, then each tensor's memory.

    Most buffers share memory with the tensors: write them before the tensors change. Raises UsageError, naming the
    entry, for what cannot travel.
    """
    ties = find_ties(state_dict)
    tensors = {name: plain(name, tensor) for name, tensor in state_dict.items() if name not in ties}
    sizes = {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    header, order = build_header(sizes, ties)
    return [header, *(tensors[name].reshape(-1).view(torch.uint8).numpy().data for name in order)]


def decode(payload: Buffer | mmap.mmap, where: str = "payload") -> StateDict:
    """Lay tensors over a payload's bytes. Nothing is copied, so the payload must not change while they are in use.

    Raises RecordError, saying `where` it came from, if it is not safetensors or torch lacks a dtype in it.
    """
    entries = parse_header(memoryview(payload), len(payload), where)
    flat = torch.frombuffer(payload, dtype=torch.uint8)
    found: StateDict = {}
    # Tied weights are one entry under several names, and one tensor.
    laid: dict[Entry, torch.Tensor] = {}
    for name, entry in entries.items():
        if entry in laid:
            found[name] = laid[entry]
            continue
        raw = flat[entry.begin : entry.end]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise RecordError(f"{where}: entry {name!r} has dtype {entry.dtype}, which torch {torch.__version__} lacks")
        if entry.begin % dtype.itemsize:  # other writers of the format need not align
            raw = raw.clone()
        found[name] = laid[entry] = raw.view(dtype).reshape(entry.shape)
    return found


def map_file(path: Path) -> StateDict:
    """Map a payload file and lay tensors over it: writing to one never reaches the file. Raises RecordError."""
    return decode(map_regular(path), str(path))


def own_state(source: ModelSource) -> StateDict:
    """Return a module's or mapping's state_dict under the names that travel, sharing memory with it.

    Wrappers (DistributedDataParallel, DataParallel, ``torch.compile``) leave no trace in the names.
    """
    if callable(source) and not isinstance(source, torch.nn.Module):
        source = source()
    if isinstance(source, torch.nn.Module):
        source = unwrap(source).state_dict()
    return {travel_name: source[name] for name, travel_name in travel_names(source).items()}


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside the wrappers that torch puts around it."""
    while True:
        if isinstance(module, DistributedDataParallel | DataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), torch.nn.Module):
            module = inner
        else:
            return module


def travel_names(names: Iterable[str]) -> dict[str, str]:
    """Map the names of a state_dict to those that travel.

    A state_dict taken from a wrapped module has ``module.`` before every name; one with compiled submodules has
    ``_orig_mod.`` anywhere. A submodule that is itself called ``module`` keeps its name if it has a sibling. Names
    that travel are left as they are. Raises UsageError if two names would become the same.
    """
    cleaned = {name: _COMPILED.sub("", name) for name in names}
    while cleaned and all(name.startswith("module.") for name in cleaned.values()):
        cleaned = {name: clean.removeprefix("module.") for name, clean in cleaned.items()}
    if len(set(cleaned.values())) != len(cleaned):
        twice = [name for name, count in Counter(cleaned.values()).items() if count > 1]
        raise UsageError(f"without the names of wrappers, several entries of the state_dict are called {named(twice)}")
    return cleaned


def load_into(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], *, where: str = "received") -> None:
    """Copy every tensor into the model in place; if they do not fit, raises StateMismatchError and copies none.

    Weights that the model ties stay tied; different values for them do not fit.
    """
    own = own_state(model)
    ties = find_ties(own)
    difference = describe_difference(own, state_dict, expected="the model", found=where)
    difference = difference or broken_tie(ties, state_dict, expected="the model", found=where)
    if difference:
        raise StateMismatchError(difference)
    with torch.no_grad():
        for name, tensor in own.items():
            if name not in ties:
                tensor.copy_(state_dict[name])


def describe_difference(
    expected_state: Mapping[str, torch.Tensor], found_state: Mapping[str, torch.Tensor], *, expected: str, found: str
) -> str | None:
    """Say in one line how two state_dicts differ in keys, shapes or dtypes, or return None."""
    parts = []
    if missing := named(name for name in expected_state if name not in found_state):
        parts.append(f"{found} lacks {missing} of {expected}")
    if extra := named(name for name in found_state if name not in expected_state):
        parts.append(f"{found} has {extra}, which {expected} does not have")
    if parts:
        return "; ".join(parts)
    for name, tensor in expected_state.items():
        other = found_state[name]
        if tensor.shape != other.shape:
            return f"{name!r}: {expected} has shape {list(tensor.shape)}, {found} has {list(other.shape)}"
        if tensor.dtype != other.dtype:
            return f"{name!r}: {expected} has {tensor.dtype}, {found} has {other.dtype}"
    return None


def describe_state(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the dtype, as torch names it, and the shape of each entry."""
    return {name: (str(each.dtype).removeprefix("torch."), tuple(each.shape)) for name, each in state.items()}


def described_state(entries: Mapping[str, tuple[str, Sequence[int]]]) -> StateDict:
    """Return tensors without data for what `describe_state` returned; raises RecordError if there is no such tensor."""
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in NAMES}
    found = {}
    for name, (dtype, shape) in entries.items():
        try:
            found[name] = torch.empty(tuple(shape), dtype=dtypes[dtype], device="meta")
        except (KeyError, RuntimeError) as exc:  # torch has no such dtype, or nothing has such a size
            raise RecordError(f"{name!r} cannot be of dtype {dtype} and shape {list(shape)}") from exc
    return found


def plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as it travels: dense, contiguous, on the CPU; raises UsageError, naming it, if that cannot be."""
    check_travels(name, tensor)
    return tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()


def check_travels(name: str, tensor: torch.Tensor) -> None:
    """Raise UsageError, naming it, for an entry that cannot travel."""
    if not isinstance(tensor, torch.Tensor):
        raise UsageError(f"entry {name!r} of the state_dict is a {type(tensor).__name__}; only tensors can travel")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.dtype not in NAMES:
        raise UsageError(
            f"entry {name!r} of the state_dict cannot travel (layout {tensor.layout}, {tensor.dtype}, "
            f"device {tensor.device}); expected a dense tensor of a dtype that safetensors knows"
        )


def read_initial_checkpoint(path: Path) -> list[Buffer]:
    """Read a state to start from: ``.safetensors``, or a state_dict in a ``.pt`` (weights only, no pickled code).

    Raises UsageError if the file is not there, or is neither.
    """
    try:
        if path.suffix == ".safetensors":
            return encode(separate(decode(bytearray(path.read_bytes()), str(path)))[0])
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
    """Return a payload's state as the bytes of a ``.safetensors`` file, if the output ends so, or of a ``.pt`` file."""
    try:
        state, _ = separate(decode(bytearray(payload.read_bytes()), str(payload)))
    except RecordError as exc:
        raise CheckpointError(str(exc)) from exc
    if output.suffix == ".safetensors":
        return encode(state)
    buffer = io.BytesIO()
    # Copies: torch refuses views of one buffer under several dtypes.
    torch.save({name: tensor.clone() for name, tensor in state.items()}, buffer)
    return [buffer.getvalue()]
