"""Flower's strategies as rules: the same bits as Flower itself, and state that survives a restart."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import flwr.server.strategy as flower_strategies
import numpy as np
import pytest
import torch
from flwr.common import (
    Code,
    FitRes,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)

from fedsplit.aggregation import Split, Update, parse_rules
from fedsplit.aggregation.flower import NOT_WORKING, WORKING
from fedsplit.aggregation.split import check_rules
from fedsplit.errors import AggregationError, UsageError

CLIENTS = 7
# What each working class needs to be made, and to be told apart from a plain mean.
PARAMS: dict[str, dict[str, object]] = {
    "FedAvg": {},
    "FedAvgM": {"server_learning_rate": 0.7, "server_momentum": 0.9},
    "FedAdagrad": {"eta": 0.05},
    "FedAdam": {"eta": 0.05},
    "FedYogi": {"eta": 0.05},
    "FedOpt": {},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.2},
    "Krum": {"num_malicious_clients": 1, "num_clients_to_keep": 3},
    "Bulyan": {"num_malicious_clients": 1, "to_keep": 0},
    "FaultTolerantFedAvg": {},
    "FedProx": {"proximal_mu": 0.1},
}
SHAPES = {"a.scale": (), "b.weight": (3, 4), "c.bias": (5,), "d.none": (0,)}


def value(name, params):
    arguments = ", ".join(f"{key}={value!r}" for key, value in params.items())
    return f"flower.{name}({arguments})" if params else f"flower.{name}"


def initial(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    floats = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in SHAPES.items()}
    return {**floats, "e.count": torch.tensor(0)}


def sent(state, server_round):
    """What the clients make of a global state: the same function of it wherever the test runs it."""
    generator = torch.Generator().manual_seed(server_round)
    updates = []
    for rank in range(1, CLIENTS + 1):
        moved = {
            key: (tensor + torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
            if tensor.is_floating_point()
            else tensor + rank
            for key, tensor in state.items()
        }
        updates.append(Update(rank=rank, state_dict=moved, num_examples=10 + rank))
    return updates


def run(split, state, rounds, memory, updates_of=sent):
    states = []
    for server_round in rounds:
        merger = split.start_round(server_round=server_round, total_rounds=9, previous=state, seed=0, memory=memory)
        for update in updates_of(state, server_round):
            merger.add(update)
        state = merger.finish()
        states.append(state)
    return states


def through_a_checkpoint(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(left, right):
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


def test_the_tables_cover_every_class_of_flower():
    assert set(WORKING) | set(NOT_WORKING) == set(flower_strategies.__all__)
    assert not set(WORKING) & set(NOT_WORKING)
    assert set(PARAMS) == set(WORKING)


def test_the_table_in_the_documentation_is_this_one():
    page = (Path(__file__).parents[1] / "docs" / "aggregation.md").read_text(encoding="utf-8")
    for name in WORKING:
        assert f"| `flower.{name}` | yes | " in page
    for name, why in NOT_WORKING.items():
        assert f"| `flower.{name}` | no | {why} |" in page
    assert page.count("| `flower.") == len(WORKING) + len(NOT_WORKING)


@pytest.mark.parametrize("name", NOT_WORKING)
def test_what_cannot_work_is_refused_with_the_reason(name):
    with pytest.raises(UsageError) as caught:
        check_rules(parse_rules([f"flower.{name}"]))
    assert NOT_WORKING[name] in str(caught.value)


@pytest.mark.parametrize("name", WORKING)
def test_three_rounds_are_bit_for_bit_those_of_one_instance_of_flower(name):
    state, params = initial(), PARAMS[name]
    split = Split.resolve(parse_rules([value(name, params)]), state)
    ours = run(split, state, [1, 2, 3], {})

    floats = list(SHAPES)
    start = ndarrays_to_parameters([state[key].numpy() for key in floats])
    strategy = getattr(flower_strategies, name)(initial_parameters=start, **params)
    previous = state
    for server_round, mine in enumerate(ours, start=1):
        updates = sent(previous, server_round)
        results = [
            (
                None,
                FitRes(
                    Status(Code.OK, ""),
                    ndarrays_to_parameters([u.state_dict[key].numpy() for key in floats]),
                    u.num_examples,
                    {},
                ),
            )
            for u in updates
        ]
        parameters, _ = strategy.aggregate_fit(server_round, results, [])
        for key, array in zip(floats, parameters_to_ndarrays(parameters), strict=True):
            assert torch.equal(mine[key], torch.from_numpy(np.array(array)).float()), (server_round, key)
        assert mine["e.count"].item() == CLIENTS * server_round
        previous = mine


@pytest.mark.parametrize("name", WORKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_restart_in_the_middle_gives_the_same_bits(name, dtype):
    state = initial(dtype)
    specs = parse_rules([value(name, PARAMS[name])])
    whole = run(Split.resolve(specs, state), state, [1, 2, 3, 4], {})

    memory: dict[str, dict[str, object]] = {}
    half = run(Split.resolve(specs, state), state, [1, 2], memory)
    # The keys of a state come back from a file in another order.
    reordered = {key: half[-1][key] for key in reversed(half[-1])}
    resumed, kept = through_a_checkpoint((reordered, memory))
    rest = run(
        Split.resolve(specs, resumed),
        resumed,
        [3, 4],
        kept,
        lambda current, number: sent({key: current[key] for key in state}, number),
    )
    for mine, theirs in zip(rest, whole[2:], strict=True):
        assert same({key: mine[key] for key in state}, theirs)


def test_the_moments_are_kept_and_the_first_rounds_differ_from_a_plain_mean():
    state = initial()
    memory: dict[str, dict[str, object]] = {}
    adam = run(Split.resolve(parse_rules(["flower.FedAdam(eta=0.05)"]), state), state, [1, 2], memory)
    mean = run(Split.resolve(parse_rules(["flower.FedAvg"]), state), state, [1, 2], {})
    assert not same(adam[0], mean[0])
    assert memory["*=flower.FedAdam"]["merges"] == 2
    assert {"m_t", "v_t", "current_weights"} == set(memory["*=flower.FedAdam"]["attributes"])
    assert run(Split.resolve(parse_rules(["flower.FedMedian"]), state), state, [1], (kept := {}))
    assert kept["*=flower.FedMedian"] == {"merges": 1, "attributes": {}}


def test_a_state_that_was_changed_outside_is_what_the_next_round_starts_from():
    state = initial()
    split = Split.resolve(parse_rules(["flower.FedAdam(eta=0.0)"]), state)
    memory: dict[str, dict[str, object]] = {}
    run(split, state, [1], memory)
    moved = {key: tensor + 1 for key, tensor in state.items()}
    # With a rate of 0 the strategy returns what it holds to be the global state.
    (result,) = run(split, moved, [2], memory)
    assert all(torch.equal(result[key], moved[key]) for key in SHAPES)


def test_a_round_without_updates_does_not_count_as_the_first_one():
    state = initial()
    split = Split.resolve(parse_rules(["flower.FedAvgM(server_momentum=0.9)"]), state)
    # FedAvgM fails in round 2 if it never saw round 1.
    assert same(run(split, state, [1], memory := {}, lambda *_: [])[0], state)
    assert run(split, state, [2, 3], memory)


def test_parameters_changed_on_resuming_take_effect():
    state = initial()
    memory: dict[str, dict[str, object]] = {}
    half = run(Split.resolve(parse_rules(["flower.FedAdam(eta=0.05)"]), state), state, [1], memory)[-1]
    other = Split.resolve(parse_rules(["flower.FedAdam(eta=0.0)"]), half)
    assert same(
        {key: run(other, half, [2], copy.deepcopy(memory))[0][key] for key in SHAPES},
        {key: half[key] for key in SHAPES},
    )


def test_what_the_strategy_itself_refuses_names_the_rule():
    state = initial()
    split = Split.resolve(parse_rules(["flower.Bulyan(num_malicious_clients=2, to_keep=0)"]), state)
    with pytest.raises(AggregationError, match=r"the rule flower\.Bulyan.* of part '\*' failed: ValueError"):
        run(split, state, [1], {})


def test_a_part_of_whole_numbers_only_and_complex_entries_work():
    state = {"n": torch.tensor([1, 2]), "z": torch.tensor([1 + 2j, 3 - 1j])}
    updates = [
        Update(rank=r, state_dict={"n": torch.tensor([r, 5]), "z": state["z"] * r}, num_examples=1) for r in (1, 2, 3)
    ]
    split = Split.resolve(parse_rules(["n=flower.FedMedian", "z=flower.FedMedian"]), state)
    (result,) = run(split, state, [1], {}, lambda *_: updates)
    assert result["n"].tolist() == [3, 5]
    assert torch.equal(result["z"], state["z"] * 2)
