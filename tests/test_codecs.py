"""The codecs of ``--wire`` and the payload that they make: every bit, what is lost, and what must not be unpacked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.codecs.packed import DESCRIPTION, Packed, describe, pack, unpack
from fedsplit.codecs.spec import BLOCK, Codec, codec_of, parse_codec, parse_wire
from fedsplit.errors import RecordError, UsageError
from fedsplit.states.state_dict import DTYPES, StateDict, decode, encode

torch.set_num_threads(1)

LOSSLESS = ("", "delta", "zstd", "delta+zstd")
LOSSY = (
    "int8", "bfloat16", "float16", "delta+int8", "delta+int8+zstd", "delta+bfloat16+zstd", "delta+float16",
    "delta+top-k(fraction=0.1)", "delta+top-k(fraction=0.1)+int8+zstd", "delta+top-k(fraction=0.5)+bfloat16",
)  # fmt: skip
BASE, MADE = "a" * 64, "b" * 64


def bits(state: StateDict) -> dict[str, tuple[Any, ...]]:
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in state.items()
    }


def packed(new: StateDict, base: StateDict, *wire: str, carried: StateDict | None = None) -> Packed:
    found = pack(new, parse_wire(wire), base=base, digest=BASE, carried=carried or {})
    assert found is not None
    return found


def received(payload: bytes, base: StateDict, *, extra_bytes: int = 0) -> StateDict:
    """Read a payload as its receiver does."""
    entries = decode(payload, "it")
    description = describe(entries, "it")
    assert description is not None
    return unpack(entries, description, base, extra_bytes=extra_bytes, where="it")


def sent(new: StateDict, base: StateDict, *wire: str) -> StateDict:
    return received(b"".join(encode(packed(new, base, *wire).entries())), base)


@st.composite
def entries(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of one dtype and shape with any bits: NaN with payloads, -0.0, subnormals, and few or no numbers."""
    dtype = draw(st.sampled_from(sorted(DTYPES.values(), key=str)))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize

    def tensor() -> torch.Tensor:
        content = bytearray(draw(st.binary(min_size=size, max_size=size)))
        if dtype == torch.bool:
            content = bytearray(byte & 1 for byte in content)
        flat = torch.frombuffer(content, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
        return flat.view(dtype).reshape(shape)

    return tensor(), tensor()


@given(st.lists(entries(), max_size=4), st.sampled_from(LOSSLESS))
def test_what_loses_nothing_comes_back_bit_for_bit_whatever_the_bits(
    pairs: list[tuple[torch.Tensor, torch.Tensor]], codec: str
) -> None:
    base, new = ({f"entry.{index}": pair[side] for index, pair in enumerate(pairs)} for side in (0, 1))
    assert bits(sent(new, base, *[codec] * bool(codec))) == bits(new)


@given(st.lists(entries(), max_size=4), st.sampled_from(LOSSY))
def test_a_receiver_finds_the_bits_that_the_sender_knows_of_and_only_finite_floats_lose_any(
    pairs: list[tuple[torch.Tensor, torch.Tensor]], codec: str
) -> None:
    base, new = ({f"entry.{index}": pair[side] for index, pair in enumerate(pairs)} for side in (0, 1))
    made = packed(new, base, codec)
    found = received(b"".join(encode(made.entries())), base)
    assert bits(found) == bits(made.state)
    for name, tensor in new.items():
        if name not in made.residual:
            assert bits({name: found[name]}) == bits({name: tensor})
        else:
            assert tensor.is_floating_point() and tensor.numel()
            assert found[name].isfinite().all()
            lost = tensor.to(made.residual[name].dtype) - found[name].to(made.residual[name].dtype)
            assert torch.equal(made.residual[name], lost)


def model(scale: float = 1.0, seed: int = 0) -> StateDict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "body.weight": scale * torch.randn(64, 48, generator=generator),
        "body.bias": scale * torch.randn(48, generator=generator),
        "norm.count": torch.tensor(17),
        "head.weight": scale * torch.randn(10, 64, generator=generator),
    }


def moved(base: StateDict, seed: int) -> StateDict:
    step = model(1e-3, seed)
    return {name: tensor + step[name] if tensor.is_floating_point() else tensor + 1 for name, tensor in base.items()}


