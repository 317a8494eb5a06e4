"""state_dict to payload and back: the bits, the names, and what must not be taken for a state."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from fedsplit.disk.files import write_chunks
from fedsplit.errors import RecordError, StateMismatchError, UsageError
from fedsplit.states import state_dict
from fedsplit.states.header import parse_header
from fedsplit.states.state_dict import (
    StateDict,
    decode,
    describe_difference,
    encode,
    load_into,
    map_file,
    own_state,
    travel_names,
    unwrap,
)  # fmt: skip
from fedsplit.states.ties import find_ties

torch.set_num_threads(1)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: StateDict, expected: StateDict) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert bits(found[name]) == bits(tensor), name


def payload(state: StateDict) -> bytes:
    return b"".join(encode(state))


def states() -> dict[str, StateDict]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(6, 4, generator=generator)
    tied = torch.randn(3, 2, generator=generator)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 3.4e38])
    return {
        "float32": {"a": wide}, "bfloat16": {"a": wide.bfloat16()}, "float16": {"a": wide.half()},
        "float64": {"a": wide.double() / 3}, "0-d int64 above 2**53": {"a": torch.tensor(2**53 + 1)},
        "extreme int64": {"a": torch.tensor([2**63 - 1, -(2**63)])}, "bool": {"a": wide > 0},
        "0-d bool": {"a": torch.tensor(True)}, "uint8": {"a": torch.arange(256, dtype=torch.uint8)},
        "int8": {"a": torch.arange(-128, 128).to(torch.int8)}, "int16": {"a": torch.tensor([-(2**15)]).short()},
        "uint16": {"a": torch.tensor([65535]).to(torch.uint16)}, "int32": {"a": torch.tensor([[-(2**31)]]).int()},
        "uint32": {"a": torch.tensor([2**32 - 1]).to(torch.uint32)},
        "uint64": {"a": torch.tensor([2**62]).to(torch.uint64)},
        "float8": {"a": wide.to(torch.float8_e4m3fn), "b": wide.to(torch.float8_e5m2)},
        "float8 of AMD": {"a": wide.to(torch.float8_e4m3fnuz), "b": wide.to(torch.float8_e5m2fnuz)},
        "complex64": {"a": torch.complex(wide, -wide)}, "0-d floats": {"a": wide[0, 0], "b": wide[0, 0].bfloat16()},
        "empty": {"a": torch.empty(0), "b": torch.empty(3, 0, 2), "c": torch.empty(0, dtype=torch.int64)},
        "nothing": {}, "not a number and its kind": {"a": special, "b": special.half(), "c": special.double()},
        "transposed": {"a": wide.t()}, "strided": {"a": wide[::2, 1::2]}, "expanded": {"a": wide[:1].expand(5, 4)},
        "channels last": {"a": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last)},
        "conjugate view": {"a": torch.complex(wide, wide).conj()},
        "negative view": {"a": torch.complex(wide, wide).conj().imag},
        "tied": {"a": tied, "b": tied, "c": tied[1:]}, "a parameter": {"a": nn.Parameter(wide)},
        "odd sizes mixed": {
            "u8": torch.arange(3, dtype=torch.uint8), "f64": wide.double()[0], "b": wide[0] > 0, "h": wide.half()[0],
        },
        "names": {"": wide.clone(), "ünï.cöde": wide.clone(), 'a"b\n': wide.clone(), "x" * 300: wide.clone()},
    }  # fmt: skip


STATES = states()


@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
def test_bits_names_order_dtypes_and_shapes_survive(state, tmp_path):
    expected = {name: tensor.detach().resolve_conj().resolve_neg() for name, tensor in state.items()}
    # A further name of a tied weight comes last.
    expected = {name: expected[name] for name in sorted(expected, key=lambda name: name in find_ties(state))}
    assert_same(decode(bytearray(payload(state))), expected)
    write_chunks(tmp_path / "a.safetensors", encode(state))
    assert_same(map_file(tmp_path / "a.safetensors"), expected)


@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
def test_the_safetensors_library_reads_what_we_write(state):
    expected = {name: tensor.detach().resolve_conj().resolve_neg() for name, tensor in state.items()}
    for name in find_ties(state):
        del expected[name]
    found = safetensors.torch.load(payload(state))
    assert_same({name: found[name] for name in expected}, expected)
    assert len(found) == len(expected)


@pytest.mark.parametrize("name", [name for name in STATES if name not in ("names",)])
def test_we_read_what_the_safetensors_library_writes(name):
    state = {
        key: tensor.detach().resolve_conj().resolve_neg().clone().contiguous() for key, tensor in STATES[name].items()
    }
    found = decode(bytearray(safetensors.torch.save(state, {"format": "pt"})))
    assert_same({key: found[key] for key in state}, state)


def test_one_state_is_always_the_same_bytes():
    state = STATES["odd sizes mixed"]
    assert payload(state) == payload({name: tensor.clone() for name, tensor in state.items()})


def test_a_payload_that_is_not_aligned_is_read_all_the_same():
    text = (
        b'{"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"F64","shape":[2],"data_offsets":[1,17]}}'
    )
    numbers = torch.tensor([1.5, -2.5], dtype=torch.float64)
    content = len(text).to_bytes(8, "little") + text + b"\x07" + bits(numbers)
    assert_same(decode(bytearray(content)), {"b": torch.tensor([7], dtype=torch.uint8), "a": numbers})


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="this torch has no such dtype")
def test_scales_of_eight_bits_travel():
    """The library's header knows them, its torch functions do not."""
    state = {"a": torch.arange(256).to(torch.uint8).view(torch.float8_e8m0fnu)}
    content = payload(state)
    assert_same(decode(bytearray(content)), state)
    assert [found["dtype"] for _, found in safetensors.deserialize(content)] == ["F8_E8M0"]


