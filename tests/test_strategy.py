"""The strategy: who takes part, what is refused, and Flower's interface over the same merging."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.common import Code, EvaluateRes, FitRes, Parameters, Status

from fedsplit.aggregation.spec import parse_rules
from fedsplit.errors import UsageError
from fedsplit.server.settings import StrategySettings
from fedsplit.server.strategy import Strategy
from fedsplit.states.portable import export_state, read_initial_checkpoint
from fedsplit.states.state_dict import StateDict, decode, encode

OK = Status(Code.OK, "")


def payload(state: StateDict) -> bytes:
    return b"".join(encode(state))


def strategy_for(state: StateDict, *rules: str, **settings: Any) -> Strategy:
    strategy = Strategy(StrategySettings(rules=parse_rules(rules), **settings), total_rounds=3)
    strategy.set_state(payload(state))
    strategy.resolve_split({})
    return strategy


def test_a_list_of_flowers_results_is_merged_as_the_server_merges_them() -> None:
    strategy = strategy_for({"a": torch.zeros(2), "n": torch.tensor(0)})
    results = [
        (
            SimpleNamespace(cid=str(rank)),
            FitRes(OK, Parameters([payload(state)], "safetensors"), weight, {"loss": 1.0 * rank}),
        )
        for rank, weight, state in (
            (1, 1, {"a": torch.tensor([1.0, 1.0]), "n": torch.tensor(5)}),
            (2, 3, {"a": torch.tensor([5.0, 1.0]), "n": torch.tensor(2**60)}),
        )
    ]
    parameters, metrics = strategy.aggregate_fit(1, results, [])  # type: ignore[arg-type]
    assert parameters is not None
    merged = decode(parameters.tensors[0])
    assert merged["a"].tolist() == [4.0, 1.0]
    assert merged["n"].item() == 2**60
    assert metrics == {"loss": 1.75}


def test_evaluations_are_averaged_by_the_number_of_examples() -> None:
    results = [
        (SimpleNamespace(), EvaluateRes(OK, loss, number, {"accuracy": accuracy}))
        for loss, number, accuracy in ((1.0, 10, 0.5), (2.0, 30, 0.9))
    ]
    loss, metrics = strategy_for({"a": torch.zeros(1)}).aggregate_evaluate(1, results, [])  # type: ignore[arg-type]
    assert (loss, metrics) == (1.75, {"accuracy": pytest.approx(0.8)})


@pytest.mark.parametrize(
    ("update", "number", "said"),
    [
        ({"b": torch.zeros(2)}, 1, "'a'"),
        ({"a": torch.zeros(3)}, 1, "shape"),
        ({"a": torch.zeros(2, dtype=torch.float64)}, 1, "dtype"),
        ({"a": torch.tensor([1.0, float("nan")])}, 1, "NaN"),
        ({"a": torch.zeros(2)}, 0, "num_examples"),
    ],
)
def test_what_must_not_be_merged_is_refused_and_the_state_stays(update: StateDict, number: int, said: str) -> None:
    merge = strategy_for({"a": torch.ones(2)}).begin_merge(1)
    reason = merge.offer(2, payload(update), number, {})
    assert reason is not None
    assert said in reason
    assert merge.finish() is None


def test_bytes_that_are_no_payload_are_refused() -> None:
    merge = strategy_for({"a": torch.ones(2)}).begin_merge(1)
    assert "not a safetensors" in str(merge.offer(1, b"\x80\x04\x95" + b"0" * 100, 1, {}))


def test_too_few_updates_leave_the_state_as_it_was() -> None:
    merge = strategy_for({"a": torch.ones(2)}, min_results=2).begin_merge(1)
    assert merge.offer(1, payload({"a": torch.zeros(2)}), 1, {}) is None
    assert merge.finish() is None


def test_the_same_ranks_are_drawn_for_a_round_whenever_it_is_done() -> None:
    settings = StrategySettings(rules=parse_rules([]), fraction_train=0.3, seed=5)
    drawn = [settings.sample(number, list(range(1, 11))) for number in range(1, 20)]
    assert drawn == [settings.sample(number, list(range(10, 0, -1))) for number in range(1, 20)]
    assert {len(ranks) for ranks in drawn} == {3}
    assert len({tuple(ranks) for ranks in drawn}) > 5


@pytest.mark.parametrize(
    "wrong",
    [{"fraction_train": 0.0}, {"fraction_train": 1.5}, {"min_clients": 0}, {"min_results": 0}, {"evaluate_every": -1}],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        StrategySettings(rules=parse_rules([]), **wrong)


def test_what_rules_remember_survives_the_checkpoint(tmp_path: Path) -> None:
    strategy = strategy_for({"a": torch.ones(2)})
    assert strategy.dump_memory() is None
    strategy.memory["*"] = {"momentum": [torch.arange(3.0)], "step": 4}
    (tmp_path / "rules.pt").write_bytes(strategy.dump_memory() or b"")
    other = strategy_for({"a": torch.ones(2)})
    other.load_memory(tmp_path / "rules.pt")
    assert other.memory["*"]["step"] == 4
    assert torch.equal(other.memory["*"]["momentum"][0], torch.arange(3.0))


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_an_exported_state_can_be_started_from(tmp_path: Path, ending: str) -> None:
    state = {"weight": torch.randn(3), "half": torch.randn(3).bfloat16(), "count": torch.tensor(7)}
    source, output = tmp_path / "state.safetensors", tmp_path / f"out{ending}"
    source.write_bytes(payload(state))
    output.write_bytes(b"".join(export_state(source, output)))
    found = decode(b"".join(read_initial_checkpoint(output)))
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.safetensors or \.pt"):
        export_state(tmp_path / "state.safetensors", tmp_path / "model.onnx")
