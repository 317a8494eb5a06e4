"""The header of a safetensors payload, read and written without torch.

A payload is 8 bytes of header length (little endian), a JSON header, and the tensors' bytes. The client checks the
header of what it relays and never looks at a tensor; the trainer and the server lay views of tensors over the bytes.
The format: https://github.com/huggingface/safetensors#format.

As in the safetensors library, entries must not overlap, leave holes or reach past the end, their lengths must fit their
shapes, and the header has at most 100 MB. Refused here and accepted there: two entries of one name, of which the
library drops one; dtypes of less than a byte (F4, F6_E2M3, F6_E3M2); more than 64 dimensions; beside a size of 0, a
size of 2**63 and more, and sizes whose product overflows.

Tied weights are written once. The metadata maps each further name to the one that was written, as that library's
`save_model` does, and a reader finds both. Metadata that says anything else is not read.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedsplit.disk.files import open_regular
from fedsplit.errors import RecordError

MAX_HEADER_BYTES = 100_000_000
# How the names of extra tensors begin: `fedsplit.states.extra`.
PREFIX = "extra:"
_MAX_DIMENSIONS = 64
_LIMIT = 2**63
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor: dtype by its safetensors name, shape, and its bytes ``[begin, end)`` from the payload's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def build_header(
    sizes: Mapping[str, tuple[str, tuple[int, ...]]], ties: Mapping[str, str] = MappingProxyType({})
) -> tuple[bytes, list[str]]:
    """Lay out a payload of names with their safetensors dtypes and shapes, in the order that a reader is to see.

    `ties` maps each further name of an entry to its name in `sizes`. Returns the header (the length field and the JSON,
    padded to 8 bytes), and the names in the order of their bytes: wide dtypes first, so that each tensor is aligned.
    """
    order = sorted(sizes, key=lambda name: -ITEM_BYTES[sizes[name][0]])
    record: dict[str, Any] = {"__metadata__": dict(ties)} if ties else {}
    record |= {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in sizes.items()}
    position = 0
    for name in order:
        dtype, shape = sizes[name]
        end = position + ITEM_BYTES[dtype] * math.prod(shape)
        record[name]["data_offsets"] = [position, end]
        position = end
    text = json.dumps(record, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def parse_header(start: bytes | memoryview, payload_bytes: int, where: str) -> Mapping[str, Entry]:
    """Read the entries of a payload of `payload_bytes` bytes from its start, which has at least the whole header.

    Raises RecordError, which says `where` it came from, if this is not a whole safetensors payload.
    """
    data_begin = 8 + header_bytes(start[:8], payload_bytes, where)
    if len(start) < data_begin:
        raise RecordError(f"{where}: the header should have {data_begin - 8} bytes, found {len(start) - 8}")
    try:
        return _entries(bytes(start[8:data_begin]), payload_bytes)
    except RecordError as exc:
        raise RecordError(f"{where}: {exc}") from exc.__cause__


# All states of a run have the same header, and each is read half a dozen times a round.
@lru_cache(maxsize=4)
def _entries(header: bytes, payload_bytes: int) -> Mapping[str, Entry]:
    data_begin = 8 + len(header)
    try:
        # Decoded here: given bytes, json would also take UTF-16 and lone surrogates.
        record = json.loads(header.decode(), object_pairs_hook=_without_duplicates)
        metadata = record.pop("__metadata__", {})
        found = {name: _entry(fields, data_begin) for name, fields in record.items()}
        ties = _ties(metadata, found)
        "".join([*found, *ties]).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise RecordError(f"not a safetensors header ({type(exc).__name__}: {exc})") from exc
    position = data_begin
    for name, entry in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise RecordError(f"entry {name!r} begins at byte {entry.begin}, expected {position}")
        position = entry.end
    if position != payload_bytes:
        raise RecordError(f"the entries end at byte {position}, the payload has {payload_bytes}")
    return MappingProxyType(found | ties)


def header_bytes(length_field: bytes | memoryview, payload_bytes: int, where: str) -> int:
    """Return the length of the JSON header, checked against the payload's length before anything is allocated."""
    if len(length_field) < 8:
        raise RecordError(f"{where}: a safetensors payload has at least 8 bytes, found {payload_bytes}")
    length = int.from_bytes(length_field[:8], "little")
    if length > min(MAX_HEADER_BYTES, payload_bytes - 8):
        raise RecordError(
            f"{where}: not a safetensors payload (the header claims {length} bytes, the payload has {payload_bytes})"
        )
    return length


def read_header(path: Path, expected_bytes: int | None = None) -> Mapping[str, Entry]:
    """Read the entries of a payload file.

    Raises RecordError if it is missing, no regular file, of another length than expected, or not safetensors.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if expected_bytes is not None and size != expected_bytes:
                raise RecordError(f"{path} has {size} bytes, its record says {expected_bytes}")
            start = file.read(8)
            start += file.read(header_bytes(start, size, str(path)))
    except OSError as exc:
        raise RecordError(f"cannot read the payload {path}: {exc.strerror or exc}") from exc
    return parse_header(start, size, str(path))


def _entry(fields: Any, data_begin: int) -> Entry:
    dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    if dtype not in ITEM_BYTES:
        raise ValueError(f"dtype {dtype!r} is not supported, only {', '.join(ITEM_BYTES)}")
    if type(shape) is not list or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"expected a shape with at most {_MAX_DIMENSIONS} dimensions")
    if not all(type(number) is int and 0 <= number < _LIMIT for number in [*shape, begin, end]):
        raise ValueError("expected shapes and offsets of whole numbers from 0 to 2**63 - 1")
    # Zeros are left out, as a tensor's strides overflow all the same.
    if math.prod(size or 1 for size in shape) >= _LIMIT:
        raise ValueError(f"shape {shape} is larger than any tensor")
    if end - begin != ITEM_BYTES[dtype] * math.prod(shape):
        raise ValueError(f"{end - begin} bytes do not hold shape {shape} of {dtype}")
    return Entry(dtype=dtype, shape=tuple(shape), begin=data_begin + begin, end=data_begin + end)


def _ties(metadata: Any, found: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the further names of entries. ``format`` is what other writers call the framework."""
    if not isinstance(metadata, dict):
        return {}
    return {
        name: found[kept]
        for name, kept in metadata.items()
        if isinstance(kept, str) and kept in found and name not in found and name != "format"
    }


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Two readers could take different ones of them.
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} appears twice")
        found[key] = value
    return found
