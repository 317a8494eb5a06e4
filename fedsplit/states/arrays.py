"""A payload's entries as numpy arrays, for those who have no torch.

numpy has no bfloat16: such an entry is read as float32, which is the same bits and sixteen zeros. It has no float8.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.disk.files import Buffer
from fedsplit.errors import RecordError
from fedsplit.states.header import build_header, parse_header

Array = NDArray[Any]
_DTYPES = {
    "BOOL": "?", "U8": "<u1", "I8": "<i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items()}


def encode(arrays: Mapping[str, Array]) -> list[Buffer]:
    """Return the payload as buffers to be written one after the other."""
    header, order = build_header({name: (_NAMES[array.dtype], array.shape) for name, array in arrays.items()})
    return [header, *(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data for name in order)]


class Arrays(Mapping[str, Array]):
    """The entries of a payload, laid over its bytes; one with a dtype that numpy lacks raises RecordError when read.

    Raises RecordError, saying `where` it came from, if it is not safetensors.
    """

    def __init__(self, payload: Any, where: str) -> None:
        self._bytes, self._where = memoryview(payload), where
        self._entries = parse_header(self._bytes, len(self._bytes), where)

    def __getitem__(self, name: str) -> Array:
        entry = self._entries[name]
        raw = self._bytes[entry.begin : entry.end]
        if entry.dtype == "BF16":
            wide = np.frombuffer(raw, "<u2").astype("<u4")
            wide <<= 16
            return wide.view("<f4").reshape(entry.shape)
        if entry.dtype not in _DTYPES:
            raise RecordError(f"{self._where}: entry {name!r} has dtype {entry.dtype}, which numpy lacks")
        return np.frombuffer(raw, _DTYPES[entry.dtype]).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