@pytest.mark.parametrize("codec", LOSSY)
def test_what_is_lost_in_one_round_is_sent_in_the_next_ones(codec: str) -> None:
    names, rounds = ("body.weight", "head.weight"), 40
    base, carried, first = model(), StateDict(), {}
    total = {name: torch.zeros_like(base[name]) for name in names}
    for seed in range(1, rounds + 1):
        # Training goes on from what was received, as it does on both sides.
        goal = moved(base, seed)
        for name in names:
            total[name] += goal[name] - base[name]
        made = packed(goal, base, codec, carried=carried)
        base, carried = made.state, made.residual
        first = first or made.residual
    for name in names:
        lacking = model()[name] + total[name] - base[name]
        assert torch.allclose(lacking, carried[name], atol=2e-5), "what is lacking is what is carried over"
        if "top-k" in codec:
            assert carried[name].norm() < 0.7 * total[name].norm()
        else:
            assert carried[name].norm() < 3 * first[name].norm(), "forty rounds lack no more than one"


def test_int8_loses_at_most_half_a_step_of_its_block_and_nothing_where_all_are_equal() -> None:
    new = {"a": torch.cat([torch.linspace(-3, 3, BLOCK), torch.full((BLOCK,), 1e-3), torch.zeros(7)])}
    zero = {"a": torch.zeros_like(new["a"])}
    for codec, most in (("int8", 3 / 127 / 2), ("delta+int8+zstd", 3 / 127 * 16 / 2)):
        lost = (sent(new, zero, codec)["a"] - new["a"]).abs()
        assert 0 < lost[:BLOCK].max() <= most * 1.001
        assert lost[BLOCK : 2 * BLOCK].max() <= 1e-3 / 15
        assert not lost[2 * BLOCK :].any()
    # One number among zeros, the worst case for a scale of the root mean square, is not cut.
    spike = {"a": torch.zeros(BLOCK)}
    spike["a"][9] = 5.0
    assert torch.allclose(sent(spike, {"a": torch.zeros(BLOCK)}, "delta+int8+zstd")["a"], spike["a"], rtol=1e-5)


def test_top_k_sends_the_largest_changes() -> None:
    base = {"a": torch.zeros(1000)}
    new = {"a": torch.arange(1000.0).flip(0) * torch.tensor([1.0, -1.0]).repeat(500)}
    found = sent(new, base, "delta+top-k(fraction=0.01)")["a"]
    assert torch.equal(found[:10], new["a"][:10]) and not found[10:].any()


def test_the_first_pattern_decides_and_what_none_takes_is_as_it_is() -> None:
    base, new = model(), moved(model(), 1)
    made = packed(new, base, "body.*=delta+int8", "norm.*=zstd")
    codecs = {name: entry[0] for name, entry in made.description.entries.items()}
    assert codecs == {"body.weight": "delta+int8", "body.bias": "delta+int8", "norm.count": "zstd", "head.weight": ""}
    assert set(made.residual) == {"body.weight", "body.bias"}
    found = received(b"".join(encode(made.entries())), base)
    assert torch.equal(found["head.weight"], new["head.weight"])


def test_a_state_goes_down_with_all_that_top_k_has_changed() -> None:
    assert str(parse_codec("delta+top-k(fraction=0.1)+int8").down) == "delta+int8+zstd"
    assert str(parse_codec("delta+int8").down) == "delta+int8"


def test_extra_tensors_travel_as_they_are_unless_a_pattern_names_them() -> None:
    base, new = model(), {**moved(model(), 1), "extra:control": torch.randn(500)}
    size = 4 * 500
    for wire, codec in ((["delta+int8"], ""), (["delta+int8", "extra:*=int8"], "int8")):
        made = packed(new, base, *wire)
        assert made.description.entries["extra:control"][0] == codec
        found = received(b"".join(encode(made.entries())), base, extra_bytes=size)
        assert torch.equal(found["extra:control"], made.state["extra:control"])
        with pytest.raises(RecordError, match="'extra:control' would have 2,000 bytes"):
            received(b"".join(encode(made.entries())), base, extra_bytes=size - 1)