def test_a_dtype_that_torch_lacks_is_refused_by_name(monkeypatch):
    content = payload({"a": torch.ones(2, dtype=torch.float8_e5m2)})
    monkeypatch.delitem(state_dict.DTYPES, "F8_E5M2")
    with pytest.raises(RecordError, match=r"server: entry 'a' has dtype F8_E5M2, which torch \S+ lacks"):
        decode(bytearray(content), "server")


def test_0_d_tensors_stay_0_d():
    """The original made arrays of them: torch.Tensor(7) has seven elements."""
    found = decode(bytearray(payload({"n": torch.tensor(7), "m": torch.tensor(1.5)})))
    assert found["n"].shape == () and found["n"].item() == 7 and found["m"].item() == 1.5


def test_reading_a_payload_copies_nothing_and_warns_nothing():
    content = bytearray(payload({"a": torch.zeros(1000)}))
    begin = parse_header(content, len(content), "x")["a"].begin
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode(content)
        content[begin : begin + 4] = b"\0\0\x80\x3f"
    assert found["a"][0].item() == 1.0


def test_writing_copies_no_contiguous_tensor():
    tensor = torch.zeros(1000)
    _, chunk = encode({"a": tensor})
    tensor.fill_(1.0)
    assert bytes(chunk) == bits(tensor)


def test_writing_to_a_mapped_tensor_does_not_reach_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_chunks(path, encode({"a": torch.zeros(3)}))
    before = path.read_bytes()
    map_file(path)["a"].fill_(7.0)
    assert path.read_bytes() == before and map_file(path)["a"].tolist() == [0, 0, 0]


def test_a_mapped_state_outlives_its_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_chunks(path, encode({"a": torch.arange(5)}))
    found = map_file(path)
    path.unlink()
    assert found["a"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (3, "is a int"), (None, "is a NoneType"), ("x", "is a str"), ([torch.zeros(1)], "is a list"),
        (torch.zeros(2).to_sparse(), "sparse_coo"), (torch.zeros(2, device="meta"), "meta"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
    ],
)  # fmt: skip
def test_what_cannot_travel_is_refused_by_name(tensor, says):
    with pytest.raises(UsageError, match=f"entry 'net.odd' of the state_dict .*{says}"):
        encode({"fine": torch.zeros(1), "net.odd": tensor})


# -- hostile files -------------------------------------------------------------------------------------------------


def file_of(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 30, -1])
def test_a_truncated_file_is_a_record_error(tmp_path, kept):
    with pytest.raises(RecordError, match=r"a\.safetensors"):
        map_file(file_of(tmp_path, payload({"a": torch.arange(9)})[:kept]))


def test_a_missing_file_a_directory_and_a_symlink_are_record_errors(tmp_path):
    path = file_of(tmp_path, payload({"a": torch.arange(9)}))
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "directory").mkdir()
    for name in ("link", "directory", "nowhere"):
        with pytest.raises(RecordError, match=f"cannot read the payload .*{name}"):
            map_file(tmp_path / name)


def test_a_pickle_is_a_record_error(tmp_path):
    with pytest.raises(RecordError, match="not a safetensors payload"):
        map_file(file_of(tmp_path, pickle.dumps({"a": [1.0] * 50})))


def test_a_shape_whose_strides_overflow_is_a_record_error():
    text = b'{"a":{"dtype":"U8","shape":[0,4611686018427387904,4611686018427387904],"data_offsets":[0,0]}}'
    with pytest.raises(RecordError, match="larger than any tensor"):
        decode(bytearray(len(text).to_bytes(8, "little") + text))


# -- names ---------------------------------------------------------------------------------------------------------


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 3)
        self.module = nn.Linear(3, 1)  # a genuine submodule of that name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(self.body(x))


class OnlyModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 1)


PLAIN = ["body.weight", "body.bias", "module.weight", "module.bias"]


def test_a_genuine_submodule_called_module_keeps_its_name():
    assert list(own_state(Inner())) == PLAIN
    assert list(own_state(Inner().state_dict())) == PLAIN


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: nn.DataParallel(model),
        lambda model: torch.compile(model),
        lambda model: torch.compile(nn.DataParallel(model)),
        lambda model: nn.DataParallel(torch.compile(model)),
    ],
    ids=["DataParallel", "compile", "compile of DataParallel", "DataParallel of compile"],
)
def test_wrappers_leave_no_trace_in_the_names_and_share_the_memory(wrap):
    model = Inner()
    wrapped = wrap(model)
    assert unwrap(wrapped) is model
    for source in (wrapped, wrapped.state_dict(), lambda: wrapped):
        found = own_state(source)
        assert list(found) == PLAIN
        assert found["body.weight"].data_ptr() == model.body.weight.data_ptr()


