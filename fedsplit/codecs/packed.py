"""A state as fewer bytes, and back: one safetensors payload again, so that nothing on its way has to know.

Its entries are streams of bytes: the numbers of all entries that are of one kind, one entry after the other, with
``:zstd`` behind the name where they are packed. `DESCRIPTION` is JSON: what each entry is, how it was encoded, and the
digests of the state that it differs from and of the state that it makes. docs/protocol.md has the format.

Who reads one compares every dtype and shape with the state that is there already, and so knows how long each stream
must be before anything is unpacked: no lie about a length, and no small stream of a huge content, takes more memory.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from msgspec import Meta, ValidationError, convert
from msgspec.json import Decoder

from fedsplit.aggregation.numeric import side_by_side, surely_finite
from fedsplit.codecs import numbers
from fedsplit.codecs.numbers import STREAMS, Array, Form
from fedsplit.codecs.spec import Codec, codec_of, parse_codec
from fedsplit.errors import MissingPackageError, RecordError, UsageError
from fedsplit.states.header import PREFIX
from fedsplit.states.state_dict import DTYPES, NAMES, StateDict, describe_difference, plain
from fedsplit.states.ties import find_ties

DESCRIPTION = "fedsplit:packed"
_ZSTD = ":zstd"
_LEVEL = 1
# No reader has to hold more of what came before than this.
_WINDOW_BYTES = 1 << 23
# Of more than a hundred thousand entries.
_DESCRIPTION_BYTES = 8_000_000
_Digest = Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")]
_Entry = tuple[str, str, Annotated[tuple[Annotated[int, Meta(ge=0, le=2**63 - 1)], ...], Meta(max_length=64)]]


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a packed payload says of itself."""

    format: Literal[1] = 1
    # SHA-256 of the payloads of two plain states: what this differs from, and what it makes; empty in an update.
    base: _Digest
    state: _Digest = ""
    # The codec, the dtype as safetensors names it, and the shape of each entry; and ties as in a header.
    entries: Mapping[str, _Entry]
    ties: Mapping[str, str]


