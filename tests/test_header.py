"""The payload's header: laid out, read back, agreed on with the safetensors library, and refused when it lies."""

from __future__ import annotations

import json
import os
import pickle
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from fedsplit.errors import RecordError
from fedsplit.states.header import ITEM_BYTES, build_header, parse_header, read_header
from tests.depth import scaled


def payload(
    entries: dict[str, Any], content: bytes = b"", *, text: str | None = None, length: int | None = None
) -> bytes:
    """Return a payload with this header, however wrong."""
    header = (json.dumps(entries) if text is None else text).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + content


def entry(dtype: str = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def parse(content: bytes) -> dict[str, Any]:
    return parse_header(content, len(content), "payload")


def library_refuses(content: bytes) -> bool:
    try:
        deserialize(content)
    except SafetensorError:
        return True
    return False


def test_what_is_laid_out_is_read_back_in_the_given_order():
    sizes = {"b": ("F32", (2, 3)), "a": ("I64", ()), "c": ("U8", (5,)), "none": ("F16", (0, 7))}
    header, order = build_header(sizes)
    assert order == ["a", "b", "none", "c"] and len(header) % 8 == 0
    found = parse(header + bytes(8 + 24 + 5))
    assert list(found) == list(sizes)
    assert {name: (e.dtype, e.shape) for name, e in found.items()} == sizes
    assert {name: (e.begin - len(header), e.end - len(header)) for name, e in found.items()} == {
        "a": (0, 8), "b": (8, 32), "none": (32, 32), "c": (32, 37),
    }  # fmt: skip


def test_every_entry_begins_at_a_multiple_of_its_item_size():
    sizes = {dtype: (dtype, (3,)) for dtype in ITEM_BYTES}
    header, _ = build_header(sizes)
    total = len(header) + sum(3 * size for size in ITEM_BYTES.values())
    for found in parse(header + bytes(total - len(header))).values():
        assert found.begin % ITEM_BYTES[found.dtype] == 0


def test_an_empty_state_dict_is_a_payload():
    header, order = build_header({})
    assert parse(header) == {} and order == []
    assert deserialize(header) == []


@pytest.mark.parametrize("name", ["", "a.b", "ünïcode", 'quo"te', "new\nline", "\x00", "日本語", "x" * 10_000])
def test_any_name_survives_here_and_in_the_library(name):
    header, _ = build_header({name: ("U8", (1,))})
    assert list(parse(header + b"x")) == [name]
    assert [found for found, _ in deserialize(header + b"x")] == [name]


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_the_library_reads_every_dtype_of_ours(dtype):
    header, _ = build_header({"a": (dtype, (2, 2))})
    [(name, found)] = deserialize(header + bytes(4 * ITEM_BYTES[dtype]))
    assert (name, list(found["shape"])) == ("a", [2, 2])


def test_a_file_of_the_library_is_read_with_its_metadata_ignored():
    content = save({"a": np.zeros(2, np.float32), "b": np.array(120, np.uint8)}, {"format": "np"})
    found = parse(content)
    assert {name: (e.dtype, e.shape) for name, e in found.items()} == {"a": ("F32", (2,)), "b": ("U8", ())}
    assert content[found["b"].begin : found["b"].end] == b"x"


ONE = json.dumps({"a": entry()})
HOSTILE = {
    "nothing": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "2**60 bytes of header": payload({}, length=2**60),
    "2**64 - 1 bytes of header": payload({}, length=2**64 - 1),
    "a header longer than the payload": payload({"a": entry()}, b"1234", length=10_000),
    "a truncated header": payload({"a": entry()}, length=10),
    "a truncated body": payload({"a": entry()}, b"123"),
    "bytes after the last entry": payload({"a": entry()}, b"12345"),
    "a hole": payload({"a": entry(), "b": entry(offsets=(5, 9))}, bytes(9)),
    "a hole at the start": payload({"a": entry(offsets=(1, 5))}, bytes(5)),
    "an overlap": payload({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6)),
    "the same bytes twice": payload({"a": entry(), "b": entry()}, bytes(4)),
    "an end before its begin": payload({"a": entry(offsets=(4, 0))}, bytes(4)),
    "an end beyond the payload": payload({"a": entry(shape=(2**40,), offsets=(0, 2**40))}, bytes(4)),
    "a negative offset": payload({"a": entry(offsets=(-4, 0))}, bytes(4)),
    "a fractional offset": payload({"a": entry(offsets=(0.0, 4.0))}, bytes(4)),
    "three offsets": payload({"a": entry(offsets=(0, 4, 4))}, bytes(4)),
    "offsets that are text": payload({}, bytes(4), text='{"a": {"dtype": "U8", "shape": [4], "data_offsets": "04"}}'),
    "a negative size": payload({"a": entry(shape=(-4,))}, bytes(4)),
    "two negative sizes": payload({"a": entry(shape=(-2, -2))}, bytes(4)),
    "a size that is true": payload({"a": entry(shape=(True, 4))}, bytes(4)),
    "a size over 64 bits": payload({"a": entry(shape=(2**64 + 4,))}, bytes(4)),
    "a product that overflows to the right length": payload({"a": entry(shape=(2**62, 4, 4))}, b""),
    "a product of 2**64": payload({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}),
    "a size that is a number of 5000 digits": payload({}, text=ONE.replace("[4]", f"[{'9' * 5000}]")),
    "a shape that is no list": payload({}, b"x", text='{"a": {"dtype": "U8", "shape": {}, "data_offsets": [0, 1]}}'),
    "a shape that is empty text": payload({}, b"x", text='{"a": {"dtype": "U8", "shape": "", "data_offsets": [0, 1]}}'),
    "a length that does not fit the shape": payload({"a": entry(shape=(3,))}, bytes(4)),
    "an unknown dtype": payload({"a": entry(dtype="F99")}, bytes(4)),
    "a dtype in lower case": payload({"a": entry(dtype="u8")}, bytes(4)),
    "a dtype that is a list": payload({}, bytes(4), text='{"a": {"dtype": [], "shape": [4], "data_offsets": [0, 4]}}'),
    "an entry without a shape": payload({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, bytes(4)),
    "an entry that is null": payload({"a": None}),
    "an entry that is a list": payload({"a": []}),
    "a list": payload({}, text="[]"),
    "a number": payload({}, text="7"),
    "two entries of one name": payload({}, bytes(4), text=ONE[:-1] + ", " + ONE[1:]),
    "two dtypes of one entry": payload({}, bytes(4), text=ONE.replace('"dtype"', '"dtype": "F32", "dtype"')),
    "a deep nest": payload({}, text="[" * 200_000),
    "a deep nest in the metadata": payload({}, text='{"__metadata__": ' + '{"a":' * 100_000 + "1" + "}" * 100_001),
    "text in UTF-16": (20).to_bytes(8, "little") + "{}        ".encode("utf-16-le"),
    "text with a byte order mark": (5).to_bytes(8, "little") + b"\xef\xbb\xbf{}",
    "text that is not UTF-8": (4).to_bytes(8, "little") + b'{"\xff}',
    "half a surrogate pair": payload({}, bytes(4), text=json.dumps({"\ud800": entry()})),
    "a pickle": pickle.dumps({"weight": list(range(100))}),
}  # fmt: skip
# What that library accepts: of two entries of one name it silently drops one.
ONLY_OURS = {"two entries of one name"}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_header_is_a_record_error_that_names_the_payload(content):
    with pytest.raises(RecordError, match=r"^payload: ") as caught:
        parse(content)
    assert len(str(caught.value)) < 7_000


@pytest.mark.parametrize("name", sorted(HOSTILE.keys() - ONLY_OURS))
def test_the_library_refuses_it_too(name):
    assert library_refuses(HOSTILE[name])


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "F99", "", "u8"])
def test_a_dtype_that_is_not_supported_is_named(dtype):
    content = payload({"a": entry(dtype=dtype, shape=(8,), offsets=(0, 6))}, bytes(6))
    with pytest.raises(RecordError, match=f"dtype '{dtype}' is not supported, only BOOL, U8"):
        parse(content)


