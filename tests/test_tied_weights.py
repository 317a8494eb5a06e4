"""Tied weights, as of a language model's embedding and head: one entry for the rules, one copy wherever they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from fedsplit import EvaluateResult, TrainResult, Update, WorkloadContext
from fedsplit.aggregation import Split, parse_rules
from fedsplit.aggregation.validation import check_update
from fedsplit.errors import StateMismatchError, UsageError
from fedsplit.states.state_dict import StateDict, decode, encode, load_into, map_file, own_state
from fedsplit.states.ties import check_shared, find_ties
from tests.programs import programs
from tests.test_five_programs import link_tests

BOTH = "'wte.weight' and 'lm_head.weight'"


class Language(nn.Module):
    """The ends of a language model: what reads tokens and what writes them is one matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.wte = nn.Embedding(7, 4)
        self.block = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.wte.weight


class Growing:
    """Training that one can follow by hand: everything grows by the rank."""

    def __init__(self, context: WorkloadContext) -> None:
        self.model = Language()
        self._rank = context.rank

    def train(self, task: Any) -> TrainResult:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += self._rank
        return TrainResult(1)

    def evaluate(self, task: Any) -> EvaluateResult:
        return EvaluateResult(0.0, 1, {"tied": self.model.lm_head.weight is self.model.wte.weight})


def state_of(value: float) -> StateDict:
    model = Language()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return decode(b"".join(encode(own_state(model))))


def merged(rules: list[str], *values: float) -> StateDict:
    split = Split.resolve(parse_rules(rules), state_of(0.0))
    merger = split.start_round(server_round=1, total_rounds=1, previous=state_of(0.0), seed=0, memory={})
    for rank, value in enumerate(values, start=1):
        merger.add(Update(rank=rank, state_dict=state_of(value), num_examples=1))
    return merger.finish()


def test_tied_weights_are_one_copy_and_stay_tied() -> None:
    state = own_state(Language())
    assert find_ties(state) == {"lm_head.weight": "wte.weight"}
    content = b"".join(encode(state))
    assert len(content) < 4 * (28 + 20) + 500
    found = decode(content)
    assert find_ties(found) == find_ties(state)
    assert b"".join(encode(found)) == content
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_loading_tied_weights_keeps_the_tie_and_refuses_two_values_for_it() -> None:
    model = Language()
    sent = {name: torch.ones_like(tensor) for name, tensor in own_state(model).items()}
    load_into(model, sent)
    assert model.lm_head.weight is model.wte.weight and model.wte.weight.unique().tolist() == [1.0]
    sent["lm_head.weight"] = torch.zeros(7, 4)
    with pytest.raises(
        StateMismatchError, match=r"the model ties 'lm_head\.weight' to 'wte\.weight', received has diff"
    ):
        load_into(model, sent)
    assert model.wte.weight.unique().tolist() == [1.0]


def test_a_file_of_the_safetensors_library_keeps_its_ties(tmp_path: Path) -> None:
    model = Language()
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    found = map_file(tmp_path / "model.safetensors")
    assert set(found) == set(model.state_dict()) and len(find_ties(found)) == 1


@pytest.mark.parametrize("metadata", [{"format": "a"}, {"b": "c"}, {"a": "a"}])
def test_metadata_that_names_no_tie_is_not_read(metadata: dict[str, str]) -> None:
    assert list(decode(safetensors.torch.save({"a": torch.ones(2)}, metadata))) == ["a"]


def test_memory_that_a_local_entry_shares_with_another_is_found_wherever_it_begins() -> None:
    whole = torch.zeros(10)
    state = {"a": whole[:5], "b": whole[5:], "c": torch.zeros(5), "none": torch.empty(0)}
    check_shared(state, lambda name: name == "a")
    with pytest.raises(UsageError, match="'d' and 'a' share their memory"):
        check_shared({**state, "d": whole[3:4]}, lambda name: name == "d")
    check_shared({**state, "d": whole[3:4]}, lambda name: name in ("a", "d"))