@pytest.mark.parametrize("codec", ["delta+zstd", "delta+int8+zstd", "delta+top-k(fraction=0.1)+bfloat16"])
def test_several_threads_pack_the_same_bytes_and_unpack_the_same_bits(codec: str) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = {"first": (700, 1000), "small": (3,), "none": (0,), "second": (450_001,), "third": (64, 1000)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    new = {name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            one = packed(new, base, codec)
            payload = b"".join(encode(one.entries()))
            found.append((payload, bits(received(payload, base)), bits(one.state), bits(one.residual)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
    assert found[0] == found[1]


def test_tied_weights_are_packed_once_and_tied_again() -> None:
    weight = torch.randn(100, 10)
    base = {"embedding": weight, "head": weight}
    new = {"embedding": (changed := weight + 1), "head": changed}
    made = packed(new, base, "delta+zstd")
    assert list(made.description.entries) == ["embedding"]
    found = received(b"".join(encode(made.entries())), base)
    assert torch.equal(found["head"], changed) and found["head"].data_ptr() == found["embedding"].data_ptr()
    # So the plain payload of what was received has the same bytes.
    assert b"".join(encode(found)) == b"".join(encode(new))


def test_a_state_with_other_entries_than_its_base_is_not_packed_so_that_its_receiver_can_say_what_is_wrong() -> None:
    base = model()
    for wrong in ({**base, "new": torch.ones(1)}, {**base, "body.bias": torch.ones(3)}, {}):
        assert pack(wrong, parse_wire(("delta+int8",)), base=base, digest=BASE, carried={}) is None


@pytest.mark.parametrize(
    "text, says",
    [
        ("gzip", "unknown codec 'gzip'"), ("delta+delta", "beside another codec of its kind"),
        ("", "expected [PATTERN"),
        ("int8+float16", "beside another codec"), ("top-k(fraction=0.1)", "write delta+top-k"),
        ("delta+top-k(fraction=1.5)", "above 0 and below 1"), ("delta+top-k(fraction=0..1)", "above 0 and below 1"),
        ("<BatchNorm*>=int8", "is no glob"), ("=int8", "is no glob"), ("extra:*=delta", "leave out delta"),
        ("body.*=", "expected [PATTERN"), ("delta+", "unknown codec ''"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_by_name(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=rf"--wire {re.escape(text)}: .*{re.escape(says)}"):
        parse_wire((text,))


def test_a_codec_is_read_from_its_own_text_and_a_bare_value_takes_the_rest() -> None:
    for text in (*LOSSLESS, *LOSSY):
        assert str(parse_codec(text)) == text
    assert parse_codec("zstd+int8+delta") == Codec(delta=True, value="int8", zstd=True)
    wire = parse_wire(("zstd", "a.*=delta+top-k(fraction=0.01)"))
    assert [pattern for pattern, _ in wire] == ["a.*", "*"]
    assert str(codec_of("a.b", wire)) == "delta+top-k(fraction=0.01)" and str(codec_of("b", wire)) == "zstd"
    assert codec_of("extra:a", wire) == Codec()
    with pytest.raises(UsageError, match="two without a pattern"):
        parse_wire(("zstd", "int8"))


# -- hostile payloads --------------------------------------------------------------------------------------------------


def forged(change: dict[str, Any] | None = None, streams: dict[str, bytes | None] | None = None) -> bytes:
    """Return a packed update with some of its description, or of its streams, replaced."""
    made = packed(moved(model(), 1), model(), "body.*=delta+top-k(fraction=0.1)", "delta+zstd").entries()
    description = json.loads(made[DESCRIPTION].numpy().tobytes()) | (change or {})
    made[DESCRIPTION] = torch.frombuffer(bytearray(json.dumps(description).encode()), dtype=torch.uint8)
    for name, content in (streams or {}).items():
        made.pop(name, None)
        if content is not None:
            made[name] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return b"".join(encode(made))


def peak_bytes() -> int:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def test_a_bomb_is_not_unpacked_and_takes_no_memory() -> None:
    compressor = zstandard.ZstdCompressor().compressobj()
    bomb = b"".join(compressor.compress(bytes(1 << 20)) for _ in range(1024)) + compressor.flush()
    assert len(bomb) < 200_000, "a gigabyte in little"
    payload = forged(streams={"bits4:zstd": bomb})
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of memory cannot be set back here")
    before = peak_bytes()
    with pytest.raises(RecordError, match="'bits4:zstd' holds more than the 2,560 bytes expected"):
        received(payload, model())
    assert peak_bytes() - before < 50_000_000


def test_what_a_frame_says_of_its_own_length_is_not_believed() -> None:
    content = np.random.default_rng(0).integers(0, 4, 640, dtype=np.uint8).tobytes()
    frame = bytearray(zstandard.ZstdCompressor().compress(content))
    # A frame header with a two-byte length: magic, descriptor, length - 256.
    assert frame[4] == 0x60 and int.from_bytes(frame[5:7], "little") == len(content) - 256
    for length in (1, 65_000):
        frame[5:7] = length.to_bytes(2, "little")
        with pytest.raises(RecordError, match=r"cannot be unpacked|holds"):
            received(forged(streams={"bits4:zstd": bytes(frame)}), model())
    with pytest.raises(RecordError, match="'bits4:zstd' holds 640 than the 2,560 bytes expected"):
        received(forged(streams={"bits4:zstd": zstandard.ZstdCompressor().compress(content)}), model())


def test_a_window_that_would_take_much_memory_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = compressor.compress(bytes(2000)) + compressor.flush()
    with pytest.raises(RecordError, match="cannot be unpacked"):
        received(forged(streams={"bits4:zstd": frame}), model())


WEIGHT, BIAS = ["delta", "F32", [64, 48]], ["delta", "F32", [48]]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"entries": {"body.bias": ["delta", "F32", [2**62]]}}, "'body.bias' has torch.float32 and shape"),
        ({"entries": {"body.bias": ["delta", "F64", [48]]}}, "'body.bias' has torch.float64"),
        ({"entries": {"unknown": BIAS}}, "the state that it starts from has none"),
        ({"entries": {"body.bias": ["gzip", "F32", [48]]}}, "not known here"),
        ({"entries": {"body.bias": ["delta", "F4", [48]]}}, "not known here"),
        ({"entries": {"norm.count": ["delta+int8", "I64", []]}}, "may not lose anything of it"),
        ({"entries": {"body.weight": WEIGHT, "body.bias": BIAS}}, "there is no stream 'bits4'"),
        ({"entries": {"extra:x": ["", "F32", [2**40, 2**20]]}}, "'extra:x' would have"),
        ({"entries": {"extra:x": ["delta", "F32", [0]]}}, "differs from what is not there"),
        ({"entries": {"body.bias": ["delta", "F32", [-1]]}}, "description of what is packed cannot be read"),
        ({"entries": {"body.bias": "delta"}}, "description of what is packed cannot be read"),
        ({"format": 2}, "description of what is packed cannot be read"),
        ({"base": "../etc"}, "description of what is packed cannot be read"),
        ({"ties": {"other": "nowhere"}}, "cannot be another name of 'nowhere'"),
        ({"ties": {"body.bias": "body.weight"}}, "'body.bias' cannot be another name"),
    ],
)  # fmt: skip
def test_a_description_that_does_not_fit_the_base_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(RecordError, match=f"it.*{re.escape(says)}"):
        received(forged(change), model())


@pytest.mark.parametrize(
    "streams, says",
    [
        ({"index": None}, "there is no stream 'index'"),
        ({"index": bytes(8)}, "the stream 'index' has 8 bytes, expected"),
        ({"bits4:zstd": b"not zstd"}, "cannot be unpacked"),
        ({"index": np.full(308 + 5, 1000, np.uint32).tobytes()}, "a number of top-k has no place"),
        ({"index": np.zeros(308 + 5, np.uint32).tobytes()}, "a number of top-k has no place"),
        ({DESCRIPTION: b"{"}, "description of what is packed cannot be read"),
        ({DESCRIPTION: b"[" * 100_000}, "description of what is packed cannot be read"),
        ({DESCRIPTION: b" " * 9_000_000}, "9,000,000 bytes"),
    ],
)  # fmt: skip
def test_streams_that_are_not_what_the_entries_need_are_refused(streams: dict[str, bytes | None], says: str) -> None:
    with pytest.raises(RecordError, match=re.escape(says)):
        received(forged(streams=streams), model())


@settings(max_examples=200)
@given(st.data())
def test_whatever_bytes_are_changed_there_is_a_record_error_or_a_state_of_the_form_of_the_base(
    data: st.DataObject,
) -> None:
    payload = bytearray(data.draw(st.sampled_from(PAYLOADS)))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        entries = decode(bytes(payload), "it")
        if (description := describe(entries, "it")) is None:
            return
        found = unpack(entries, description, model(), extra_bytes=0, where="it")
    except RecordError:
        return
    base = model()
    assert all((base[name].dtype, base[name].shape) == (tensor.dtype, tensor.shape) for name, tensor in found.items()
               if name not in description.ties)  # fmt: skip


PAYLOADS = [
    b"".join(encode(packed(moved(model(), 1), model(), codec).entries(MADE)))
    for codec in ("delta+zstd", "delta+int8+zstd", "delta+top-k(fraction=0.1)+zstd", "delta+bfloat16")
]