def test_a_repeated_key_is_named():
    with pytest.raises(RecordError, match="the key 'a' appears twice"):
        parse(HOSTILE["two entries of one name"])


OURS_ALONE = r"is not supported|at most 64 dimensions|is larger than any tensor|from 0 to 2\*\*63|appears twice"
PIECES = [
    b'"U8"',
    b'"F32"',
    b'"F4"',
    b'"__metadata__"',
    b"{}",
    b"[]",
    b"[0]",
    b"0",
    b"1",
    b"-1",
    b"4",
    b"8",
    b"null",
    b" ",
]


@settings(deadline=None, max_examples=scaled(300, 3000))
@given(
    entries=st.dictionaries(
        st.sampled_from(["a", "b", "ü", ""]),
        st.builds(
            entry,
            dtype=st.sampled_from(["U8", "BOOL", "F16", "F32", "F4", "F8_E8M0", "U128"]),
            shape=st.lists(st.sampled_from([0, 1, 2, 4, 2**33, 2**63]), max_size=3),
            offsets=st.tuples(st.integers(0, 8), st.integers(0, 16)),
        ),
        max_size=3,
    ),
    size=st.integers(0, 16),
    cut=st.tuples(st.integers(0, 200), st.integers(0, 4), st.sampled_from([b"", *PIECES])),
    is_cut=st.booleans(),
)
def test_any_header_has_the_same_verdict_here_and_in_the_library(entries, size, cut, is_cut):
    text = json.dumps(entries).encode()
    if is_cut:
        position, length, piece = cut[0] % (len(text) + 1), cut[1], cut[2]
        text = text[:position] + piece + text[position + length :]
    content = len(text).to_bytes(8, "little") + text + bytes(size)
    try:
        found = parse(content)
    except RecordError as exc:
        assert library_refuses(content) or re.search(OURS_ALONE, str(exc)), text
        return
    if b"__metadata__" not in text:  # which is not read here
        theirs = {name: (value["dtype"], tuple(value["shape"])) for name, value in deserialize(content)}
        assert {name: (value.dtype, value.shape) for name, value in found.items()} == theirs