def test_a_compiled_submodule_leaves_no_trace_in_the_names():
    model = Inner()
    model.body = torch.compile(model.body)
    assert any("_orig_mod" in name for name in model.state_dict())
    assert list(own_state(model)) == PLAIN and list(own_state(model.state_dict())) == PLAIN
    load_into(model, own_state(Inner()))


@pytest.mark.parametrize(
    ("given", "travels"),
    [
        ("module.a", "a"), ("module._orig_mod.a", "a"), ("_orig_mod.module.a", "a"), ("module.module.a", "a"),
        ("_orig_mod._orig_mod.a", "a"), ("net._orig_mod.a", "net.a"), ("my_orig_mod.a", "my_orig_mod.a"),
        ("a._orig_mod", "a._orig_mod"), ("amodule.a", "amodule.a"), ("net.module.a", "net.module.a"),
    ],
)  # fmt: skip
def test_only_whole_components_that_wrappers_add_are_taken_off(given, travels):
    assert travel_names([given]) == {given: travels}
    assert travel_names([travels]) == {travels: travels}


def test_module_is_taken_off_only_when_all_names_have_it():
    names = ["module.a", "b"]
    assert travel_names(names) == {name: name for name in names}
    assert travel_names([]) == {}


def test_a_model_that_has_nothing_but_a_submodule_called_module_travels_and_is_loaded():
    model, other = OnlyModule(), OnlyModule()
    state = own_state(model)
    assert list(state) == list(own_state(nn.DataParallel(model).state_dict()))
    load_into(other, state)
    assert torch.equal(other.module.weight, model.module.weight)


def test_two_entries_that_would_travel_under_one_name_are_refused():
    with pytest.raises(UsageError, match=r"several entries .* are called 'net.a'"):
        travel_names(["net._orig_mod.a", "net.a", "b"])


# -- loading -------------------------------------------------------------------------------------------------------


def filled(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def test_entries_are_matched_by_name_and_not_by_position():
    """The original zipped two lists: with equal shapes the parameters changed places without a word."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    state = {
        name: torch.full_like(tensor, 1.0 if name.startswith("a") else 2.0) for name, tensor in own_state(model).items()
    }
    load_into(model, dict(reversed(state.items())))
    assert model["a"].weight.unique().tolist() == [1.0] and model["b"].weight.unique().tolist() == [2.0]


def test_loading_is_in_place_so_that_an_optimizer_goes_on_with_the_same_parameters():
    model = nn.Linear(2, 2)
    pointer, parameter = model.weight.data_ptr(), model.weight
    load_into(model, {name: torch.zeros_like(tensor) for name, tensor in own_state(model).items()})
    assert model.weight is parameter and parameter.data_ptr() == pointer and parameter.requires_grad
    assert model.weight.tolist() == [[0, 0], [0, 0]]


def test_loading_into_a_model_that_ties_its_weights_keeps_the_tie():
    model = Inner()
    model.module = model.body
    state = own_state(model)
    load_into(model, {name: torch.ones_like(tensor) for name, tensor in state.items()})
    assert model.module.weight.data_ptr() == model.body.weight.data_ptr()
    assert model.body.weight.unique().tolist() == [1.0]


def change(state: StateDict, **changes: torch.Tensor | None) -> StateDict:
    found = dict(state)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del found[name]
        else:
            found[name] = tensor
    return found


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"body__bias": None}, "server lacks 'body.bias' of the model"),
        ({"zzz": torch.ones(1)}, "server has 'zzz', which the model does not have"),
        ({"module__weight": torch.ones(3, 1)}, r"'module.weight': the model has shape \[1, 3\], server has \[3, 1\]"),
        ({"module__bias": torch.ones(1).double()}, "the model has torch.float32, server has torch.float64"),
        ({"module__bias": torch.tensor(1.0)}, r"'module.bias': the model has shape \[1\], server has \[\]"),
        ({name.replace(".", "__"): None for name in PLAIN}, "'body.weight', 'body.bias', 'module.weight' and 1 more"),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_changes_nothing_and_the_first_keys_are_named(changes, says):
    model = filled(Inner(), 5.0)
    state = change({name: torch.zeros_like(tensor) for name, tensor in own_state(model).items()}, **changes)
    with pytest.raises(StateMismatchError, match=says):
        load_into(model, state, where="server")
    assert all(parameter.unique().tolist() == [5.0] for parameter in model.parameters())


def test_two_states_that_agree_have_no_difference():
    assert describe_difference(own_state(Inner()), own_state(Inner()), expected="one", found="other") is None


def test_a_loaded_state_may_come_straight_from_a_mapped_file(tmp_path):
    source, model = Inner(), Inner()
    write_chunks(tmp_path / "a.safetensors", encode(own_state(source)))
    load_into(model, map_file(tmp_path / "a.safetensors"))
    assert_same(own_state(model), own_state(source))
