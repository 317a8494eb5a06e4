"""The strategy: who takes part, what is refused, and Flower's interface over the same merging."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.common import Code, EvaluateRes, FitRes, Parameters, Status

from fedsplit.aggregation import Update
from fedsplit.errors import UsageError
from fedsplit.server.settings import ServerSettings
from fedsplit.server.strategy import Strategy, read_update
from fedsplit.states.state_dict import StateDict, decode, encode, export_state, read_initial_checkpoint

OK = Status(Code.OK, "")


def payload(state: StateDict) -> bytes:
    return b"".join(encode(state))


def strategy_for(state: StateDict, *rules: str, **settings: Any) -> Strategy:
    strategy = Strategy(rules, **{"min_clients": 1, **settings})
    strategy.begin_run(state, {})
    return strategy


def merged(strategy: Strategy, *updates: Update | str) -> tuple[StateDict | None, list[str]]:
    """Put updates through a round as the server does; returns the next state and why updates were refused."""
    merge, refused = strategy.start_fit(1), []
    for update in updates:
        if isinstance(update, str):
            refused.append(update)
        else:
            merge.add(update)
    return strategy.end_fit(1, merge, [])[0], refused


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
        ({"a": torch.zeros(2, dtype=torch.float64)}, 1, "float64"),
        ({"a": torch.tensor([1.0, float("nan")])}, 1, "NaN"),
        ({"a": torch.zeros(2)}, 0, "num_examples"),
    ],
)
def test_what_must_not_be_merged_is_refused_and_the_state_stays(update: StateDict, number: int, said: str) -> None:
    reference = {"a": torch.ones(2)}
    state, (reason,) = merged(strategy_for(reference), read_update(2, payload(update), number, {}, reference))
    assert state is None
    assert said in reason


def test_bytes_that_are_no_payload_are_refused() -> None:
    reason = read_update(1, b"\x80\x04\x95" + b"0" * 100, 1, {}, {"a": torch.ones(2)})
    assert "not a safetensors" in str(reason)


def test_too_few_updates_leave_the_state_as_it_was() -> None:
    reference = {"a": torch.ones(2)}
    update = read_update(1, payload({"a": torch.zeros(2)}), 1, {}, reference)
    assert merged(strategy_for(reference, min_results=2), update) == (None, [])


def test_the_same_ranks_are_drawn_for_a_round_whenever_it_is_done() -> None:
    strategy, roster = strategy_for({"a": torch.ones(2)}, fraction_train=0.3, seed=5), Ranks(range(1, 13))
    drawn = [drawn_by(strategy, number, roster) for number in range(1, 20)]
    assert drawn == [drawn_by(strategy, number, Ranks(range(12, 0, -1))) for number in range(1, 20)]
    assert {len(ranks) for ranks in drawn} == {4}
    assert all(ranks == sorted(ranks) for ranks in drawn)
    assert len({tuple(ranks) for ranks in drawn}) > 5
    # What a run drew before must be drawn again when it is resumed, with this version or a later one.
    assert drawn[:3] == [sorted(random.Random(f"5/{number}").sample(range(1, 13), 4)) for number in (1, 2, 3)]


class Ranks:
    """A client manager with these ranks."""

    def __init__(self, ranks: Iterable[int]) -> None:
        self._clients = {str(rank): SimpleNamespace(cid=str(rank)) for rank in ranks}

    def wait_for(self, number: int, timeout: float) -> bool:
        return len(self._clients) >= number

    def all(self) -> dict[str, Any]:
        return self._clients


def drawn_by(strategy: Strategy, server_round: int, roster: Any) -> list[int]:
    parameters = Parameters([payload({"a": torch.ones(2)})], "safetensors")
    chosen = strategy.configure_fit(server_round, parameters, roster)
    assert all(ins.parameters is parameters for _, ins in chosen), "the state itself, not a copy"
    return [int(client.cid) for client, _ in chosen]


@pytest.mark.parametrize(
    "wrong",
    [{"fraction_train": 0.0}, {"fraction_train": 1.5}, {"min_clients": 0}, {"min_results": 0}, {"evaluate_every": -1}],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    for make in (ServerSettings, Strategy):
        with pytest.raises(UsageError):
            make(**wrong)


@pytest.mark.parametrize("beside", [
    {"aggregate": ("median",)}, {"fraction_train": 0.5}, {"min_results": 2},
])  # fmt: skip
def test_a_flag_that_a_strategy_decides_itself_is_refused_beside_it(beside: dict[str, Any]) -> None:
    (name,) = beside
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} cannot go with --strategy"):
        ServerSettings(strategy="FedAvg", **beside)


def test_a_strategy_that_cannot_be_read_is_told_of_before_anything_starts() -> None:
    with pytest.raises(UsageError, match="expected"):
        ServerSettings(strategy="FedAdam(eta=")


def test_what_rules_remember_survives_the_checkpoint(tmp_path: Path) -> None:
    strategy = strategy_for({"a": torch.ones(2)})
    assert strategy.dump_memory() is None
    strategy.memory["*=fedavg"] = {"momentum": [torch.arange(3.0)], "step": 4}
    (tmp_path / "rules.pt").write_bytes(strategy.dump_memory() or b"")
    other = strategy_for({"a": torch.ones(2)})
    other.load_memory(tmp_path / "rules.pt")
    assert other.memory["*=fedavg"]["step"] == 4
    assert torch.equal(other.memory["*=fedavg"]["momentum"][0], torch.arange(3.0))


def test_another_kind_of_rule_starts_with_an_empty_memory_and_what_was_spent_stays_spent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = strategy_for({"a": torch.ones(2)})
    spent = {"steps": 3, "multipliers": {"2.0": 3}, "delta": 1e-5}
    strategy.memory = {"*=dp(flower.FedAdam)": {"inner": {"merges": 3}, "privacy": spent}, "*=median": {"x": 1}}
    (tmp_path / "rules.pt").write_bytes(strategy.dump_memory() or b"")
    other = strategy_for({"a": torch.ones(2)})
    other.load_memory(tmp_path / "rules.pt")
    assert other.memory == {"*=dp(flower.FedAdam)": {"privacy": spent}, "*=median": {}}
    assert "no part has the rule *=median any more" in caplog.text


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_an_exported_state_can_be_started_from(tmp_path: Path, ending: str) -> None:
    state = {"weight": torch.randn(3), "half": torch.randn(3).bfloat16(), "count": torch.tensor(7)}
    source, output = tmp_path / "state.safetensors", tmp_path / f"out{ending}"
    source.write_bytes(payload(state))
    output.write_bytes(b"".join(export_state(source, output)))
    found = decode(b"".join(read_initial_checkpoint(output)))
    assert all(torch.equal(found[name], state[name]) for name in state)
