"""What a codec does to the numbers of one entry: bits and their differences, rounding, the largest few.

Every result is one or a few flat numpy arrays, which `fedsplit.codecs.packed` lays into streams by what they are. What
is decoded comes to the same bits wherever it is done: only single additions and multiplications, one after the other.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedsplit.codecs.spec import BLOCK, Codec
from fedsplit.errors import RecordError

Array = npt.NDArray[Any]
# The dtype and the shape of an entry.
Form = tuple[torch.dtype, tuple[int, ...]]
# What a stream holds: its name and the type of its numbers. Bits are those of entries that lose nothing, by width.
STREAMS: dict[str, np.dtype[Any]] = {
    "bits1": np.dtype("<u1"), "bits2": np.dtype("<u2"), "bits4": np.dtype("<u4"), "bits8": np.dtype("<u8"),
    "index": np.dtype("<u4"), "scale": np.dtype("<f4"), "int8": np.dtype("<i1"), "half": np.dtype("<u2"),
    "float": np.dtype("<f4"),
}  # fmt: skip
_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_INDEX_LIMIT = 2**32


def applicable(codec: Codec, dtype: torch.dtype, numel: int) -> Codec:
    """Return what of a codec makes an entry smaller: whole numbers, and floats no wider than its, lose nothing."""
    wide = dtype.is_floating_point and dtype.itemsize > (2 if codec.value in _HALVES else 1)
    return codec if wide and 0 < numel < _INDEX_LIMIT else codec.lossless


def layout(codec: Codec, dtype: torch.dtype, numel: int) -> Iterator[tuple[str, int]]:
    """Yield the streams that an entry has numbers in, and how many."""
    if not codec.loses:
        yield f"bits{dtype.itemsize}", numel
        return
    if codec.fraction:
        numel = _sent(codec.fraction, numel)
        yield "index", numel
    if codec.value == "int8":
        yield "scale", -(-numel // BLOCK)
    yield {None: "float", "int8": "int8"}.get(codec.value, "half"), numel


def encode(codec: Codec, tensor: torch.Tensor, base: torch.Tensor | None, carried: torch.Tensor | None) -> list[Array]:
    """Return the numbers that an entry travels as, in the order of `layout`.

    `base` is what the other side has of it, for ``delta``. `carried` is what was lost the last times: it is added.
    """
    if not codec.loses:
        return [_difference(bits(tensor), bits(base)) if codec.delta and base is not None else bits(tensor)]
    wide = torch.promote_types(tensor.dtype, torch.float32)
    target = tensor.to(wide)
    target = target - base.to(wide) if codec.delta and base is not None else target
    target = (target if carried is None else target + carried).reshape(-1)
    found: list[Array] = []
    if codec.fraction:
        kept, _ = target.abs().topk(_sent(codec.fraction, target.numel()), sorted=False).indices.sort()
        target = target[kept]
        # Each as its distance from the one before: small numbers pack well.
        found.append(np.diff(kept.numpy(), prepend=0).astype(STREAMS["index"]))
    return found + _rounded(codec, target.float())


def decode(codec: Codec, parts: list[Array], form: Form, base: torch.Tensor | None, where: str) -> torch.Tensor:
    """Return the entry that was encoded; raises RecordError, saying `where` it came from, for what cannot be."""
    dtype, shape = form
    if not codec.loses:
        found = parts[0] if base is None or not codec.delta else _sum(parts[0], bits(base))
        return torch.from_numpy(np.ascontiguousarray(found).view(np.uint8)).view(dtype).reshape(shape)
    wide = torch.promote_types(dtype, torch.float32)
    numbers = _numbers(codec, parts[1:] if codec.fraction else parts).to(wide)
    if codec.fraction:
        kept = np.cumsum(parts[0], dtype=np.int64)
        if kept.size and (kept[-1] >= math.prod(shape) or (parts[0][1:] == 0).any()):
            raise RecordError(f"{where}: a number of top-k has no place")
        sparse = torch.zeros(math.prod(shape), dtype=wide)
        sparse[torch.from_numpy(kept)] = numbers
        numbers = sparse
    numbers = numbers.reshape(shape)
    return (numbers if base is None or not codec.delta else base.to(wide) + numbers).to(dtype)


def bits(tensor: torch.Tensor) -> Array:
    """Return the bits of a plain tensor as whole numbers of its width."""
    return tensor.reshape(-1).view(torch.uint8).numpy().view(STREAMS[f"bits{tensor.dtype.itemsize}"])


def _difference(these: Array, those: Array) -> Array:
    """Return differences modulo the width, those below 0 folded in between: small ones of either sign are small."""
    one, last = these.dtype.type(1), these.dtype.type(8 * these.itemsize - 1)
    moved: Array = these - those
    found: Array = (moved << one) ^ (these.dtype.type(0) - (moved >> last))
    return found


def _sum(folded: Array, those: Array) -> Array:
    one = folded.dtype.type(1)
    found: Array = ((folded >> one) ^ (folded.dtype.type(0) - (folded & one))) + those
    return found


def _sent(fraction: float, numel: int) -> int:
    return min(numel, max(1, math.ceil(fraction * numel)))


def _rounded(codec: Codec, numbers: torch.Tensor) -> list[Array]:
    if codec.value is None:
        return [numbers.numpy()]
    if codec.value in _HALVES:
        return [numbers.to(_HALVES[codec.value]).view(torch.uint8).numpy().view(STREAMS["half"])]
    blocks = torch.nn.functional.pad(numbers, (0, -numbers.numel() % BLOCK)).reshape(-1, BLOCK)
    # The largest number of a block is at most 16 times its root mean square. As a scale that takes fewer of the 255
    # values for most numbers, which pack into 5 bits where the largest number as a scale takes 7.
    packs = codec.delta and codec.zstd
    largest = blocks.square().mean(dim=1).sqrt() * math.sqrt(BLOCK) if packs else blocks.abs().amax(dim=1)
    scales = largest / 127
    whole = (blocks / scales.where(scales > 0, torch.ones(()))[:, None]).round().clamp(-127, 127)
    return [scales.numpy(), whole.to(torch.int8).reshape(-1)[: numbers.numel()].numpy()]


def _numbers(codec: Codec, parts: list[Array]) -> torch.Tensor:
    """Return what `_rounded` was given, rounded, in float32."""
    last = torch.from_numpy(np.ascontiguousarray(parts[-1]))
    if codec.value is None:
        return last
    if codec.value in _HALVES:
        return last.view(torch.uint8).view(_HALVES[codec.value]).float()
    scales = torch.from_numpy(np.ascontiguousarray(parts[0])).repeat_interleave(BLOCK)[: last.numel()]
    return last.float() * scales