# Once, before there are threads, as in `fedsplit.exchange.records.read`.
Decoder(Description)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A state that was packed."""

    description: Description
    streams: StateDict
    # What a reader finds, and what it lacks: the second is carried over to the next time.
    state: StateDict
    residual: StateDict

    def entries(self, state: str = "") -> StateDict:
        """Return what travels; `state` is the digest of what it makes."""
        text = json.dumps(vars(replace(self.description, state=state)), separators=(",", ":")).encode()
        return {DESCRIPTION: torch.frombuffer(bytearray(text), dtype=torch.uint8), **self.streams}


def pack(
    state: Mapping[str, torch.Tensor], wire: Sequence[tuple[str, Codec]], *, base: StateDict, digest: str,
    carried: StateDict,
) -> Packed | None:  # fmt: skip
    """Pack a state that differs from `base`, the state with a digest; `carried` is the residual of the time before.

    Returns None for what has other entries than the base: then it is for whoever receives it to say so.
    """
    ties = find_ties(state)
    own = {name: plain(name, tensor) for name, tensor in state.items() if name not in ties}
    if describe_difference(base, {n: t for n, t in state.items() if not n.startswith(PREFIX)}, expected="", found=""):
        return None
    streams: defaultdict[str, list[Array]] = defaultdict(list)
    found, residual, entries = StateDict(), StateDict(), {}
    jobs = [(codec_of(name, wire), tensor, base.get(name), carried.get(name)) for name, tensor in own.items()]
    done = side_by_side(_encode, jobs, sum(tensor.numel() for tensor in own.values()))
    for (name, tensor), (codec, parts, found[name], lacks) in zip(own.items(), done, strict=True):
        if lacks is not None:
            residual[name] = lacks
        entries[name] = (str(codec), NAMES[tensor.dtype], tuple(tensor.shape))
        for (stream, _), part in zip(numbers.layout(codec, tensor.dtype, tensor.numel()), parts, strict=True):
            streams[stream + _ZSTD * codec.zstd].append(part)
    found |= {name: found[kept] for name, kept in ties.items()}
    description = Description(base=digest, entries=entries, ties=ties)
    return Packed(description=description, streams=_joined(streams), state=found, residual=residual)


def in_parts(state: Mapping[str, torch.Tensor], part_bytes: float) -> list[StateDict]:
    """Divide a state into parts of about so many bytes, in its order; tied entries are in the same part."""
    ties, parts, room = find_ties(state), [StateDict()], part_bytes
    for name, tensor in state.items():
        if name in ties:
            continue
        if room <= 0:
            parts.append(StateDict())
            room = part_bytes
        parts[-1][name] = tensor
        room -= tensor.nbytes
    for name, kept in ties.items():
        next(part for part in parts if kept in part)[name] = state[name]
    return parts


def describe(payload: Mapping[str, torch.Tensor], where: str) -> Description | None:
    """Return what a payload says of itself if it is packed; raises RecordError if that cannot be read."""
    if DESCRIPTION not in payload:
        return None
    try:
        if payload[DESCRIPTION].nbytes > _DESCRIPTION_BYTES:
            raise ValueError(f"it has {payload[DESCRIPTION].nbytes:,} bytes")
        text = bytes(payload[DESCRIPTION].reshape(-1).view(torch.uint8).numpy()).decode()
        return convert(json.loads(text), Description)
    except (ValueError, RecursionError, ValidationError) as exc:
        raise RecordError(f"{where}: the description of what is packed cannot be read ({exc})") from exc


def unpack(
    payload: Mapping[str, torch.Tensor], description: Description, base: StateDict, *, extra_bytes: int, where: str
) -> StateDict:
    """Return the state that was packed; raises RecordError for anything that does not fit the base.

    Extra tensors, which have no base, may come to so many bytes.
    """
    wanted: defaultdict[str, int] = defaultdict(int)
    plans = []
    for name, (text, dtype_name, shape) in description.entries.items():
        try:
            codec, form = parse_codec(text), (DTYPES[dtype_name], shape)
        except (UsageError, KeyError) as exc:
            raise RecordError(f"{where}: entry {name!r} has {text!r} or {dtype_name!r}, not known here") from exc
        extra_bytes -= _check(name, codec, form, base.get(name), extra_bytes, where)
        parts = [(stream + _ZSTD * codec.zstd, n) for stream, n in numbers.layout(codec, form[0], math.prod(shape))]
        for stream, count in parts:
            wanted[stream] += count
        plans.append((name, codec, form, parts))
    streams = {stream: _stream(payload, stream, count, where) for stream, count in wanted.items()}
    at: defaultdict[str, int] = defaultdict(int)
    jobs = []
    for name, codec, form, parts in plans:
        rows = []
        for stream, count in parts:
            rows.append((STREAMS[stream.removesuffix(_ZSTD)], streams[stream][at[stream] : at[stream] + count]))
            at[stream] += count
        jobs.append((codec, rows, form, base.get(name), f"{where}: {name!r}"))
    done = side_by_side(_decode, jobs, sum(math.prod(form[1]) for _, _, form, _ in plans))
    found = StateDict(zip(description.entries, done, strict=True))
    for name, kept in description.ties.items():
        if name in found or kept not in found:
            raise RecordError(f"{where}: {name!r} cannot be another name of {kept!r}")
        found[name] = found[kept]
    return found


def _encode(
    job: tuple[Codec, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
) -> tuple[Codec, list[Array], torch.Tensor, torch.Tensor | None]:
    """Return how an entry travels, as what, what its reader finds, and what that lacks; None of what loses nothing."""
    wanted, tensor, base, carried = job
    codec = numbers.applicable(wanted, tensor.dtype, tensor.numel())
    parts = numbers.encode(codec, tensor, base, carried)
    if not codec.loses:
        return codec, parts, tensor, None
    found = numbers.decode(codec, parts, (tensor.dtype, tuple(tensor.shape)), base, "packed")
    if not (surely_finite(found) or found.isfinite().all()):
        # Of NaN, infinity and what is beyond a narrow type nothing may be lost, least of all the other side's refusal.
        return _encode((codec.lossless, tensor, base, None))
    wide = torch.promote_types(tensor.dtype, torch.float32)
    lost = tensor.to(wide) - found.to(wide)
    return codec, parts, found, lost if carried is None else lost + carried


def _decode(job: tuple[Codec, list[tuple[np.dtype[Any], Array]], Form, torch.Tensor | None, str]) -> torch.Tensor:
    codec, rows, form, base, where = job
    parts = [np.ascontiguousarray(found).reshape(-1).view(dtype) for dtype, found in rows]
    return numbers.decode(codec, parts, form, base, where)


def _check(name: str, codec: Codec, form: Form, base: torch.Tensor | None, left: int, where: str) -> int:
    """Raise RecordError unless an entry is as the base has it; returns the bytes of an extra tensor, which has none."""
    dtype, shape = form
    if numbers.applicable(codec, dtype, math.prod(shape)) != codec:
        raise RecordError(f"{where}: {name!r} has {dtype}: {codec} may not lose anything of it")
    if name.startswith(PREFIX):
        size = math.prod(shape) * dtype.itemsize
        if size > left or codec.delta:
            raise RecordError(f"{where}: {name!r} would have {size:,} bytes, or differs from what is not there")
        return size
    if base is None or (base.dtype, tuple(base.shape)) != (dtype, shape):
        mine = "none" if base is None else f"{base.dtype} of shape {tuple(base.shape)}"
        raise RecordError(f"{where}: {name!r} has {dtype} and shape {shape}, the state that it starts from has {mine}")
    return 0


def _joined(streams: Mapping[str, list[Array]]) -> StateDict:
    """Return each stream's bytes; one that zstd does not make smaller is as long as ever, and seen to be by that."""
    found = StateDict()
    for stream, parts in streams.items():
        content: Any = b""
        size = sum(part.nbytes for part in parts)
        if stream.endswith(_ZSTD) and size:
            content = _zstandard().ZstdCompressor(level=_LEVEL).compress(_grouped(parts))
        if not 0 < len(content) < size:
            content = np.concatenate(parts).view(np.uint8)
        found[stream] = torch.from_numpy(np.array(np.frombuffer(content, np.uint8)))
    return found