def test_sizes_that_overflow_are_refused_also_beside_a_zero():
    content = payload({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))})
    with pytest.raises(RecordError, match="larger than any tensor"):
        parse(content)


def test_a_shape_of_thousands_of_sizes_is_refused_before_they_are_multiplied():
    content = payload({"a": entry(shape=[2**62] * 100_000, offsets=(0, 0))})
    with pytest.raises(RecordError, match="at most 64 dimensions"):
        parse(content)


def test_a_header_that_claims_much_allocates_little(tmp_path):
    path = tmp_path / "payload.safetensors"
    with path.open("wb") as file:
        file.write((2**60).to_bytes(8, "little"))
        file.truncate(1 << 40)  # sparse
    tracemalloc.start()
    try:
        with pytest.raises(RecordError, match=f"the header claims {2**60} bytes"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_start_that_is_shorter_than_its_header_is_refused():
    content = payload({"a": entry()}, b"1234")
    with pytest.raises(RecordError, match=r"should have \d+ bytes, found 12"):
        parse_header(content[:20], len(content), "payload")
    assert parse_header(content[:-4], len(content), "payload").keys() == {"a"}


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "payload.safetensors"
    path.write_bytes(payload({"a": entry()}, b"1234"))
    return path


def test_a_file_is_read_as_far_as_its_header(path):
    assert read_header(path)["a"].shape == (4,)
    assert read_header(path, path.stat().st_size)["a"].dtype == "U8"


def test_a_file_of_another_length_than_its_record_says_is_refused(path):
    size = path.stat().st_size
    with pytest.raises(RecordError, match=f"has {size} bytes, its record says {size + 1}"):
        read_header(path, size + 1)


def test_a_missing_file_is_a_record_error(tmp_path):
    with pytest.raises(RecordError, match=r"cannot read the payload .*: No such file"):
        read_header(tmp_path / "nowhere")


def test_a_symlink_is_refused_also_to_a_good_payload(path):
    link = path.with_name("link")
    link.symlink_to(path)
    with pytest.raises(RecordError, match="symbolic link"):
        read_header(link)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecordError, match="not a regular file"):
        read_header(tmp_path / "pipe")


def test_a_pickle_named_safetensors_is_refused_and_not_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(RecordError, match="not a safetensors payload"):
        read_header(path)
    assert not (tmp_path / "exploded").exists()