@pytest.mark.parametrize("rules", [
    ["fedavg"], ["krum(byzantine=0)"], ["wte*=median", "lm_head*=median", "fedavg"], ["flower.FedAvg"],
    ["dp(fedavg, clip=1000.0, noise=0)"],
])  # fmt: skip
def test_a_tied_weight_is_merged_once_and_comes_out_tied(rules: list[str]) -> None:
    found = merged(rules, 2.0, 2.0)
    assert found["lm_head.weight"] is found["wte.weight"]
    assert {float(value) for value in found["wte.weight"].unique()} == {2.0}
    assert list(decode(b"".join(encode(found)))) == list(state_of(0.0))


def test_noise_is_added_once_to_a_tied_weight() -> None:
    found = merged(["dp(fedavg, clip=1.0, noise=1.0)"], 1.0, 1.0)
    assert found["lm_head.weight"] is found["wte.weight"]


def test_rules_that_separate_tied_weights_are_refused_with_both_names() -> None:
    with pytest.raises(UsageError, match=rf"{BOTH} are one tensor \(tied weights\), but wte\*=median and fedavg"):
        merged(["wte*=median", "fedavg"], 1.0)


def test_an_update_in_which_tied_weights_differ_is_refused() -> None:
    sent = dict(state_of(1.0))
    update = Update(rank=1, state_dict=sent, num_examples=1)
    sent["lm_head.weight"] = sent["lm_head.weight"].clone()
    assert check_update(update, state_of(0.0)) is None
    sent["lm_head.weight"] += 1
    assert "ties 'lm_head.weight' to 'wte.weight', it has different values" in (
        check_update(update, state_of(0.0)) or ""
    )


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ("--aggregate", "fedavg"), ("--strategy", "FedAvg"), ("--aggregate", "fedavg", "--payload-store", "none"),
])  # fmt: skip
def test_five_programs_keep_one_copy_and_the_tie(tmp_path: Path, flags: tuple[str, ...]) -> None:
    with run(tmp_path, *flags) as federation:
        federation.start_all()
        assert set(federation.wait().values()) == {0}, federation.tails()
        found = map_file(federation.final_state())
        for rank in ("1", "2"):
            row: Any = federation.history()[-1]["clients"]
            assert row[rank]["evaluate"]["tied"] is True
    assert find_ties(found) == {"lm_head.weight": "wte.weight"}
    assert torch.allclose(found["wte.weight"], Language().wte.weight + 3.0)
    assert federation.final_state().stat().st_size < 4 * (28 + 20) + 500


@pytest.mark.slow
@pytest.mark.parametrize(("rules", "code", "said"), [
    (("--aggregate", "wte*=local", "--aggregate", "fedavg"), 15, f"{BOTH} share their memory (tied weights)"),
    (("--aggregate", "wte*=median", "--aggregate", "fedavg"), 2, f"{BOTH} are one tensor (tied weights)"),
])  # fmt: skip
def test_rules_that_separate_tied_weights_end_the_run_before_round_1(
    tmp_path: Path, rules: tuple[str, ...], code: int, said: str
) -> None:
    with run(tmp_path, *rules) as federation:
        federation.start_all()
        assert federation.wait()["server"] == code, federation.tails()
        assert said in federation.log("server")
        assert federation.history() == []
    secret = Language().wte.weight.detach().numpy().tobytes()
    for path in (tmp_path / "checkpoints" / "server").rglob("*.safetensors"):
        assert "local" not in rules[1] or secret not in path.read_bytes()


def run(directory: Path, *server_flags: str) -> Any:
    link_tests(directory)
    flags = ("--threads", "1", "--workload", "tests.test_tied_weights:Growing")
    return programs(directory, model_flags=flags, server_flags=("--rounds", "2", *server_flags))