def _grouped(parts: Sequence[Array]) -> Array:
    """Return the first bytes of all numbers, then all second bytes: those that are alike stand together."""
    found = np.empty((parts[0].itemsize, sum(part.size for part in parts)), np.uint8)
    at = 0
    for part in parts:
        found[:, at : at + part.size] = part.view(np.uint8).reshape(-1, part.itemsize).T
        at += part.size
    return found


def _stream(payload: Mapping[str, torch.Tensor], stream: str, count: int, where: str) -> Array:
    """Return the numbers of a stream as rows of bytes; raises RecordError unless they are so many."""
    dtype = STREAMS[stream.removesuffix(_ZSTD)]
    size = count * dtype.itemsize
    if stream not in payload or payload[stream].dtype != torch.uint8:
        raise RecordError(f"{where}: there is no stream {stream!r}")
    content: Array = payload[stream].reshape(-1).numpy()
    if len(content) != size:
        if not stream.endswith(_ZSTD):
            raise RecordError(f"{where}: the stream {stream!r} has {len(content):,} bytes, expected {size:,}")
        return _unpacked(content, size, f"{where}: the stream {stream!r}").reshape(dtype.itemsize, -1).T
    # numpy reads numbers at any address, torch does not.
    return (content if content.ctypes.data % 8 == 0 else content.copy()).reshape(-1, dtype.itemsize)


def _unpacked(content: Array, size: int, where: str) -> Array:
    """Unpack into exactly so many bytes, whatever the content says of its own length."""
    zstandard = _zstandard()
    found, have = np.empty(size, np.uint8), 0
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).stream_reader(content)
        while have < size and (more := reader.readinto(found[have:])):
            have += more
        is_longer = bool(reader.read(1))
    except zstandard.ZstdError as exc:
        raise RecordError(f"{where} cannot be unpacked ({exc})") from exc
    if have != size or is_longer:
        raise RecordError(f"{where} holds {'more' if is_longer else f'{have:,}'} than the {size:,} bytes expected")
    return found


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as exc:
        raise MissingPackageError("--wire zstd", "zstandard", "wire") from exc
    return zstandard
